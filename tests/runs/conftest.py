"""A request as the command composes it, small enough to train in a second or two."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from sparse_lab import stages
from sparse_lab.config import Config
from sparse_lab.record import RunFolder
from sparse_lab.requests import Request
from sparse_lab.run import run

# two steps an epoch
SMALL = (
    "dataset=digits",
    "training=digits",
    "model.width=0.0625",
    "dataset.train_limit=32",
    "dataset.eval_limit=30",
    "training.batch_size=16",
    "training.epochs=2",
    "training.finetune.epochs=2",
    "training.regrow.epochs=2",
    "trainer=cpu",
    "trainer.progress=false",
)


@pytest.fixture(scope="session")
def compose_under() -> Callable[..., Config]:
    """compose_under(folder, "method=oneshot", ...) -> the config of a small run whose outputs lie in `folder`.

    As a sweep's jobs are composed: Hydra puts the same choices together once.
    """
    request = Request.read([])
    composer = request.composer()

    def make(outputs: Path, *overrides: str) -> Config:
        return composer.config(dict(one.split("=", 1) for one in (*SMALL, f"paths.outputs={outputs}", *overrides)))

    return make


@pytest.fixture
def compose(compose_under: Callable[..., Config], tmp_path: Path) -> Callable[..., Config]:
    """compose("method=oneshot", ...) -> the config of a small run under tmp_path."""
    return partial(compose_under, tmp_path)


@pytest.fixture(scope="session")
def with_starts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Config], Config]:
    """with_starts(config) -> config, with the finished runs that it starts from in its outputs.

    Each of them is trained once a session and copied from there: a run finds what it starts from by its name.
    """
    outputs = tmp_path_factory.mktemp("starts")

    def lay(config: Config) -> Config:
        for start in starts(config):
            made = RunFolder(replace(start, paths=replace(start.paths, outputs=str(outputs))))
            run(made.config, "a start", Console(quiet=True))
            shutil.copytree(made.path, RunFolder(start).path, dirs_exist_ok=True)
        return config

    return lay


def starts(config: Config) -> list[Config]:
    found = [stages.parent(config), stages.reference(config), stages.rewound(config)]
    found += [stages.dense(config)] if config.method.regrows else []
    return [start for start in found if start is not None]


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


@pytest.fixture
def small() -> tuple[str, ...]:
    return SMALL
