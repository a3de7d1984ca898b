"""What a run's folder says of who makes it, and what it keeps of those that were killed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sparse_lab.errors import UserError
from sparse_lab.host import process
from sparse_lab.records.run_dir import RunDir

DEAD = f"{process.mark().split('-')[0]}-{2**22 + 1}-7"


def test_its_status_says_which_process_that_was(tmp_path: Path) -> None:
    folder = RunDir(tmp_path / "run", {"seed": 1})
    with folder.claim(print, wait=False):
        folder.begin()
        status = json.loads((folder.path / "status.json").read_text())
        assert process.about().items() <= status.items() and not process.is_gone(status)
        folder.progress(1, 2)
        folder.interrupt("stopped")
    assert process.about().items() <= json.loads((folder.path / "status.json").read_text()).items()


def test_what_killed_processes_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    folder = RunDir(tmp_path / "run", {})
    checkpoints = folder.path / "checkpoints"
    checkpoints.mkdir(parents=True)
    for place in (folder.path, checkpoints):
        (place / f".left.{DEAD}.tmp").touch()
        (place / f".written.{process.mark()}.tmp").touch()
        (place / "kept.tmp").touch()
    with folder.claim(print, wait=False):
        for place in (folder.path, checkpoints):
            names = sorted(path.name for path in place.glob("*.tmp")) + sorted(p.name for p in place.glob(".*.tmp"))
            assert set(names) == {f".written.{process.mark()}.tmp", "kept.tmp"}


def test_torn_and_foreign_lines_are_cut(tmp_path: Path) -> None:
    folder = RunDir(tmp_path / "run", {})
    with folder.claim(print, wait=False):
        folder.begin()
        for epoch in range(4):
            folder.add_line("updates", {"epoch": epoch})
            folder.add_metrics({"epoch": epoch})
        for torn in (b'{"epo', b"[]", b"7", b"{}", b"\xff\xfe", b"[" * 100_000):
            with open(folder.path / "updates.jsonl", "ab") as file:
                file.write(torn + b"\n")
            folder.cut_lines("updates", lambda _, row: row["epoch"] <= 9)
            assert len((folder.path / "updates.jsonl").read_text().splitlines()) == 4
        with open(folder.path / "metrics.csv", "ab") as file:
            file.write(b"\xff\xfe\n")
        folder.cut_metrics(2)
        assert (folder.path / "metrics.csv").read_text() == "epoch\n0\n1\n"


@pytest.mark.parametrize("name", ["metrics.csv", "updates.jsonl", "checkpoints/last.ckpt", "status.json", "error.txt"])
def test_a_pipe_in_a_files_place_is_one_line_before_it_begins(name: str, tmp_path: Path) -> None:
    folder = RunDir(tmp_path / "run", {})
    (folder.path / "checkpoints").mkdir(parents=True)
    os.mkfifo(folder.path / name)
    with folder.claim(print, wait=False), pytest.raises(UserError, match=f"{name}: it is a pipe.*remove it"):
        folder.begin()


def test_other_files_there_are_nobodys_business(tmp_path: Path) -> None:
    folder = RunDir(tmp_path / "run", {})
    folder.path.mkdir()
    os.mkfifo(folder.path / "mine")
    (folder.path / "notes").mkdir()
    (folder.path / "metrics.csv").symlink_to("nowhere")
    with folder.claim(print, wait=False):
        folder.begin()
