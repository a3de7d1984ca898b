"""SIGTERM (preemption), Ctrl-C and SIGHUP (the terminal was closed): what was trained is saved first, then the process
leaves with its own status.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

AGAIN = "start the same command again to go on"


def name_of(number: int) -> str:
    """A signal as a person knows it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def stopping() -> tuple[int, ...]:
    """Return the signals that stop a process here: not SIGHUP where it is ignored, as under nohup."""
    return (
        signal.SIGTERM,
        signal.SIGINT,
        *([] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]),
    )


class Stopped(BaseException):
    """A signal asked the run to stop. `status`: the exit status of the process, 143 for SIGTERM, 130 for Ctrl-C and 129
    for SIGHUP. `line`: what was saved and where it goes on, which may be known only after it was raised.
    """

    def __init__(self, number: int, line: str) -> None:
        super().__init__(number, line)  # both, so that it can be pickled
        self.number = number
        self.line = line

    def __str__(self) -> str:
        return f"stopped by {name_of(self.number)}: {self.line}"

    @property
    def status(self) -> int:
        return 128 + self.number


@contextmanager
def terminable() -> Iterator[None]:
    """Where no run listens to signals, SIGTERM and SIGHUP raise Stopped and Ctrl-C KeyboardInterrupt, so that files and
    processes are left as after any error. While modules are imported the process ends there: numpy's and torch's C code
    swallow what an import of theirs raises, and go on with half a module.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        if _compiling(frame):
            _send_again(number)
            return
        stopped = Stopped(number, AGAIN)
        if _importing(frame):
            with suppress(OSError):  # its terminal may be gone
                os.write(2, f"sparse-lab: {stopped}\n".encode())
            os._exit(stopped.status)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise stopped

    if threading.current_thread() is not threading.main_thread():  # Python allows no handlers there
        yield
        return
    before = {number: signal.signal(number, stop) for number in stopping()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _importing(frame: FrameType | None) -> bool:
    return _within(frame, "<frozen importlib._bootstrap>")


def _compiling(frame: FrameType | None) -> bool:
    """LLVM calls this while it compiles: what is raised there is swallowed, and numba fails on what is missing."""
    return _within(frame, "llvmlite/binding/executionengine.py")


def _within(frame: FrameType | None, file: str) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.endswith(file):
            return True
        frame = frame.f_back
    return False


def _send_again(number: int) -> None:
    """The same signal once more, when what must not be interrupted is over; if it is not, that is seen then."""
    later = threading.Timer(0.05, os.kill, (os.getpid(), number))
    later.daemon = True
    later.start()


class StopRequest:
    """Listens to SIGTERM, Ctrl-C and SIGHUP while a run goes on.

    Where nothing is lost by it, `Stopped` is raised where the signal came, in the middle of whatever is computed there.
    While `training`, in a step, the signal is noted, and the training loop asks `wanted` after each step; a second
    Ctrl-C does not wait for that. Once the run is on its way out, another SIGTERM or SIGHUP changes nothing: whoever
    stops a whole group of processes sends more than one, and what is being saved is saved.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.number: int | None = None
        self.training = False
        self.line = AGAIN  # said where nobody knows more
        self._before: dict[int, Any] = {}
        self._unraisable = sys.unraisablehook

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = {number: signal.getsignal(number) for number in stopping()}
            self._unraisable, sys.unraisablehook = sys.unraisablehook, self._swallowed
            self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            sys.unraisablehook = self._unraisable
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """Take the signals (again: Lightning puts a handler of its own in place when a fit starts)."""
        for number in self._before:
            signal.signal(number, self._note)

    def _swallowed(self, what: Any) -> None:
        """Python drops what is raised in `__del__` and in callbacks from C: the signal is sent once more."""
        if not isinstance(what.exc_value, Stopped):
            self._unraisable(what)
            return
        self.number = None
        _send_again(what.exc_value.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if _compiling(frame):
            _send_again(number)
            return
        again = self.number is not None
        if again and number != signal.SIGINT:
            return
        self.number = number
        if again or not self.training:
            raise self.stopped(self.line)
        if number == signal.SIGINT:
            self.say("stopping: saving after this step; Ctrl-C again does not wait for that")

    def at_once(self) -> None:
        """From here on a signal stops the run where it comes. Raises Stopped for one that has come already."""
        self.training = False
        if self.number is not None:
            raise self.stopped(self.line)

    def stopped(self, line: str) -> Stopped:
        assert self.number is not None
        return Stopped(self.number, line)

    def wanted(self, trainer: Any) -> bool:
        """Has any process of the run been asked to stop? All of them agree on the answer."""
        if trainer.world_size == 1:
            return self.number is not None
        import torch  # the command listens before anything heavy is imported

        asked = torch.tensor(float(self.number or 0), device=trainer.strategy.root_device)
        number = int(trainer.strategy.reduce(asked, reduce_op="max"))
        if number:  # else a signal may have come while the others were waited for: the next answer has it
            self.number = number
        return number != 0
