"""A sweep on disk, under OUTPUTS/sweeps/ID: what was planned, what each job does, what came of it. No torch, no Hydra.

plan.json is written before anything runs. Every job, wherever it runs, writes running-NNN.json when it begins and
NNN.json when it has ended, so the summary, the exit status and `sparse-lab status` are the same for every launcher.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparse_lab.errors import UserError
from sparse_lab.host import process
from sparse_lab.host.full_disk import unwritable
from sparse_lab.records.atomic_io import write_record
from sparse_lab.records.lock import FILE as LOCK
from sparse_lab.records.lock import Held, Lock, Moved, remove_left_behind
from sparse_lab.records.record import (
    MOST_SMALL,
    BadRecord,
    is_name,
    is_number,
    read_record,
    read_result,
    read_status,
    whole_number,
)

ENDED = ("done", "skipped", "failed", "stopped")
MOST_JOBS = 100_000  # of a sweep


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
    """One sweep's folder. lock: the number of the lock file that its command holds, for those who write here."""

    def __init__(self, path: Path, lock: int | None = None) -> None:
        self.path = path
        self.lock = lock
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
            path = outputs / "sweeps" / (name if number == 1 else f"{name}-{number}")
            try:
                lock = Lock(path)
            except Held:
                continue
            except OSError as error:
                raise unwritable(path, error) from None
            with lock:
                folder = cls(path, lock.identity)
                folder._clear()
                yield folder
                return
        raise AssertionError("a thousand starts of one sweep at a time")

    def _clear(self) -> None:
        """Remove what an earlier start left."""
        remove_left_behind(self.path)
        for old in [*self.path.glob("*.json"), self.path / "stop", self.path / "error.txt"]:
            try:
                old.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"{old} cannot be removed: {error.strerror}: remove it yourself") from None

    @property
    def moved(self) -> Moved | None:
        """What is to be said where the sweep's folder is no longer the one that its command has locked."""
        try:
            if self.lock is None or os.stat(self.path / LOCK).st_ino == self.lock:
                return None
        except OSError:
            pass
        return Moved(
            f"{self.path} was moved, removed or replaced while this sweep went on: no more of its runs begin; "
            "start the same command again to go on"
        )

    def check_in_place(self) -> None:
        """Raise Moved as `moved` says."""
        if (moved := self.moved) is not None:
            raise moved

    def _write(self, name: str, record: dict[str, Any]) -> None:
        self.check_in_place()
        write_record(self.path / name, record)

    def write_plan(self, plan: dict[str, Any]) -> None:
        """Raises UserError when it cannot be written, Moved as `check_in_place`."""
        try:
            self._write("plan.json", plan)
        except OSError as error:
            raise unwritable(self.path, error) from None

    def planned_names(self) -> list[str]:
        """The runs that the plan names, in the order of its jobs."""
        plan = sound(read_plan, self.path / "plan.json", [])
        return [] if plan is None else [run["name"] for run in plan["runs"]]

    def end(self, plan: dict[str, Any]) -> None:
        """Every job has ended, or never will in this start. A disk that is full by now loses nothing by it: that the
        process is gone says the same.
        """
        self._over = True
        with suppress(UserError):
            self.write_plan({**plan, "ended": now()})

    def begin(self, number: int, run: str) -> None:
        """Job `number` (from 0) begins in this process."""
        self._write(f"running-{number:03d}.json", {"run": run, **process.about()})

    def begun(self, number: int) -> dict[str, Any] | None:
        """What job `number` said of itself when it began; None where it has not, or has ended."""
        return sound(read_running, self.path / f"running-{number:03d}.json", [])

    def again(self, number: int) -> None:
        """A job whose process has died waits for another one."""
        (self.path / f"running-{number:03d}.json").unlink(missing_ok=True)

    def outcome(self, number: int, outcome: dict[str, Any]) -> None:
        """What came of a job: {"run", "outcome", "said"} and what else is known of it."""
        self._write(f"{number:03d}.json", outcome)
        (self.path / f"running-{number:03d}.json").unlink(missing_ok=True)

    def ask_to_stop(self) -> None:
        """No job begins after this one."""
        (self.path / "stop").touch()

    @property
    def asked_to_stop(self) -> bool:
        return (self.path / "stop").exists()

    def running(self) -> list[tuple[int, str]]:
        """(process, host) of the jobs that say that they run, and whose process is not known to be gone."""
        found = [sound(read_running, path, []) for path in self.path.glob("running-*.json")]
        return [(one["pid"], one["host"]) for one in found if one is not None and not process.is_gone(one)]

    def look(self, warnings: list[str] | None = None) -> Overview | None:
        """Where the sweep stands now; None without a plan that can be read. warnings: gets a line for each file that
        is not as the sweep wrote it; it is not counted.
        """
        warnings = [] if warnings is None else warnings
        plan = sound(read_plan, self.path / "plan.json", warnings)
        try:
            files = set(os.listdir(self.path))
        except OSError:
            files = set()
        if plan is None:
            return None
        if self._over:
            plan.setdefault("ended", now())
        alive = "ended" not in plan and not process.is_gone(plan)
        planned = plan["runs"]
        jobs = []
        for number in range(plan["jobs"]):
            name = planned[number]["name"] if planned else ""
            jobs.append(self._job(number, name, files, plan, warnings))
        return Overview(self.path, plan, jobs, alive)

    def _job(self, number: int, name: str, files: set[str], plan: dict[str, Any], warnings: list[str]) -> Job:
        file = f"{number:03d}.json"
        if file in files and (ended := sound(read_outcome, self.path / file, warnings)) is not None:
            return self._ended(number, ended, plan)
        file = f"running-{file}"
        begun = sound(read_running, self.path / file, warnings) if file in files else None
        name = name if begun is None else begun["run"]
        if name and self.has_result(name):
            return Job(number, name, "done", "done already" if begun is None else "", 1.0, here=begun is not None)
        if begun is None:
            return Job(number, name, "waiting")
        where = f"process {begun['pid']} on {begun['host']}"
        if process.is_gone(begun) or "ended" in plan:
            return Job(number, name, "interrupted", f"{where} is gone: start the same command again")
        return Job(number, name, "running", where, self._share(name), here=True)

    def _share(self, name: str) -> float:
        """How much of a run that goes on is done, as far as its status says."""
        try:
            status = read_status(self.runs / name / "status.json")
        except (FileNotFoundError, BadRecord):
            return 0.0
        epoch, epochs = whole_number(status.get("epoch")), whole_number(status.get("epochs"))
        if epoch is None or epochs is None or epoch < 0 or epochs <= 0 or status.get("state") != "running":
            return 0.0
        return epoch / epochs if epoch < epochs else 1.0

    def _ended(self, number: int, ended: dict[str, Any], plan: dict[str, Any]) -> Job:
        name, state, said = ended["run"], ended["outcome"], ended["said"]
        if ended.get("elsewhere") and "ended" in plan and name and self.has_result(name):
            said = f"{said}; done by now"
        value = ended.get("value")
        return Job(
            number,
            name,
            state,
            said,
            1.0,
            here=state in ("done", "failed"),
            swept=tuple(ended.get("swept", ())),
            value=None if value is None else float(value),
        )

    def has_result(self, name: str) -> bool:
        """Asked again only where there was none: a result stays."""
        if not self._results.get(name):
            self._results[name] = _is_result(self.runs / name / "result.json")
        return self._results[name]


def read_plan(path: Path) -> dict[str, Any]:
    """Return a sweep's plan. Raise FileNotFoundError and BadRecord, as `read_record`, for what is no plan."""
    plan = read_record(path, shown=True)
    _check_texts(plan, "command", "host", "launcher")
    jobs, runs = whole_number(plan.get("jobs")), plan.get("runs")
    if jobs is None or not 1 <= jobs <= MOST_JOBS:
        raise BadRecord(f"'jobs' is missing or no number of jobs in 1..{MOST_JOBS:,}")
    if not isinstance(runs, list) or not all(isinstance(run, dict) and is_name(run.get("name")) for run in runs):
        raise BadRecord("'runs' is missing or holds something that is no run")
    if runs and len(runs) != jobs:
        raise BadRecord("'runs' holds more or fewer runs than there are 'jobs'")
    if whole_number(plan.get("pid")) is None:
        raise BadRecord("'pid' is missing or no whole number")
    for name in ("started", *(["ended"] if "ended" in plan else [])):
        if not _is_time(plan.get(name)):
            raise BadRecord(f"{name!r} is missing or no time")
    return plan


def read_outcome(path: Path) -> dict[str, Any]:
    """Return what came of a job, as `read_plan`."""
    ended = read_record(path, shown=True, most=MOST_SMALL)
    _check_texts(ended, "run", "said")
    if ended.get("outcome") not in ENDED:
        raise BadRecord(f"'outcome' is missing or none of {', '.join(ENDED)}")
    if ended["run"] and not is_name(ended["run"]):
        raise BadRecord("'run' is no name of a run")
    swept, value = ended.get("swept", []), ended.get("value")
    if not isinstance(swept, list) or not all(isinstance(one, str) for one in swept):
        raise BadRecord("'swept' is no list of overrides")
    if value is not None and not is_number(value):
        raise BadRecord("'value' is no number")
    return ended


def read_running(path: Path) -> dict[str, Any]:
    """Return what a job says of itself when it begins, as `read_plan`."""
    begun = read_record(path, shown=True, most=MOST_SMALL)
    _check_texts(begun, "host")
    if not is_name(begun.get("run")):
        raise BadRecord("'run' is missing or no name of a run")
    if whole_number(begun.get("pid")) is None:
        raise BadRecord("'pid' is missing or no whole number")
    return begun


def _check_texts(record: dict[str, Any], *names: str) -> None:
    for name in names:
        if not isinstance(record.get(name), str):
            raise BadRecord(f"{name!r} is missing or no text")


def _is_time(value: object) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).utcoffset() is not None
    except (ValueError, OverflowError):
        return False


def sound(how: Callable[[Path], dict[str, Any]], path: Path, warnings: list[str]) -> dict[str, Any] | None:
    """What a reader makes of a file; None where there is no file, or none that can be trusted, with a warning."""
    try:
        return how(path)
    except FileNotFoundError:
        return None
    except BadRecord as error:
        warnings.append(f"{path}: {error}; it is not counted")
        return None


def _is_result(path: Path) -> bool:
    try:
        read_result(path)
    except (FileNotFoundError, BadRecord):
        return False
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
