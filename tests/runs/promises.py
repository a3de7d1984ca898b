"""What every run promises, whatever its method and its network: masks that hold after each step, the same bits after a
stop or a death, a report.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from sparse_lab.callbacks.nan_guard import NanGuard
from sparse_lab.experiment.identity import run_dir
from sparse_lab.experiment.runner import run
from sparse_lab.report.load.records import read
from sparse_lab.report.load.traces import traces
from sparse_lab.report.tables.aggregate import levels, long
from sparse_lab.training.checkpoint_io import load_checkpoint, load_network
from sparse_lab.training.signals import Stopped


def check_zeros(optimizer, masks) -> None:
    for name, module in masks.layers.items():
        mask = masks[name]
        assert mask.any(), f"{name} is empty"
        assert not module.weight[~mask].any(), name
        same_shape = [v for v in optimizer.state[module.weight].values() if v.shape == mask.shape]
        assert same_shape, "this optimizer keeps no state of the weight's shape"
        assert not any(value[~mask].any() for value in same_shape), name
        # nor has a zero a sign there: a checkpoint does not keep it
        assert not any(torch.signbit(value[~mask]).any() for value in (module.weight, *same_shape)), name


def tensors(part, path="") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a nested checkpoint, by its path."""
    if isinstance(part, torch.Tensor):
        yield path, part
    elif isinstance(part, (dict, list)):
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            yield from tensors(value, f"{path}/{key}")


def hash_of(named: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in named.items():
        digest.update(name.encode() + value.detach().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class End:
    """A run ends early: by `how`, once `step` steps are done."""

    how: Callable[[], None]
    step: int

    def __str__(self) -> str:
        return f"{'its death' if self.how is die else 'a stop'} at step {self.step}"


def die() -> None:
    raise RuntimeError("pulled the plug")


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupted(config, end: End, quiet, monkeypatch) -> dict:
    """Run until `end`; the checkpoint that is left."""

    def interrupt(self, trainer, *rest):
        if trainer.global_step == end.step:
            end.how()

    with monkeypatch.context() as patch:
        patch.setattr(NanGuard, "on_train_batch_end", interrupt)
        with pytest.raises(RuntimeError if end.how is die else Stopped) as caught:
            run(config, "x", quiet)
    status = json.loads((run_dir(config).path / "status.json").read_text())
    checkpoint = load_checkpoint(run_dir(config).last)
    if end.how is die:
        assert status["state"] == "failed" and "pulled the plug" in status["error"]
    else:
        assert status["state"] == "interrupted" and f"SIGTERM: saved at step {end.step};" in status["error"]
        assert caught.value.status == 143 and checkpoint["global_step"] == end.step
    return checkpoint


def check_same(whole, broken) -> None:
    """The two runs left the same network, optimizer, random state and rows, to the last bit."""
    first, second = (load_network(run_dir(config).best) for config in (whole, broken))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    parts = ("state_dict", "optimizer_states", "random_state")
    lasts = (load_checkpoint(run_dir(config).last) for config in (whole, broken))
    first, second = (dict(tensors({key: last[key] for key in parts})) for last in lasts)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    for name in ("metrics.csv", "updates.jsonl", "gradients.jsonl"):
        paths = [run_dir(config).path / name for config in (whole, broken)]
        assert paths[0].exists() == paths[1].exists()
        assert not paths[0].exists() or paths[0].read_bytes() == paths[1].read_bytes(), name


def check_report(config, result) -> None:
    """The tables of a report on the run and what it started from."""
    records = read(run_dir(config).path.parent)
    assert not records.warnings and not records.unfinished
    [row] = [row for _, row in long(records.results, []).iterrows() if row["base"] == result["method"]]
    assert (row["kept"], row["mean"]) == (result["kept"], pytest.approx(result["test_accuracy"]))
    passed = levels([one for one in records.results if one.name == result["name"]])
    assert list(passed["kept"]) == [level["kept"] for level in result["levels"]]
    assert not traces(records.results)[1]
