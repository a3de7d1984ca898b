"""One dashboard in a thread of its own: whether it is down, slow or broken, training does not notice."""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable, Iterable

from sparse_lab.loggers.base import RunInfo, RunLogger
from sparse_lab.records.redaction import redact

WAITING = 1000  # rows that may wait for a dashboard that does not answer
PATIENCE = 30.0  # seconds that a finished run gives its dashboards to take the rest
PATIENCE_FAILED = 10.0  # a run that was stopped or has failed gives them less: its machine may be about to go


class LoggerThread:
    """Calls `board` from a daemon thread, in order. `say` is called at most once, when it is left out.

    Nothing here waits but `close_all`, and that not for long. A thread that hangs in an SDK is left behind; being a
    daemon it does not keep the process.
    """

    def __init__(self, name: str, board: RunLogger, about: RunInfo, say: Callable[[str], None]) -> None:
        self.name = name
        self.board = board
        self.about = about
        self.say = say
        self._left = False
        self._lock = threading.Lock()
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._serve, name=f"logger={name}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return not self._left

    def send(self, call: Callable[[], None] | None) -> None:
        """Do `call` after everything sent before it; None is the end."""
        if self._left:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self.leave(f"it does not answer, and {WAITING:,} rows wait for it")

    def leave(self, why: str) -> None:
        """From here on the dashboard gets nothing; said once."""
        with self._lock:
            if self._left:
                return
            self._left = True
        self.say(left_out(self.name, why))

    def _serve(self) -> None:
        try:
            self.board.open(self.about)
            while (call := self._calls.get()) is not None and not self._left:
                call()
        except BaseException as error:  # an SDK may raise SystemExit too
            self.leave(reason(error))
        if self._left:
            try:
                self.board.close(failed=True)
            except BaseException:
                pass  # it was said already that this one is left out

    def wait(self, until: float, patience: float) -> None:
        """Give the dashboard until `until` (monotonic seconds) to take what was sent."""
        if self._left:
            return
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self.leave(f"it has not taken everything within {patience:g} s")


def close_all(feeds: Iterable[LoggerThread], failed: bool) -> None:
    """End every dashboard; all together get PATIENCE seconds (PATIENCE_FAILED when the run has failed)."""
    feeds, patience = list(feeds), PATIENCE_FAILED if failed else PATIENCE
    for feed in feeds:
        feed.send(lambda board=feed.board: board.close(failed))  # type: ignore[misc]
        feed.send(None)
    until = time.monotonic() + patience
    for feed in feeds:
        feed.wait(until, patience)


def left_out(name: str, why: str) -> str:
    return f"WARNING: logger={name} is left out from here on: {why}"


def reason(error: BaseException) -> str:
    """One line about `error`, without the password that an address in it may hold, or any other secret."""
    lines = str(error).strip().splitlines()
    first = re.sub(r"://[^/\s@]+@", "://***@", lines[0]) if lines else ""
    return redact(f"{type(error).__name__} {first}".strip())[:300]
