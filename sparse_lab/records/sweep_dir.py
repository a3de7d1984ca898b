"""A sweep on disk, under OUTPUTS/sweeps/ID: what was planned, what each job does, what came of it. No torch, no Hydra.

plan.json is written before anything runs. Every job, wherever it runs, writes running-NNN.json when it begins and
NNN.json when it has ended, so the summary, the exit status and `sparse-lab status` are the same for every launcher.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparse_lab.errors import UserError
from sparse_lab.file_lock import lock as take
from sparse_lab.full_disk import unwritable
from sparse_lab.records.atomic_io import write_record
from sparse_lab.records.record import BadRecord, read_record, read_result

ENDED = ("done", "skipped", "failed", "stopped")
PLAN_KEYS = {"command", "started", "pid", "host", "jobs", "launcher", "runs"}


@dataclass(frozen=True)
class Job:
    """One job of a sweep. `state`: waiting, running, interrupted (its process is gone), or what came of it.

    `share`: how much of it is done, 0..1. `here`: has it taken time in this start of the sweep? `swept`: the overrides
    that were its own. `value`: validation accuracy in percent.
    """

    number: int
    run: str
    state: str
    said: str = ""
    share: float = 0.0
    here: bool = False
    swept: tuple[str, ...] = ()
    value: float | None = None


@dataclass(frozen=True)
class Overview:
    """Where a sweep stands. `alive`: does the command that started it still run (as far as this machine can know)?"""

    folder: Path
    plan: dict[str, Any]
    jobs: list[Job] = field(default_factory=list)
    alive: bool = False

    @property
    def counts(self) -> Counter[str]:
        return Counter(job.state for job in self.jobs)

    @property
    def left(self) -> int:
        return sum(job.state not in ENDED for job in self.jobs)

    def seconds_left(self) -> float | None:
        """From the time since the start and what was finished in it; None before anything was."""
        finished = sum(job.share for job in self.jobs if job.here)
        if not self.alive or finished <= 0:
            return None
        to_do = sum(1.0 - job.share for job in self.jobs if job.state not in ENDED)
        return elapsed(str(self.plan["started"])) * to_do / finished

    def line(self) -> str:
        """3 of 12 runs done, 1 failed, 2 running, 6 waiting, about 4 min left."""
        counts = self.counts
        done = sum(counts[state] for state in ("done", "skipped"))
        parts = [f"{done} of {len(self.jobs)} runs done"]
        parts += [
            f"{counts[state]} {state}"
            for state in ("failed", "stopped", "interrupted", "running", "waiting")
            if counts[state]
        ]
        seconds = self.seconds_left()
        parts += [f"about {duration(seconds)} left"] if seconds else []
        return ", ".join(parts)


class SweepFolder:
    """One sweep's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs = path.parent.parent / "runs"
        self._over = False  # as this process knows
        self._results: dict[str, bool] = {}

    @classmethod
    @contextmanager
    def claim(cls, outputs: Path, name: str) -> Iterator[SweepFolder]:
        """An empty folder for this start; where the same sweep is still going on, one beside that one's.

        The lock goes when its holder dies. Raises UserError when the folder cannot be written, or not locked.
        """
        for number in range(1, 1000):
            folder = outputs / "sweeps" / (name if number == 1 else f"{name}-{number}")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock = open(folder / ".lock", "a")  # noqa: SIM115 - held open as long as the claim
            except OSError as error:
                raise unwritable(folder, error) from None
            with lock:
                try:
                    take(lock, wait=False)
                except BlockingIOError:
                    continue
                for old in [*folder.glob("*.json"), folder / "stop", folder / "error.txt"]:
                    old.unlink(missing_ok=True)
                yield cls(folder)
                return
        raise AssertionError("a thousand starts of one sweep at a time")

    def write_plan(self, plan: dict[str, Any]) -> None:
        """Raises UserError when it cannot be written."""
        try:
            write_record(self.path / "plan.json", plan)
        except OSError as error:
            raise unwritable(self.path, error) from None

    def planned_names(self) -> list[str]:
        """The runs that the plan names, in the order of its jobs."""
        return [str(run["name"]) for run in (read(self.path / "plan.json") or {}).get("runs", [])]

    def end(self, plan: dict[str, Any]) -> None:
        """Every job has ended, or never will in this start. A disk that is full by now loses nothing by it: that the
        process is gone says the same.
        """
        self._over = True
        with suppress(UserError):
            self.write_plan({**plan, "ended": now()})

    def begin(self, number: int, run: str) -> None:
        """Job `number` (from 0) begins in this process."""
        about = {"run": run, "pid": os.getpid(), "host": socket.gethostname()}
        write_record(self.path / f"running-{number:03d}.json", about)

    def outcome(self, number: int, outcome: dict[str, Any]) -> None:
        """What came of a job: {"run", "outcome", "said"} and what else is known of it."""
        write_record(self.path / f"{number:03d}.json", outcome)
        (self.path / f"running-{number:03d}.json").unlink(missing_ok=True)

    def ask_to_stop(self) -> None:
        """No job begins after this one."""
        (self.path / "stop").touch()

    @property
    def asked_to_stop(self) -> bool:
        return (self.path / "stop").exists()

    def running(self) -> list[tuple[int, str]]:
        """(process, host) of the jobs that say that they run."""
        found = [read(path) or {} for path in self.path.glob("running-*.json")]
        return [(int(one["pid"]), str(one["host"])) for one in found if one.keys() >= {"pid", "host"}]

    def look(self) -> Overview | None:
        """Where the sweep stands now; None without a plan that can be read."""
        plan = read(self.path / "plan.json")
        if plan is None or not plan.keys() >= PLAN_KEYS:
            return None
        if self._over:
            plan.setdefault("ended", now())
        alive = "ended" not in plan and not gone(plan)
        files = set(os.listdir(self.path))
        planned = plan["runs"]
        jobs = []
        for number in range(int(plan["jobs"])):
            name = str(planned[number]["name"]) if number < len(planned) else ""
            jobs.append(self._job(number, name, files, plan))
        return Overview(self.path, plan, jobs, alive)

    def _job(self, number: int, name: str, files: set[str], plan: dict[str, Any]) -> Job:
        if f"{number:03d}.json" in files and (ended := read(self.path / f"{number:03d}.json")) is not None:
            return self._ended(number, ended, plan)
        begun = read(self.path / f"running-{number:03d}.json") if f"running-{number:03d}.json" in files else None
        name = name if begun is None else str(begun.get("run", name))
        if name and self.has_result(name):
            return Job(number, name, "done", "done already" if begun is None else "", 1.0, here=begun is not None)
        if begun is None:
            return Job(number, name, "waiting")
        status = read(self.runs / name / "status.json", sealed=False) or {}
        where = f"process {begun.get('pid')} on {begun.get('host')}"
        if gone(begun) or "ended" in plan:
            return Job(number, name, "interrupted", f"{where} is gone: start the same command again")
        epoch, epochs = status.get("epoch"), status.get("epochs")
        sound = isinstance(epoch, int) and isinstance(epochs, int) and epochs > 0 and status.get("state") == "running"
        return Job(number, name, "running", where, min(1.0, epoch / epochs) if sound else 0.0, here=True)  # type: ignore[operator]

    def _ended(self, number: int, ended: dict[str, Any], plan: dict[str, Any]) -> Job:
        name, state, said = str(ended.get("run", "")), str(ended.get("outcome")), str(ended.get("said", ""))
        if ended.get("elsewhere") and "ended" in plan and self.has_result(name):
            said = f"{said}; done by now"
        value = ended.get("value")
        return Job(
            number,
            name,
            state if state in ENDED else "failed",
            said,
            1.0,
            here=state in ("done", "failed"),
            swept=tuple(str(one) for one in ended.get("swept", ())),
            value=float(value) if isinstance(value, (int, float)) else None,
        )

    def has_result(self, name: str) -> bool:
        """Asked again only where there was none: a result stays."""
        if not self._results.get(name):
            self._results[name] = _is_result(self.runs / name / "result.json")
        return self._results[name]


def read(path: Path, *, sealed: bool = True) -> dict[str, Any] | None:
    """A record that can be trusted, or None. sealed: it must have a checksum."""
    try:
        return read_record(path, sealed=sealed, shown=True)
    except (FileNotFoundError, BadRecord):
        return None


def _is_result(path: Path) -> bool:
    try:
        read_result(path)
    except (FileNotFoundError, BadRecord):
        return False
    return True


def gone(about: dict[str, Any]) -> bool:
    """Is the process {"pid", "host"} known to be gone? One on another machine is taken at its word."""
    if about.get("host") != socket.gethostname() or not isinstance(about.get("pid"), int):
        return False
    try:
        os.kill(about["pid"], 0)
        # a process that nobody has waited for yet is dead all the same
        stat = Path(f"/proc/{about['pid']}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"
    except PermissionError:
        return False
    except (ProcessLookupError, FileNotFoundError, OverflowError):
        return True


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def elapsed(since: str) -> float:
    """Seconds since an ISO time."""
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(since)).total_seconds())


def duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(1.0, seconds):.0f} s"
