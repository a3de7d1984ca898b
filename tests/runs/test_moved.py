"""A run whose folder is moved, removed or replaced as it goes on stops with one line, and writes to nobody else's."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sparse_lab.callbacks.nan_guard import NanGuard
from sparse_lab.errors import UserError
from sparse_lab.experiment.identity import run_dir
from sparse_lab.experiment.runner import run
from sparse_lab.records.lock import Moved
from sparse_lab.records.run_dir import RunLocked
from sparse_lab.training.checkpoint_io import load_checkpoint
from sparse_lab.training.signals import Stopped

REQUEST = ("method=static", "sparsity.target=0.9", "training.epochs=4", "diagnostics.gradients=true")


def move(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def replace(folder: Path) -> None:
    """As one who copies it and puts the copy in its place."""
    shutil.copytree(folder, folder.with_name("copy"))
    move(folder)
    folder.with_name("copy").rename(folder)


def remove_the_lock(folder: Path) -> None:
    for path in folder.rglob(".lock"):
        path.unlink()


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """at_step(3, what): `what` happens when step 3 is done for the first time."""

    def hang(step: int, what: Callable[[], None]) -> None:
        left = [what]

        def happen(self, trainer, *rest):
            if trainer.global_step == step and left:
                left.pop()()

        monkeypatch.setattr(NanGuard, "on_train_batch_end", happen)

    return hang


@pytest.mark.every(5)
@pytest.mark.parametrize("above", [0, 1, 2], ids=["the run's", "runs", "outputs"])
@pytest.mark.parametrize("how", [move, remove, replace, remove_the_lock])
def test_it_stops_before_its_next_write(how, above, compose, quiet, at_step, tmp_path):
    config = compose(*REQUEST, f"paths.outputs={tmp_path / 'out'}")
    path = run_dir(config).path
    folder = (path, *path.parents)[above]
    left: list[dict[str, tuple[int, int]]] = []

    def happen() -> None:
        how(folder)
        left.append(contents(tmp_path))

    at_step(3, happen)
    with pytest.raises(
        Moved, match=r"was moved, removed or replaced while this run went on: .* start the same command"
    ):
        run(config, "x", quiet)
    assert contents(tmp_path) == left[0]


@pytest.mark.parametrize("step", [1, 8])
def test_where_it_is_noticed_does_not_matter(step, compose, quiet, at_step):
    """Before anything is saved, and after the last step, when the result and the network are to be written."""
    config = compose(*REQUEST)
    folder = run_dir(config).path
    at_step(step, lambda: move(folder))
    with pytest.raises(Moved):
        run(config, "x", quiet)
    assert not folder.exists()


def test_put_back_in_time_nothing_has_happened(compose, quiet, at_step):
    config = compose(*REQUEST)
    folder = run_dir(config).path

    def there_and_back() -> None:
        move(folder)
        folder.with_name("elsewhere").rename(folder)

    at_step(3, there_and_back)
    assert run(config, "x", quiet)["levels"][0]["epochs"] == 4


def test_put_back_later_the_same_command_goes_on(compose, wide_console, at_step, capsys):
    config = compose(*REQUEST)
    folder = run_dir(config).path
    at_step(5, lambda: move(folder))
    with pytest.raises(Moved):
        run(config, "x", wide_console)
    folder.with_name("elsewhere").rename(folder)
    assert load_checkpoint(run_dir(config).last)["global_step"] == 4
    run(config, "x", wide_console)
    assert "goes on from last.ckpt" in capsys.readouterr().out


def test_a_signal_stays_a_signal(compose, quiet, at_step):
    """Of a sweep no other run begins then."""
    config = compose(*REQUEST)
    folder = run_dir(config).path

    def both() -> None:
        move(folder)
        os.kill(os.getpid(), signal.SIGTERM)

    at_step(3, both)
    with pytest.raises(Stopped, match=r"stopped by SIGTERM: .* was moved, removed or replaced") as caught:
        run(config, "x", quiet)
    assert caught.value.status == 143 and not folder.exists()


def test_one_that_waits_takes_the_folder_that_is_there(compose, tmp_path):
    """It waits for the lock of the folder that is moved: the next one there is another's."""
    folder, said = run_dir(compose(*REQUEST)), []
    other = run_dir(compose(*REQUEST))

    def moved_meanwhile(line: str) -> None:
        said.append(line)
        move(folder.path)
        first.close()

    first = folder._taken(print, wait=False)
    with other.claim(moved_meanwhile, wait=True):
        assert other.moved is None and (other.path / ".lock").exists()
        with pytest.raises(RunLocked), run_dir(compose(*REQUEST)).claim(print, wait=False):
            pass
    assert len(said) == 1


@pytest.mark.every(2)
@pytest.mark.parametrize("what", ["pipe", "folder", "loop"])
@pytest.mark.parametrize("name", ["metrics.csv", "status.json", "checkpoints/last.ckpt", ".lock", "result.json"])
def test_what_is_no_file_in_a_files_place_is_one_line(name, what, compose, quiet):
    config = compose(*REQUEST)
    path = run_dir(config).path / name
    path.parent.mkdir(parents=True)
    {"pipe": os.mkfifo, "folder": Path.mkdir, "loop": lambda path: path.symlink_to(path.name)}[what](path)
    with pytest.raises(UserError, match=str(path) if name != ".lock" else "cannot write to"):
        run(config, "x", quiet)


@pytest.mark.full
def test_two_processes_never_share_a_folder(small, tmp_path):
    """The first one's folder is moved, the second one begins in its place: each stays with its own."""
    words = [*small, "method=dense", "training.epochs=400", f"paths.outputs={tmp_path / 'out'}"]
    command = [sys.executable, "-m", "sparse_lab", *words]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def wait(name: str) -> Path:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for found in (tmp_path / "out" / "runs").glob(f"*/{name}"):
                return found.parents[name.count("/")]
            time.sleep(0.01)
        raise AssertionError("waited in vain")

    first = start()
    folder = wait("checkpoints/last.ckpt")
    move(folder)
    second = start()
    said = first.communicate(timeout=60)[0]
    assert first.returncode == 1 and f"{folder} was moved" in said and "Traceback" not in said, said
    while not (folder / "checkpoints" / "last.ckpt").exists():
        assert second.poll() is None
        time.sleep(0.01)
    assert json.loads((folder / "status.json").read_text())["pid"] == second.pid
    second.terminate()
    said = second.communicate(timeout=60)[0]
    assert second.returncode == 143 and "saved at step" in said, said
    assert len((folder / "metrics.csv").read_text().splitlines()) > 1
