"""Real processes, really killed: what they leave in the end must be what an undisturbed run leaves, to the bit.

`make test-all` kills two runs three times, `make test-nightly` all of `REQUESTS` seven times;
`pytest -m "full or nightly" tests/runs/test_kill.py -s` prints every kill. Moments are drawn by a seeded generator;
some are aimed at what is hardest: while a checkpoint is written, right after one, and between a mask update and the
next save.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_lab.training.checkpoint_io import load_checkpoint

# long enough to be hit
SIZE = ("dataset.train_limit=128", "dataset.eval_limit=100", "training.batch_size=64")
LENGTH = ("training.epochs=24", "training.finetune.epochs=24", "training.regrow.epochs=24")
MIXED = ("sparsity.target=0.9", "method.regrow.budget=0.03", "schedule.iterative.share=0.6")
REQUESTS = {
    "dense": ("method=dense", "training.epochs=30"),
    "iterative_regrow": ("method=iterative_regrow", *LENGTH, *MIXED),
    "rigl": ("method=rigl", "method.drop_and_grow.update_every=2", "training.epochs=30", *MIXED),
    "east": (
        "method=east",
        "model=resnet34",
        "method.drop_and_grow.update_every=2",
        "method.cycles.every=1",
        "method.cycles.lengths=[0.3,0.3]",
        "training.epochs=10",
        *MIXED,
    ),
    "hrank": (
        "method=hrank",
        "schedule=layerwise",
        "schedule.layerwise.round_epochs=3",
        f"method.filters.rates=[{','.join(['0.5'] * 13)}]",
        "sparsity.target=0.74815148",  # 1 - 14578 / 57884, what is left of half of each layer's filters
        "training.epochs=24",
        "training.finetune.epochs=39",
    ),
    "oneshot_regrow": ("method=oneshot_regrow", *LENGTH, *MIXED),
    "patience": ("method=dense", "training.epochs=200", "training.patience=24"),
    "checkpoint_every": (
        "method=rigl",
        "method.drop_and_grow.update_every=2",
        "trainer.checkpoint_every=3",
        "training.epochs=40",
        *MIXED,
    ),
    "east_bf16": (
        "method=east",
        "model=resnet34",
        "method.drop_and_grow.update_every=2",
        "method.cycles.every=1",
        "method.cycles.lengths=[0.3,0.3]",
        "trainer.precision=bf16-mixed",
        "training.epochs=8",
        *MIXED,
    ),
    "sparse_clipped": (
        "method=rigl",
        "method.drop_and_grow.update_every=2",
        "compute=sparse",
        "training.clip_norm=0.5",
        "training.epochs=40",
        *MIXED,
    ),
}
# what no two runs share: time, memory, and the folder that the command names
OWN = {"seconds", "peak_memory_mb", "command", "checksum"}


@pytest.fixture
def lab(small, tmp_path):
    return Lab(small, tmp_path)


class Lab:
    """Starts the command as a user does, in a process of its own."""

    def __init__(self, small: tuple[str, ...], folder: Path) -> None:
        self.small = small
        self.folder = folder

    def start(self, request: tuple[str, ...], outputs: str, *more: str) -> subprocess.Popen[str]:
        words = [*self.small, *SIZE, *request, f"paths.outputs={self.folder / outputs}", *more]
        return subprocess.Popen(
            [sys.executable, "-m", "sparse_lab", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
        )

    def finish(self, request: tuple[str, ...], outputs: str, *more: str) -> float:
        """Runs to the end; returns how many seconds passed after the first run had begun to train."""
        process = self.start(request, outputs, *more)
        begun = wait_for_training(process)
        rest = process.communicate(timeout=300)[0]
        assert process.returncode == 0, rest
        return 0.0 if begun is None else time.monotonic() - begun

    def runs(self, outputs: str) -> dict[str, Path]:
        return {path.name: path for path in sorted((self.folder / outputs / "runs").iterdir())}


def wait_for_training(process: subprocess.Popen[str]) -> float | None:
    """The moment at which the process says that a run has started or goes on; None if all was done already."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if ": started" in line or "goes on from" in line:
            return time.monotonic()
        if "done already" in line and "needed first" not in line:
            return None
    pytest.fail("it ended without training:\n" + "".join(seen))


Aim = Callable[[Path, float, random.Random], None]


def at_random(runs: Path, seconds: float, chance: random.Random) -> None:
    time.sleep(chance.uniform(0.0, seconds))


def while_saving(runs: Path, seconds: float, chance: random.Random) -> None:
    until(lambda: any(runs.glob("*/checkpoints/.last.ckpt.*.tmp")), seconds)


def after_a_save(runs: Path, seconds: float, chance: random.Random) -> None:
    """The next round's pruning comes right after the save that ended the one before."""
    before = stamps(runs, "checkpoints/last.ckpt")
    until(lambda: stamps(runs, "checkpoints/last.ckpt") != before, seconds)
    time.sleep(chance.uniform(0.0, 0.05))


def after_a_mask_update(runs: Path, seconds: float, chance: random.Random) -> None:
    before = stamps(runs, "updates.jsonl")
    until(lambda: stamps(runs, "updates.jsonl") != before, seconds)


def stamps(runs: Path, name: str) -> list[tuple[str, int]]:
    found = []
    for path in runs.glob(f"*/{name}"):
        try:
            found.append((str(path), path.stat().st_mtime_ns))
        except FileNotFoundError:
            continue
    return sorted(found)


def until(happened: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not happened():
        time.sleep(0.0005)


AIMS: list[Aim] = [
    at_random,
    while_saving,
    after_a_save,
    after_a_mask_update,
    at_random,
    while_saving,
    after_a_save,
]


@pytest.mark.nightly(long=True)
@pytest.mark.parametrize("method", REQUESTS)
def test_killed_again_and_again_it_ends_with_the_same_bits(method, lab, capsys):
    check_killed(method, AIMS, 5, lab, capsys)


@pytest.mark.full
@pytest.mark.parametrize("method", ["rigl", "sparse_clipped"])
def test_killed_three_times_it_ends_with_the_same_bits(method, lab, capsys):
    check_killed(method, [while_saving, after_a_save, after_a_mask_update], 2, lab, capsys)


def check_killed(method: str, aims: list[Aim], least: int, lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed at each of the aims, at the `least` so often; one kill may come too late, when all is done."""
    request, chance = REQUESTS[method], random.Random(f"kill {method}")
    seconds = lab.finish(request, "whole")
    runs, epochs = lab.folder / "killed" / "runs", rows(lab.folder / "whole" / "runs")
    kills: list[str] = []
    for number, aim in enumerate(aims):
        process = lab.start(request, "killed")
        if wait_for_training(process) is None:  # the kill before came after the result was written
            process.communicate()
            break
        # the kills are spread over the whole way, through all the runs that one starts from
        until(lambda: rows(runs) >= epochs * number / len(aims) or process.poll() is not None, 120)  # noqa: B023
        aim(runs, seconds / len(aims) / 2, chance)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == -signal.SIGKILL:
            kills.append(f"{aim.__name__}, {where(runs)}")
    lab.finish(request, "killed")
    with capsys.disabled():
        print(f"\n{method}: undisturbed {seconds:.1f} s; {len(kills)} kills: {'; '.join(kills)}", flush=True)
    assert len(kills) >= least
    compare(lab.runs("whole"), lab.runs("killed"))


def rows(runs: Path) -> int:
    """Epochs on record in all runs together."""
    return sum(max(0, lines(path) - 1) for path in runs.glob("*/metrics.csv"))


def where(runs: Path) -> str:
    """How far the run that was killed had come: its method and the last epoch on record."""
    newest = max(runs.iterdir(), key=lambda run: run.stat().st_mtime)
    path = newest / "metrics.csv"
    return f"{newest.name.split('-')[2]} after epoch {lines(path) - 1 if path.exists() else 0}"


def compare(whole: dict[str, Path], killed: dict[str, Path]) -> None:
    assert whole.keys() == killed.keys()
    for name, path in whole.items():
        for file in ("checkpoints/last.ckpt", "checkpoints/best.ckpt"):
            first, second = (dict(plain(load_checkpoint(run / file))) for run in (path, killed[name]))
            assert first == second, f"{name}/{file}"
        for file in ("metrics.csv", "updates.jsonl"):
            assert (path / file).exists() == (killed[name] / file).exists()
            assert not (path / file).exists() or (path / file).read_bytes() == (killed[name] / file).read_bytes()
        first, second = (dict(plain(json.loads((run / "result.json").read_text()))) for run in (path, killed[name]))
        assert first == second, name
        assert not list(killed[name].glob("**/*.damaged")), "a kill leaves no damaged file"


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


@pytest.mark.full
def test_sigterm_saves_within_the_epoch_and_leaves_with_its_own_status(lab, tmp_path):
    """An epoch of 256 steps: without saving at once, all of them would be lost."""
    request = (
        "method=rigl",
        "method.drop_and_grow.update_every=5",
        "training.batch_size=2",
        "dataset.train_limit=512",
        *MIXED,
    )
    lab.finish(request, "whole")
    process = lab.start(request, "stopped")
    wait_for_training(process)
    (folder,) = lab.runs("stopped").values()
    until(lambda: (folder / "updates.jsonl").exists() and lines(folder / "updates.jsonl") >= 3, 60)
    process.terminate()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 143, said
    assert "stopped by SIGTERM: saved at step" in said and "Traceback" not in said
    status = json.loads((folder / "status.json").read_text())
    step = load_checkpoint(folder / "checkpoints/last.ckpt")["global_step"]
    assert status["state"] == "interrupted" and f"saved at step {step};" in status["error"]
    assert 10 <= step < 256
    lab.finish(request, "stopped")
    compare(lab.runs("whole"), lab.runs("stopped"))


def lines(path: Path) -> int:
    return path.read_text().count("\n")


@pytest.mark.full
def test_of_two_processes_one_runs_and_the_other_leaves(lab):
    request = ("method=dense", "training.epochs=5000")
    first = lab.start(request, "shared")
    wait_for_training(first)
    second = lab.start(request, "shared")
    said = second.communicate(timeout=120)[0]
    assert second.returncode == 0 and f"process {first.pid} on" in said and "runs it already" in said, said
    assert first.poll() is None, "the second should have left while the first was still at work"
    first.terminate()
    first.communicate(timeout=120)
    assert first.returncode == 143


@pytest.mark.full
def test_a_full_disk_is_one_line_and_earlier_files_stay_whole(lab, tmp_path):
    """A real file system of 5 MiB: the first checkpoints fit, a later one does not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems can be mounted by root only")
    try:
        process = lab.start(("method=dense", "training.epochs=200"), "disk")
        wait_for_training(process)
        (folder,) = lab.runs("disk").values()
        until(lambda: (folder / "checkpoints" / "previous.ckpt").exists(), 60)
        free = os.statvfs(disk)
        (disk / "ballast").write_bytes(b"x" * max(0, free.f_bavail * free.f_frsize - 8192))
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 1 and "the disk is full" in said and "Traceback" not in said, said
        assert not list(folder.rglob("*.tmp"))
        step = load_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"]
        (disk / "ballast").unlink()
        again = lab.start(("method=dense", "training.epochs=200"), "disk")
        wait_for_training(again)
        again.terminate()
        again.communicate(timeout=60)
        assert load_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] >= step > 0
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.nightly(long=True)
def test_two_processes_of_one_run_stop_together_and_go_on_to_the_same_bits(lab):
    """The signal reaches the first process only; both must leave after the same step."""
    request = (
        "method=rigl",
        "method.drop_and_grow.update_every=5",
        "training.batch_size=4",
        "dataset.train_limit=512",
        *MIXED,
    )
    two = (*request, "trainer.devices=2")  # an epoch of 64 steps in each
    lab.finish(two, "whole")
    process = lab.start(two, "stopped")
    wait_for_training(process)
    (folder,) = lab.runs("stopped").values()
    until(lambda: (folder / "updates.jsonl").exists() and lines(folder / "updates.jsonl") >= 3, 60)
    process.terminate()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "Traceback" not in said, said
    assert 10 <= load_checkpoint(folder / "checkpoints/last.ckpt")["global_step"] < 64, "not within the first epoch"
    lab.finish(two, "stopped")
    compare(lab.runs("whole"), lab.runs("stopped"))


@pytest.mark.nightly(long=True)
def test_where_one_of_two_processes_is_killed_the_other_ends_too_and_the_run_goes_on_to_the_same_bits(lab):
    two = ("method=rigl", "method.drop_and_grow.update_every=5", "training.epochs=40", "trainer.devices=2", *MIXED)
    lab.finish(two, "whole")
    runs = lab.folder / "killed" / "runs"
    for epochs in (5, 20):
        process = lab.start(two, "killed")
        wait_for_training(process)
        until(lambda: rows(runs) >= epochs, 120)  # noqa: B023
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        [second] = [int(one) for one in children if b"sparse_lab" in Path(f"/proc/{one}/cmdline").read_bytes()]
        os.kill(second, signal.SIGKILL)
        said = process.communicate(timeout=120)[0]
        assert process.returncode != 0 and "sparse-lab: failed" in said, said
    lab.finish(two, "killed")
    compare(lab.runs("whole"), lab.runs("killed"))
