"""A disk that is full by any name, on any file of a run: one line that names the place, and the run goes on later to
the bits of one that never met it. A file system without locks: one line before anything trains.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sparse_lab.errors import UserError
from sparse_lab.experiment.identity import run_dir
from sparse_lab.experiment.runner import run
from sparse_lab.records import run_dir as writers
from sparse_lab.records.sweep_dir import SweepFolder
from sparse_lab.sweep.launch import one_line
from tests.runs.promises import check_same

RIGL = ("method=rigl", "method.drop_and_grow.update_every=1")
CODES = {"ENOSPC": "the disk is full", "EDQUOT": "quota", "EFBIG": "larger than files may be"}


@contextmanager
def full(code: str, name: str, time: int) -> Iterator[None]:
    """Files called `name` cannot be put in place, or be added to, from the `time`-th time on."""
    seen, replace = [], os.replace

    def check(path: object) -> None:
        if Path(str(path)).name == name:
            seen.append(path)
            if len(seen) >= time:
                raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    def replacing(source, target):
        check(target)
        replace(source, target)

    def opening(path, mode="r", **options):
        if mode == "a":
            check(path)
        return open(path, mode, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replacing)
        patch.setattr(writers, "open", opening, raising=False)
        yield


@pytest.mark.every(5)
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(
    ("name", "time", "folder"),
    [
        ("last.ckpt", 2, "checkpoints"),
        ("config.yaml", 1, "."),
        ("status.json", 1, "."),
        ("metrics.csv", 2, "."),
        ("status.json", 3, "."),
        ("updates.jsonl", 2, "."),
        ("best.ckpt", 1, "checkpoints"),
        ("result.json", 1, "."),
    ],
)
def test_whatever_file_meets_it_the_place_is_named_and_nothing_is_lost(
    code, name, time, folder, compose_under, tmp_path, quiet
):
    whole, broken = (compose_under(tmp_path / outputs, *RIGL) for outputs in ("whole", "broken"))
    run(whole, "x", quiet)
    with full(code, name, time), pytest.raises(UserError, match=CODES[code]) as caught:
        run(broken, "x", quiet)
    path = run_dir(broken).path
    assert f"nothing more can be written to {path / folder}; " in str(caught.value)
    assert not list(path.rglob("*.tmp"))
    run(broken, "x", quiet)
    check_same(whole, broken)


@pytest.mark.parametrize("code", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_without_locks_neither_a_run_nor_a_sweep_begins(code, compose, quiet, tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(fcntl, "flock", refuse)
    config = compose(*RIGL)
    with pytest.raises(UserError, match=r"cannot be locked .*paths.outputs=DIR"):
        run(config, "x", quiet)
    assert not (run_dir(config).path / "status.json").exists()
    with (
        pytest.raises(UserError, match=r"cannot be locked .*paths.outputs=DIR"),
        SweepFolder.claim(tmp_path, "sweep"),
    ):
        pytest.fail("it began")


def test_the_traceback_is_only_said_to_be_where_it_is(compose, quiet, plug):
    plug(1)
    config = compose(*RIGL)
    error = run_dir(config).path / "error.txt"
    with pytest.raises(RuntimeError) as caught:
        run(config, "x", quiet)
    assert f"; the whole traceback is in {error})" in one_line(caught.value) and error.is_file()
    error.unlink()
    plug(2)
    with full("ENOSPC", "error.txt", 1), pytest.raises(RuntimeError) as caught:
        run(config, "x", quiet)
    assert "pulled the plug (conftest.py:" in one_line(caught.value)
    assert "traceback" not in one_line(caught.value) and not error.exists()


@pytest.mark.full
@pytest.mark.parametrize("most", [1024, 20_000])
def test_what_files_may_not_become_larger_than_is_said_by_the_command(most, small, tmp_path):
    """The limit is real: torch and the system each tell of it in their own words."""
    done = subprocess.run(
        [sys.executable, "-m", "sparse_lab", *RIGL, *small, f"paths.outputs={tmp_path}"],
        capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    [said] = [line for line in done.stderr.splitlines() if "failed" in line]
    assert f"can be written to {tmp_path}/runs/" in said and "ulimit -f" in said


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_sweep_that_meets_it_goes_on_later(launcher, small, tmp_path):
    """A real file system of 8 MiB, of which little is left."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("file systems can be mounted by root only")
    words = ["-m", *RIGL, "seed=1,2", *small, f"hydra/launcher={launcher}", f"paths.outputs={disk / 'out'}"]

    def start() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "sparse_lab", *words], capture_output=True, text=True)

    try:
        free = os.statvfs(disk)
        (disk / "ballast").write_bytes(b"x" * (free.f_bavail * free.f_frsize - 100_000))
        first = start()
        assert first.returncode == 1 and "Traceback" not in first.stdout + first.stderr, first.stderr
        assert f"the disk is full: nothing more can be written to {disk}" in first.stderr
        (disk / "ballast").unlink()
        assert start().returncode == 0
        assert len([json.loads(path.read_text()) for path in disk.rglob("result.json")]) == 2
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
