"""A signal stops a run wherever it comes, loses no finished step, and the run goes on to the same bits.

Each moment is a function in which the run is when the signal comes; what would be computed next must not be.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sparse_lab.callbacks import activations, mask_logger, rounds
from sparse_lab.callbacks.checkpoint import Checkpoint
from sparse_lab.callbacks.nan_guard import NanGuard
from sparse_lab.callbacks.rounds import Rounds
from sparse_lab.experiment import fit
from sparse_lab.experiment.identity import run_dir
from sparse_lab.experiment.runner import run
from sparse_lab.records.run_dir import RunDir
from sparse_lab.sparse_cpu import engine
from sparse_lab.sparsity import scores
from sparse_lab.training.checkpoint_io import load_checkpoint
from sparse_lab.training.lightning_module import Classifier
from sparse_lab.training.signals import Stopped
from sparse_lab.training.step import TrainingStep

# three steps an epoch and two batches of validation; a checkpoint at the last epoch alone, if nothing asks for one
COMMON = (
    "sparsity.target=0.9",
    "method.regrow.budget=0.03",
    "schedule.iterative.share=0.6",
    "training.batch_size=16",
    "dataset.train_limit=48",
    "dataset.eval_limit=32",
    "trainer.checkpoint_every=100",
    "diagnostics.activations=true",
    *(f"{recipe}.epochs=3" for recipe in ("training", "training.finetune", "training.regrow")),
)
# what no two runs share: time, memory, and the folder that the command names
OWN = {"seconds", "peak_memory_mb", "command", "checksum"}


class Moment:
    """A function of the run: in its `call`-th call since the run was started SIGTERM comes, and it must not go on.

    step: the last step that was done before, from which the run is to go on; 0: there is none.
    """

    def __init__(self, owner: Any, name: str, call: int, step: int) -> None:
        self.owner = owner
        self.name = name
        self.call = call
        self.step = step

    def __str__(self) -> str:
        return f"call {self.call} of {self.name}, after step {self.step}"

    def comes(self, patch: pytest.MonkeyPatch) -> None:
        of_dict = isinstance(self.owner, dict)
        function = self.owner[self.name] if of_dict else getattr(self.owner, self.name)
        calls = []

        def instead(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == self.call:
                os.kill(os.getpid(), signal.SIGTERM)
            assert len(calls) < self.call, f"went on: {self}"
            return function(*args, **kwargs)

        if of_dict:
            patch.setitem(self.owner, self.name, instead)
        else:
            patch.setattr(self.owner, self.name, instead)


@pytest.fixture
def leave(compose, quiet, tmp_path, monkeypatch):
    """leave(overrides, moments): start a run, stop it in each of `moments` in turn, and let it end; all that it leaves
    equals what an undisturbed one leaves.
    """

    monkeypatch.setattr(fit, "reset_peak_memory", lambda: None)  # collects garbage for longer than such a run takes

    def leave(overrides: tuple[str, ...], *moments: Moment) -> None:
        whole, left = (compose(*COMMON, *overrides, f"paths.outputs={tmp_path / name}") for name in ("whole", "left"))
        run(whole, "x", quiet)
        for one in (tmp_path / "whole" / "runs").iterdir():  # what it starts from is trained once
            if one.name != run_dir(whole).name:
                shutil.copytree(one, tmp_path / "left" / "runs" / one.name)
        for moment in moments:
            with monkeypatch.context() as patch:
                moment.comes(patch)
                with pytest.raises(Stopped, match="stopped by SIGTERM") as caught:
                    run(left, "x", quiet)
            assert caught.value.status == 143
            check_where_it_goes_on(run_dir(left), moment)
        run(left, "x", quiet)
        compare(run_dir(whole), run_dir(left))

    return leave


def check_where_it_goes_on(folder: RunDir, moment: Moment) -> None:
    status = json.loads((folder.path / "status.json").read_text())
    where = f"saved at step {moment.step}" if moment.step else "nothing was trained yet"
    assert status["state"] == "interrupted" and where in status["error"], f"{moment}: {status['error']}"
    if moment.step:
        assert load_checkpoint(folder.last)["global_step"] == moment.step, moment
    else:
        assert not folder.last.exists(), moment
    assert not list(folder.path.rglob("*.tmp"))


def compare(whole: RunDir, left: RunDir) -> None:
    for name in ("checkpoints/last.ckpt", "checkpoints/best.ckpt"):
        assert dict(plain(load_checkpoint(whole.path / name))) == dict(plain(load_checkpoint(left.path / name))), name
    files = [{path.name for path in folder.path.iterdir()} for folder in (whole, left)]
    assert files[0] == files[1] and "activations.jsonl" in files[0]
    for name in sorted(name for name in files[0] if name.endswith((".csv", ".jsonl"))):
        assert (whole.path / name).read_bytes() == (left.path / name).read_bytes(), name
    assert dict(plain(whole.result())) == dict(plain(left.result()))


def plain(part: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a checkpoint or record by its path, tensors as their bytes; without what no two runs share."""
    if isinstance(part, torch.Tensor):
        yield path, (part.dtype, part.shape, part.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(part, (dict, list, tuple)):
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            if key not in OWN:
                yield from plain(value, f"{path}/{key}")
    else:
        yield path, part


def test_within_synflow(leave):
    leave(("method=synflow", "method.prune.iterations=5"), Moment(scores.SCORES, "synflow", 3, step=0))


def test_within_validation_diagnostics_and_the_end_of_a_level(leave, monkeypatch):
    """Again and again, in one run: in validation, twice at the same place; while activations are looked at; on the test
    set and while paths are followed, when the weights of the best epoch are back already; before the result is there.
    """
    keep_best = Rounds._keep_best  # the first epoch is the best one: what is held must be the last one's weights
    monkeypatch.setattr(Rounds, "_keep_best", lambda self, trainer, module, _: keep_best(self, trainer, module, 1.0))
    leave(
        ("method=dense",),
        Moment(Classifier, "validation_step", 2, step=3),
        Moment(Classifier, "validation_step", 2, step=3),
        Moment(activations, "positive_shares", 2, step=6),
        Moment(rounds, "accuracy", 1, step=9),
        Moment(mask_logger, "connectivity", 1, step=9),
        Moment(fit, "make_result", 1, step=9),
    )


@pytest.mark.full
def test_within_the_scorings_of_regrowth_and_the_ends_of_its_levels(leave):
    """Two levels; each begins with a scoring."""
    leave(
        ("method=oneshot_regrow", "method.regrow.steps=2", "method.regrow.score_on=sparse"),
        Moment(scores.SCORES, "taylor", 1, step=0),
        Moment(rounds, "accuracy", 1, step=9),
        Moment(scores.SCORES, "taylor", 1, step=9),
    )


def test_within_a_scoring_in_the_middle_of_an_epoch(leave):
    cubic = (
        "method=gmp",
        "method.prune.score=snip",
        "schedule.cubic.every=2",
        "schedule.cubic.begin=0",
        "schedule.cubic.end=0.9",
    )
    leave(cubic, Moment(scores.SCORES, "snip", 2, step=2), Moment(scores.SCORES, "snip", 2, step=4))


@pytest.mark.every(2)
@pytest.mark.parametrize("how", ["compute=sparse", "trainer.compile=full"])
def test_within_the_first_step_while_it_is_compiled(how, compose, quiet, monkeypatch):
    """Nothing is trained yet, so the run is left before the step is done. Where the compiler is called, nothing is."""
    config = compose(*COMMON, "method=static", how)
    owner = engine.SparseArithmetic if how == "compute=sparse" else TrainingStep
    moment = Moment(owner, "__call__" if how == "compute=sparse" else "_made_of", 1, step=0)
    moment.comes(monkeypatch)
    with pytest.raises(Stopped):
        run(config, "x", quiet)
    check_where_it_goes_on(run_dir(config), moment)


def test_within_the_last_step_of_an_epoch(compose, quiet, monkeypatch):
    """Noted there, and heeded before validation; another SIGTERM on the way out changes nothing."""
    config = compose(*COMMON, "method=dense")

    def preempt(self, trainer, *_) -> None:
        if trainer.global_step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    def leave(self, *arguments) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(self, *arguments)

    save = Checkpoint.leave
    monkeypatch.setattr(Checkpoint, "leave", leave)
    monkeypatch.setattr(NanGuard, "on_train_batch_end", preempt)
    validation = Moment(Classifier, "validation_step", 3, step=6)
    validation.comes(monkeypatch)  # two batches in the first epoch, and none in the second
    with pytest.raises(Stopped):
        run(config, "x", quiet)
    check_where_it_goes_on(run_dir(config), validation)


LONG = {
    "SynFlow": ("method=synflow", "model=resnet34", "model.width=1"),
    "the compilation of kernels": ("method=static", "compute=sparse", "trainer.progress=false"),
}


@pytest.mark.full
@pytest.mark.parametrize("what", LONG)
def test_a_process_leaves_at_once_from_within(what, tmp_path, capsys):
    """Seconds from SIGTERM to the end of the process, in what takes minutes and changes nothing on disk."""
    request = ("dataset=digits", "training=digits", "sparsity=s99", "trainer=cpu", f"paths.outputs={tmp_path / 'out'}")
    process = subprocess.Popen(
        [sys.executable, "-m", "sparse_lab", *request, *LONG[what]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "NUMBA_CACHE_DIR": str(tmp_path / "kernels")},
    )
    assert process.stdout is not None and ": started" in process.stdout.readline()
    time.sleep(8)
    process.terminate()
    sent = time.monotonic()
    said = process.communicate(timeout=120)[0]
    seconds = time.monotonic() - sent
    with capsys.disabled():
        print(f"\n{what}: {seconds:.2f} s from SIGTERM to the end")
    assert process.returncode == 143 and "Traceback" not in said, said
    assert "stopped by SIGTERM: nothing was trained yet" in said
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    assert not list(folder.glob("checkpoints/*")) and not (folder / "metrics.csv").exists()
    assert seconds < 20


def test_within_a_step_of_several_batches(compose, quiet, tmp_path, monkeypatch):
    """Two steps an epoch, of two batches and of one. The signal comes after the first batch of the third step: it is
    finished and saved. Killed in the next epoch within a step, the run does that step again. The norm that it clips by
    is estimated by a ratio measured in the third step, before the checkpoint.
    """
    words = (*COMMON, "method=rigl", "method.drop_and_grow.update_every=3", "training.accumulate=2")
    words = (*words, "training.clip_norm=0.05", "training.clip_over=all_estimated")
    whole, left = (compose(*words, f"paths.outputs={tmp_path / name}") for name in ("whole", "left"))
    run(whole, "x", quiet)
    rows = (run_dir(whole).path / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[2] for row in rows] == ["step", "2", "4", "6"]

    def within(self, trainer, module, outputs, batch, batch_idx) -> None:
        if (trainer.global_step, batch_idx) == (2, 0):
            os.kill(os.getpid(), signal.SIGTERM)
        if (trainer.global_step, batch_idx) == (4, 0):
            raise RuntimeError("somebody pulled the plug")

    with monkeypatch.context() as patch:
        patch.setattr(NanGuard, "on_train_batch_end", within)
        with pytest.raises(Stopped, match="stopped by SIGTERM"):
            run(left, "x", quiet)
        check_where_it_goes_on(run_dir(left), Moment(None, "", 0, step=3))
        with pytest.raises(RuntimeError, match="plug"):
            run(left, "x", quiet)
    assert load_checkpoint(run_dir(left).last)["global_step"] == 3
    run(left, "x", quiet)
    files = [load_checkpoint(run_dir(one).last) for one in (whole, left)]
    assert dict(plain(files[0])) == dict(plain(files[1]))
    assert dict(plain(run_dir(whole).result())) == dict(plain(run_dir(left).result()))
