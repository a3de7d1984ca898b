"""Runs of a second or two under tmp_path, and what is known of them without any dashboard."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparse_lab.callbacks.checkpoint import Checkpoint
from sparse_lab.config import Config
from sparse_lab.experiment.identity import run_dir


@pytest.fixture
def small(small: tuple[str, ...], tmp_path: Path) -> tuple[str, ...]:
    """Three epochs of a few steps each."""
    own = ("dataset.train_limit=64", "training.epochs=3", "training.finetune.epochs=1", f"paths.outputs={tmp_path}")
    return (*small, *own)


@pytest.fixture
def metrics() -> Callable[[Config], list[dict[str, float]]]:
    """The rows of a run's metrics.csv, which dashboards have no hand in."""

    def read(config: Config) -> list[dict[str, float]]:
        with open(run_dir(config).path / "metrics.csv", newline="") as file:
            return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]

    return read


@pytest.fixture
def updates() -> Callable[[Config], list[dict[str, Any]]]:
    """The lines of a run's updates.jsonl."""

    def read(config: Config) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run_dir(config).path / "updates.jsonl").read_text().splitlines()]

    return read


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """plug(2): a run fails right after it has saved its second epoch. plug(0): runs go through again."""
    original = Checkpoint.on_train_epoch_end

    def pull(epochs: int) -> None:
        def save_and_fail(self: Checkpoint, trainer: Any, module: Any) -> None:
            original(self, trainer, module)
            if trainer.current_epoch + 1 == epochs:
                raise RuntimeError("somebody pulled the plug")

        monkeypatch.setattr(Checkpoint, "on_train_epoch_end", save_and_fail)

    return pull
