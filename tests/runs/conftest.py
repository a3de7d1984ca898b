"""A request as the command composes it, small enough to train in a second or two."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
from rich.console import Console

from sparse_lab.algorithms.base import StepHooks
from sparse_lab.algorithms.enforce import EnforceMasks
from sparse_lab.callbacks.checkpoint import Checkpoint
from sparse_lab.config import Config
from sparse_lab.experiment.identity import run_dir
from sparse_lab.experiment.runner import run
from sparse_lab.methods import table
from tests.runs.promises import End, check_same, check_zeros, hash_of, interrupted, tensors


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


@pytest.fixture
def watched(monkeypatch) -> dict[int, str]:
    """Looks at the network after everything that follows an optimizer step; step -> a hash of weights and optimizer."""
    steps: dict[int, str] = {}

    def last_of_all(self, trainer, module) -> None:
        hung = StepHooks.of(trainer.optimizers[0]).algorithms
        masks = next((one.masks for one in hung if isinstance(one, EnforceMasks)), None)
        trainer.optimizers[0].register_step_post_hook(partial(after, trainer, module, masks))

    def after(trainer, module, masks, optimizer, *_) -> None:
        if masks is not None:
            check_zeros(optimizer, masks)
        seen = tensors([module.model.state_dict(), optimizer.state_dict()["state"]])
        steps[trainer.global_step + 1] = hash_of(dict(seen))

    monkeypatch.setattr(Checkpoint, "on_fit_start", last_of_all)
    return steps


@pytest.fixture
def check_interrupted(watched, quiet, monkeypatch) -> Callable[..., list[dict]]:
    """check_interrupted(config, ends, whole) makes the run of `config`, which ends early and goes on again and again,
    and compares it with the undisturbed run `whole`: all that the two leave must be equal, and `steps`, what `watched`
    saw of that one. Returns the checkpoints that it went on from.
    """

    def check(config, ends: list[End], whole, steps: dict[int, str]) -> list[dict]:
        checkpoints = []
        for before, end in zip([None, *ends], [*ends, None], strict=True):
            watched.clear()
            if end is None:
                run(config, "x", quiet)
            else:
                checkpoints.append(interrupted(config, end, quiet, monkeypatch))
            wrong = [step for step in watched if watched[step] != steps[step]]
            assert not wrong, f"after {before or 'its start'} it goes another way from step {min(wrong)} on"
        check_same(whole, config)
        return checkpoints

    return check
