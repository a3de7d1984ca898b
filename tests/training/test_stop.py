"""What a signal leaves behind, at the moments at which it is easily lost."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest
import torch

from sparse_lab.training.stop import Stopped, StopRequest


class Processes:
    """A trainer of two processes as `wanted` sees it: `during()` happens while this process waits for the other, which
    was asked to stop by the signal `other` (0: it was not).
    """

    world_size = 2

    def __init__(self) -> None:
        self.strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=self.reduce)
        self.other = 0
        self.during = lambda: None

    def reduce(self, mine: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "max"
        self.during()
        return torch.maximum(mine, torch.tensor(float(self.other)))


@pytest.fixture
def request_to_stop():
    with StopRequest(print) as stop:
        stop.training = True
        yield stop


def test_a_signal_that_comes_while_the_processes_agree_counts_from_the_next_step(request_to_stop):
    """The answer was on its way already: all processes must take it, and the next one must be yes."""
    trainer = Processes()
    trainer.during = lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert not request_to_stop.wanted(trainer)
    trainer.during = lambda: None
    assert request_to_stop.wanted(trainer)
    assert request_to_stop.stopped("saved").status == 143


def test_a_signal_that_another_process_got_stops_this_one_with_the_same_status(request_to_stop):
    trainer = Processes()
    assert not request_to_stop.wanted(trainer)
    trainer.other = signal.SIGINT
    assert request_to_stop.wanted(trainer)
    assert request_to_stop.stopped("saved").status == 130


def test_outside_of_training_it_stops_where_it_is(request_to_stop):
    request_to_stop.training = False
    with pytest.raises(Stopped, match="stopped by SIGTERM") as caught:
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.status == 143
