"""The runs of a table as processes: which may start now, what became of each, and how all of them stop."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from reproduce_table import Run, State

from sparse_lab.errors import SparseLabError
from sparse_lab.records.atomic_io import printable
from sparse_lab.records.redaction import redact

GRACE = 120.0  # seconds for stopped runs to save what they have
LOOK_EVERY = 0.2
PR_SET_PDEATHSIG = 1


@dataclass
class Job:
    """A run that goes on in a process of its own. `making`: every run that this process may write."""

    run: Run
    making: set[str]
    process: subprocess.Popen[bytes]
    log: Path
    said_from: int  # where in the log this start begins
    started: float = field(default_factory=time.monotonic)

    def last_line(self) -> str:
        with open(self.log, "rb") as file:
            file.seek(self.said_from)
            lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines()]
        return printable(redact(next((line for line in reversed(lines) if line), "said nothing")))


@dataclass
class Filling:
    """Runs the plan, several processes at a time, until it is done, its time is up or a signal came."""

    plan: list[Run]
    state: State
    outputs: Path
    jobs: int
    deadline: float | None  # of time.monotonic()
    say: Callable[[str], None]
    failed: dict[str, str] = field(default_factory=dict)  # run -> one line
    stopped_by: int | None = None
    running: list[Job] = field(default_factory=list)
    signals: int = 0  # how many came

    def run(self) -> None:
        with self._signals():
            pending = [run for run in self.plan if run.name not in self.state.done and run.name not in self.failed]
            try:
                while not self._over():
                    self._reap()
                    while len(self.running) < self.jobs and not self._over() and (run := self._next(pending)):
                        pending.remove(run)
                        self._start(run)
                    if not self.running:
                        return
                    time.sleep(LOOK_EVERY)
            finally:
                self._stop()

    def _over(self) -> bool:
        return self.stopped_by is not None or (self.deadline is not None and time.monotonic() >= self.deadline)

    def _next(self, pending: list[Run]) -> Run | None:
        """The first run that nobody makes anything of right now; those made on the way are done."""
        being_made = {name for job in self.running for name in job.making}
        for run in list(pending):
            if run.name in being_made:
                continue
            if (result := self.state.result(run)) is not None:
                pending.remove(run)
                self._tell(run, f"made on the way: {run.name} {result['test_accuracy']:.2f}%")
            elif not being_made.intersection(self.state.needs(run)):
                return run
        return None

    def _start(self, run: Run) -> None:
        log = self.outputs / "logs" / f"{run.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        making = {run.name, *self.state.needs(run)}
        with open(log, "ab") as file:
            begin = file.tell()
            process = subprocess.Popen(
                [sys.executable, "-m", "sparse_lab", *run.command, "hydra.mode=RUN"],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal reaches this process alone, which hands it on
                preexec_fn=_end_with_parent,
                env=self._environment(),
            )
        self.running.append(Job(run, making, process, log, begin))
        self._tell(run, f"started {run.name}")

    def _environment(self) -> dict[str, str]:
        """Processes side by side share the cores."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if self.jobs > 1:
            share = max(1, len(os.sched_getaffinity(0)) // self.jobs)
            environment.setdefault("OMP_NUM_THREADS", str(share))
        return environment

    def _reap(self, stopping: bool = False) -> None:
        for job in [job for job in self.running if job.process.poll() is not None]:
            self.running.remove(job)
            seconds = time.monotonic() - job.started
            result = self.state.result(job.run)
            self.state.keep(job.run)
            if result is not None:
                self._tell(job.run, f"done {result['test_accuracy']:.2f}% in {seconds:.0f} s: {job.run.name}")
            elif stopping:
                self._tell(job.run, f"stopped {job.run.name}: goes on from there next time")
            elif job.process.returncode == 0:  # another process has it
                self._tell(job.run, f"left {job.run.name}: {job.last_line()}")
            else:
                self.failed[job.run.name] = job.last_line()
                self._tell(job.run, f"failed {job.run.name}: {job.last_line()} (log: {job.log})")

    def _stop(self) -> None:
        """Every run saves and stops; those that do not within the grace, or at a second signal, are killed."""
        until, signals = time.monotonic() + GRACE, self.signals
        if self.running:
            why = "time is up" if self.stopped_by is None else f"stopped by {signal.Signals(self.stopped_by).name}"
            for job in self.running:
                job.process.terminate()
            self.say(f"{why}: {len(self.running)} running, saving")
        first: SparseLabError | None = None
        while self.running:
            try:
                self._reap(stopping=True)
            except SparseLabError as error:  # a record cannot be copied: the others are waited for all the same
                first = first or error
            if time.monotonic() > until or self.signals > signals:
                for job in self.running:
                    os.killpg(job.process.pid, signal.SIGKILL)
                    job.process.wait()
            time.sleep(LOOK_EVERY)
        if first is not None:
            raise first

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            self.signals += 1
            self.stopped_by = self.stopped_by or number

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _tell(self, run: Run, line: str) -> None:
        self.say(f"[{run.number}/{len(self.plan)}] {line}")


def _end_with_parent() -> None:
    """In the child: SIGTERM when this process is killed, so that no run goes on unseen."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
