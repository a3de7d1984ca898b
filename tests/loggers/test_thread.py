"""A dashboard that hangs, fails or is slow hurts nobody: it is left out, and that is said once."""

from __future__ import annotations

import threading
import time

import pytest

from sparse_lab.loggers import LoggerThread, RunInfo, close_all, thread
from sparse_lab.loggers.thread import reason

ABOUT = RunInfo("run", "0123456789", "group", "project", {}, None, None)  # type: ignore[arg-type]


class Book:
    """Writes down what it is told; `at` names the method that does `what`."""

    def __init__(self, at: str = "", what=lambda: None) -> None:
        self.at, self.what = at, what
        self.told: list = []

    def _do(self, name: str, *args) -> None:
        if name == self.at:
            self.what()
        self.told.append((name, *args))

    def open(self, about):
        self._do("open", about)

    def log(self, row, step):
        self._do("log", step)

    def close(self, failed):
        self._do("close", failed)


def start(board, said):
    one = LoggerThread("fake", board, ABOUT, said.append)
    for step in range(5):
        one.send(lambda step=step: board.log({}, step))
    return one


@pytest.mark.parametrize("failed", [False, True])
def test_everything_arrives_in_order(failed):
    board, said = Book(), []
    close_all([start(board, said)], failed)
    assert board.told == [("open", ABOUT), *(("log", step) for step in range(5)), ("close", failed)]
    assert not said


@pytest.mark.parametrize("at", ["open", "log", "close"])
@pytest.mark.parametrize("error", [ConnectionError("it is down\nmore"), SystemExit(3)])
def test_one_that_fails_is_left_out_and_closed_as_failed(at, error):
    def fail():
        raise error

    board, said = Book(at, fail), []
    close_all([start(board, said)], False)
    assert len(said) == 1 and said[0].startswith("WARNING: logger=fake is left out from here on: ")
    assert type(error).__name__ in said[0] and "more" not in said[0]
    assert ("log", 1) not in board.told if at != "close" else ("log", 4) in board.told


@pytest.mark.parametrize("at", ["open", "log", "close"])
def test_one_that_hangs_is_given_up_and_the_others_are_not(at, monkeypatch):
    monkeypatch.setattr(thread, "PATIENCE", 0.3)
    released = threading.Event()
    hanging, sound, said = Book(at, released.wait), Book(), []
    feeds = [start(hanging, said), start(sound, said)]
    close_all(feeds, False)
    assert not released.is_set(), "training went on while the dashboard hung"
    assert [line.split(" is")[0] for line in said] == ["WARNING: logger=fake"] and "0.3 s" in said[0]
    assert sound.told[-1] == ("close", False)
    released.set()
    feeds[0]._thread.join(5)
    assert hanging.told[-1] == ("close", True) and len(said) == 1, "it wakes up: closed as failed, nothing said again"


def test_rows_that_wait_are_bounded(monkeypatch):
    monkeypatch.setattr(thread, "WAITING", 20)
    released = threading.Event()
    said: list[str] = []
    board = Book("open", released.wait)
    one = LoggerThread("fake", board, ABOUT, said.append)
    for step in range(100):
        one.send(lambda step=step: board.log({}, step))
    assert len(said) == 1 and "20 rows" in said[0] and not one.alive
    began = time.monotonic()
    close_all([one], False)
    assert time.monotonic() - began < thread.PATIENCE / 2, "one that is left out is not waited for"
    released.set()


def test_no_secret_is_said(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 3)
    line = reason(ConnectionError("http://me:tiger@host:5000/api refused the key " + "0123456789abcdef" * 3))
    assert "tiger" not in line and "0123456789" not in line and "host:5000" in line
