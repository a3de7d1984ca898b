"""Whether the process that a file speaks of still lives: by its number, its start, and the start of its machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparse_lab.host import process

HERE = socket.gethostname()


def dead() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def test_this_process_lives_and_says_when_it_began() -> None:
    about = process.about()
    assert about["pid"] == os.getpid() and about["host"] == HERE and not process.is_gone(about)
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    assert about["pid_started"] == int(fields[19]) > 0 and len(about["boot"]) == 36
    assert process.is_of_the_living(process.mark()) is True


@pytest.mark.parametrize(
    ("changes", "is_gone"),
    [
        ({"pid_started": 1}, True),  # the number is another process's now
        ({"boot": "another"}, True),  # so is the machine's start
        ({"host": "another", "pid_started": 1, "boot": "another"}, False),  # who knows
        ({"pid_started": None, "boot": None}, False),  # as earlier versions wrote it
        ({"pid_started": 0, "boot": ""}, False),  # where the machine does not say
        ({"pid_started": "soon", "boot": 7}, True),
        ({"pid": None}, True),
        ({"pid": True}, True),
        ({"pid": 0}, True),
        ({"pid": -1}, True),
        ({"pid": 10**30}, True),
        ({"pid": []}, True),
        ({"host": None}, False),
    ],
)
def test_what_is_said_must_belong_together(changes: dict[str, Any], is_gone: bool) -> None:
    assert process.is_gone({**process.about(), **changes}) is is_gone


def test_one_that_has_ended_is_gone_waited_for_or_not() -> None:
    assert process.is_gone({"pid": dead(), "host": HERE})
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    about = {"pid": child.pid, "host": HERE}
    assert not process.is_gone(about)
    assert child.stdin is not None
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    assert process.is_gone(about)
    child.wait()


def test_anothers_process_is_alive_though_it_may_not_be_asked() -> None:
    assert not process.is_gone({"pid": 1, "host": HERE})
