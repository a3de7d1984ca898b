"""What a signal leaves behind, at the moments at which it is easily lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from sparse_lab.training.signals import Stopped, StopRequest, terminable


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


def test_what_came_within_a_step_stops_where_nothing_is_lost_any_more(request_to_stop):
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped):
        request_to_stop.at_once()


def test_a_second_sigterm_lets_the_first_one_save_and_a_second_ctrl_c_does_not_wait(request_to_stop):
    request_to_stop.training = False
    with pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped) as caught:
        os.kill(os.getpid(), signal.SIGINT)
    assert caught.value.status == 130


def test_where_no_run_listens_both_signals_raise():
    with terminable():
        with pytest.raises(Stopped, match="stopped by SIGTERM: start the same command again") as caught:
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught.value.status == 143
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_within_an_import_that_swallows_everything_the_process_ends(number, status, tmp_path):
    (tmp_path / "swallows.py").write_text(
        f"import os, signal\ntry:\n    os.kill(os.getpid(), signal.{number})\nexcept BaseException:\n    pass\n"
    )
    program = (
        "import sys\nfrom sparse_lab.training.signals import terminable\nsys.path.insert(0, sys.argv[1])\n"
        "with terminable():\n    import swallows\nprint('went on')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("sparse-lab: stopped by ") and done.stderr.count("\n") == 1


class Dropped:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)  # where the handler raises, and Python drops what it raised


def compile_one_with_a_signal_in_the_callback() -> None:
    """llvmlite hands the object code of a compiled module to a Python function that it calls from C."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    module = binding.parse_assembly("define i32 @seven() {\n  ret i32 7\n}")
    engine = binding.create_mcjit_compiler(module, binding.Target.from_default_triple().create_target_machine())
    kept = []

    def notify(module: object, code: bytes) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)
        kept.append(code)

    engine.set_object_cache(notify, lambda module: None)
    engine.finalize_object()
    assert len(kept) == 1


@pytest.mark.parametrize("what", [Dropped, compile_one_with_a_signal_in_the_callback])
def test_what_python_or_llvm_would_swallow_stops_a_moment_later(what, request_to_stop, capsys):
    """Neither is the signal lost, nor anything said of it, nor is what LLVM calls cut short."""
    request_to_stop.training = False
    what()
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        time.sleep(10)
    assert capsys.readouterr().err == ""
