"""A request as the command composes it, small enough to train in a second or two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from sparse_lab.config import Config
from sparse_lab.requests import Request, to_config

SMALL = (
    "dataset=digits",
    "training=digits",
    "model.width=0.0625",
    "dataset.train_limit=128",
    "dataset.eval_limit=100",
    "training.epochs=2",
    "training.finetune.epochs=2",
    "training.regrow.epochs=2",
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
def quiet() -> Console:
    return Console(quiet=True)


@pytest.fixture
def small() -> tuple[str, ...]:
    return SMALL
