"""A folder's lock, and what killed processes leave beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparse_lab.host import process
from sparse_lab.records.atomic_io import temporary_of
from sparse_lab.records.lock import FORGOTTEN, Held, Lock, remove_left_behind


def test_one_has_it_and_the_other_is_told_who(tmp_path: Path) -> None:
    with Lock(tmp_path / "a") as lock:
        lock.say("process 7 on a\x1b[2J machine")
        with pytest.raises(Held, match="process 7 on a \\[2J machine has it"):
            Lock(tmp_path / "a")
        lock.say("short")
        with pytest.raises(Held) as held:
            Lock(tmp_path / "a")
        assert held.value.holder == "short"
    with Lock(tmp_path / "a") as lock:
        assert lock.in_place


@pytest.mark.parametrize("what", ["pipe", "device", "folder", "loop"])
def test_what_is_no_file_is_no_lock(what: str, tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if what == "device" else path.name)
    with pytest.raises(OSError):
        Lock(tmp_path)


def test_it_sees_that_its_file_is_no_longer_in_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    with Lock(folder) as lock:
        folder.rename(tmp_path / "b")
        assert not lock.in_place
        (tmp_path / "b").rename(folder)
        assert lock.in_place
        shutil.copytree(folder, tmp_path / "c")
        shutil.rmtree(folder)
        assert not lock.in_place
        (tmp_path / "c").rename(folder)
        assert not lock.in_place
        with Lock(folder) as other:
            assert other.in_place and not lock.in_place


PROGRAM = """
import os, sys
from pathlib import Path
from sparse_lab.records.atomic_io import atomic_write
with atomic_write(Path(sys.argv[1])) as path:
    path.write_text("half")
    print(path.name, flush=True)
    sys.stdin.read()
    os.kill(os.getpid(), 9)
"""


def test_a_temporary_file_stays_as_long_as_its_process(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    writer = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "file")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None
    name = writer.stdout.readline().strip()
    remove_left_behind(tmp_path)
    assert (tmp_path / name).read_text() == "half"
    writer.communicate("")
    own = temporary_of(tmp_path / "own")
    own.write_text("being written")
    remove_left_behind(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([own.name, "file"])
    assert (tmp_path / "file").read_text() == "old"


def test_a_temporary_file_of_a_process_that_has_this_number_no_more(tmp_path: Path) -> None:
    machine, pid, started = process.mark().split("-")
    (tmp_path / f".a.{machine}-{pid}-{int(started) - 1}.tmp").touch()
    (tmp_path / f".a.{machine}-{2**22 + 1}-7.tmp").touch()
    remove_left_behind(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [".a.01234567-1-1.tmp", ".a.4711.tmp", ".last.ckpt.tmp"])
def test_whose_process_cannot_be_asked_stays_for_an_hour(name: str, tmp_path: Path) -> None:
    """Of another machine, of an earlier version."""
    path = tmp_path / name
    path.touch()
    remove_left_behind(tmp_path)
    assert path.exists()
    long_ago = time.time() - FORGOTTEN - 60
    os.utime(path, (long_ago, long_ago))
    remove_left_behind(tmp_path)
    assert not path.exists()


def test_what_is_no_temporary_file_stays(tmp_path: Path) -> None:
    for name in ("a.tmp", ".lock", "metrics.csv"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1, 1))
    remove_left_behind(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_names_of_any_length_have_one(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 127)
    temporary_of(path).write_text("x")
    os.replace(temporary_of(path), path)
    assert path.read_text() == "x"
