"""Runs of a second or two under tmp_path, and what is known of them without any dashboard."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparse_lab.callbacks.save_last import SaveLast
from sparse_lab.compose import to_config
from sparse_lab.config import Config
from sparse_lab.record import RunFolder
from sparse_lab.requests import Request

SMALL = (
    "dataset=digits",
    "training=digits",
    "model.width=0.0625",
    "dataset.train_limit=64",
    "dataset.eval_limit=50",
    "training.epochs=3",
    "training.finetune.epochs=1",
    "trainer=cpu",
    "trainer.progress=false",
)


@pytest.fixture
def compose(tmp_path: Path) -> Callable[..., Config]:
    """compose("method=oneshot", ...) -> the config of a small run under tmp_path."""

    def make(*overrides: str) -> Config:
        request = Request.read([])
        return to_config(request.compose([*SMALL, f"paths.outputs={tmp_path}", *overrides]))

    return make


@pytest.fixture
def small(tmp_path: Path) -> tuple[str, ...]:
    """The same as a command line."""
    return (*SMALL, f"paths.outputs={tmp_path}")


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


@pytest.fixture
def metrics() -> Callable[[Config], list[dict[str, float]]]:
    """The rows of a run's metrics.csv, which dashboards have no hand in."""

    def read(config: Config) -> list[dict[str, float]]:
        with open(RunFolder(config).path / "metrics.csv", newline="") as file:
            return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]

    return read


@pytest.fixture
def updates() -> Callable[[Config], list[dict[str, Any]]]:
    """The lines of a run's updates.jsonl."""

    def read(config: Config) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (RunFolder(config).path / "updates.jsonl").read_text().splitlines()]

    return read


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """plug(2): a run fails right after it has saved its second epoch. plug(0): runs go through again."""
    original = SaveLast.on_train_epoch_end

    def pull(epochs: int) -> None:
        def save_and_fail(self: SaveLast, trainer: Any, module: Any) -> None:
            original(self, trainer, module)
            if trainer.current_epoch + 1 == epochs:
                raise RuntimeError("somebody pulled the plug")

        monkeypatch.setattr(SaveLast, "on_train_epoch_end", save_and_fail)

    return pull
