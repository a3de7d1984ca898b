"""A request as the command composes it, small enough to train in a second or two."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from sparse_lab.config import Config
from sparse_lab.experiment.identity import run_dir
from sparse_lab.experiment.runner import run
from sparse_lab.methods import table


@pytest.fixture(scope="session")
def with_starts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Config], Config]:
    """with_starts(config) -> config, with the finished runs that it starts from in its outputs.

    Each of them is trained once a session and copied from there: a run finds what it starts from by its name.
    """
    outputs = tmp_path_factory.mktemp("starts")

    def lay(config: Config) -> Config:
        for start in table.starts(config).values():
            made = replace(start, paths=replace(start.paths, outputs=str(outputs)))
            run(made, "a start", Console(quiet=True))
            shutil.copytree(run_dir(made).path, run_dir(start).path, dirs_exist_ok=True)
        return config

    return lay
