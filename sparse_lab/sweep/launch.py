"""The jobs of one command: what Hydra calls for each, in this process or in a worker's, and what is said of them all.

A sweep's state lies in its folder (records/sweep_dir.py), so a summary is the same whatever launcher ran the jobs.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from sparse_lab.config import Config
from sparse_lab.errors import NOTED, SparseLabError, UserError
from sparse_lab.experiment import plugins
from sparse_lab.experiment.quoting import quoted
from sparse_lab.host import full_disk, process
from sparse_lab.records.atomic_io import write_text_atomic
from sparse_lab.records.lock import Moved
from sparse_lab.records.redaction import redact
from sparse_lab.records.sweep_dir import ENDED, Job, Overview, SweepFolder, now

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig
    from rich.console import Console

    from sparse_lab.sweep.plan import Request

FAILED = 1
GRACE = 60.0  # seconds for runs in other processes to save what they have
LOOK_EVERY = 1.0  # seconds between two looks at jobs in other processes


@dataclass
class Task:
    """What Hydra calls for each job. Other processes get it by pickle: a few plain values.

    A job's config is composed as when the request was checked: of `fixed` and of what Hydra says is the job's own; in a
    table of `own`, all overrides of each job by its number.
    """

    command: str
    launcher: str
    jobs: int
    fixed: tuple[str, ...] = ()
    user_conf: Path | None = None
    own: tuple[tuple[str, ...], ...] = ()
    swept: tuple[str, ...] = ()
    folder: Path | None = None  # the sweep's; None for a single run
    lock: int | None = None  # the number of the file that holds the sweep's folder for this command
    searches: bool = False  # a sweeper makes the jobs up and wants each one's value
    argv: tuple[str, ...] = ()  # of a single run: what starts it again, by which DDP starts its other processes
    cwd: str = field(default_factory=os.getcwd)
    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)
    last: dict[str, Any] = field(default_factory=dict)
    lost: dict[str, Exception] = field(default_factory=dict)  # job's name -> what ended its process

    @property
    def here(self) -> bool:
        """Is this the process that the command was given to?"""
        return (self.pid, self.host) == (os.getpid(), socket.gethostname())

    def __call__(self, _: DictConfig) -> float | None:
        """Returns the validation accuracy in percent, or None. No failure leaves: it would stop the other jobs."""
        folder = self.sweep
        if folder is not None:
            folder.check_in_place()
            if not (folder.path / "plan.json").is_file():
                raise UserError(
                    f"{socket.gethostname()} does not see {folder.path}: a cluster's machines must share it"
                )
        os.chdir(self.cwd)  # paths of the command mean what they mean there
        if folder is None:
            sys.argv = [sys.argv[0], *self.argv]  # Hydra has read its own
            self.last = self._run(lambda: self._config(self.fixed), "", lambda name: None)
            return self.last.get("value")
        from hydra.core.hydra_config import HydraConfig

        from sparse_lab.sweep.plan import written

        hydra = HydraConfig.get()
        if folder.asked_to_stop:
            return None
        number = int(hydra.job.num)
        found = (line.partition("=") for line in hydra.overrides.task)
        swept = [f"{key}={written(value)}" for key, _, value in found if key.lstrip("+") in self.swept]
        label = f"[{number + 1}/{self.jobs}]"
        lines = self.own[number] if self.own else (*self.fixed, *swept)
        outcome = self._run(lambda: self._config(lines), label, lambda name: folder.begin(number, name))
        stopped = outcome.pop("stopped", None)
        try:
            folder.outcome(number, {**outcome, "swept": swept})
        except OSError as error:  # the other jobs go on, and what this one has made is there
            said = f"what came of {outcome['run']} could not be written down: {error.strerror}"
            print(f"sparse-lab: {folder.path}: {said}", file=sys.stderr, flush=True)
        if outcome["outcome"] == "failed":
            print(f"sparse-lab: failed: {outcome['run']}: {outcome['said']}", file=sys.stderr, flush=True)
        if stopped is not None and self.here:
            raise stopped
        if stopped is not None and self.launcher == "ray" and not folder.asked_to_stop:
            sys.exit(stopped.status)  # Ray takes the machine for lost, and goes on with the run on another one
        if self.here:
            _say_progress(folder)
        return outcome.get("value")

    @property
    def sweep(self) -> SweepFolder | None:
        """The sweep's folder; None for a single run. On other machines a file may have another number."""
        if self.folder is None:
            return None
        return SweepFolder(self.folder, self.lock if self.host == socket.gethostname() else None)

    def done_already(self, config: Config) -> bool:
        """Is this single run finished? Then that is said at once, without Hydra's own second look at the command."""
        from sparse_lab.experiment.identity import run_dir

        if run_dir(config).result() is None:
            return False
        self.last = self._run(lambda: config, "", lambda name: None)
        return True

    def _config(self, lines: tuple[str, ...]) -> Config:
        from sparse_lab.config import conf_dir
        from sparse_lab.experiment.compose import ConfigSource, leave_out_plugins_own

        leave_out_plugins_own()  # a worker has not
        return ConfigSource(conf_dir(), self.user_conf).compose(list(lines)).config()

    def _run(self, compose: Callable[[], Config], job: str, begin: Callable[[str], None]) -> dict[str, Any]:
        """{"run", "outcome", "said", "value"}; and "stopped", the exception, where a signal stopped it."""
        from sparse_lab.experiment import backend
        from sparse_lab.experiment.identity import is_to_be_measured, run_dir
        from sparse_lab.experiment.runner import run
        from sparse_lab.records.run_dir import RunLocked
        from sparse_lab.sweep.plan import check_run
        from sparse_lab.training.signals import Stopped

        about: dict[str, Any] = {"run": ""}
        sweep = self.sweep
        try:
            config = compose()
            if is_to_be_measured(config):
                check_run(config)
                backend.measure(config)
            folder = run_dir(config)
            result = folder.path / "result.json"
            about["run"] = folder.name
            begin(about["run"])
            if not folder.has_result:
                check_run(config)
            before = _written(result)
            if sweep is not None:
                sweep.check_in_place()  # or the run would make itself a folder where the others were
            record = run(config, self.command, self._console(), job)
            again = before is not None and before == _written(result)
        except RunLocked as error:
            return {**about, "outcome": "skipped", "said": str(error), "elsewhere": True}
        except Stopped as error:
            return {**about, "outcome": "stopped", "said": str(error), "stopped": error}
        except Exception as error:
            return {**about, "outcome": "failed", "said": one_line(error)}
        test, validation = f"{record['test_accuracy']:.2f}%", record.get("validation_accuracy")
        said = f"validation {validation:.2f}%" if self.searches and validation is not None else test
        outcome = (
            {"outcome": "skipped", "said": f"done already, {said}"} if again else {"outcome": "done", "said": said}
        )
        return {**about, **outcome, "value": validation, "test": record["test_accuracy"]}

    def _console(self) -> Console:
        from rich.console import Console

        if self.here and sys.stdout.isatty():
            return Console()
        return Console(width=160, force_terminal=False)


def _written(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def one_line(error: BaseException) -> str:
    """What went wrong; for what no user can mend also where, and which file holds all of it, if one does."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if isinstance(error, SparseLabError):
        return redact(line)
    if (full := full_disk.found_in(error)) is not None:
        return redact(full_disk.what_of(full, Path.cwd()))
    where = traceback.extract_tb(error.__traceback__)[-1]
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(NOTED)]
    whole = "".join(f"; {note}" for note in notes[-1:])
    return f"{type(error).__name__}: {redact(line)} ({os.path.basename(where.filename)}:{where.lineno}{redact(whole)})"


def start(request: Request) -> int:
    """Run what was asked for through Hydra. Returns the exit status. Raises Stopped after a signal."""
    command = shlex.join(["sparse-lab", *plugins.words(), *request.argv])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on, where it would print them and leave
    if not request.multirun:
        again = (*plugins.words(whole=True), *request.argv)
        task = Task(command, request.launcher, 1, tuple(request.fixed), request.source.user_conf, argv=again)
        if not task.done_already(request.configs[0]):
            _through_hydra(request, task, [])
        return _single(task)
    with SweepFolder.claim(request.outputs, _sweep_name(request)) as folder:
        plan = plan_of(command, request.launcher, request.jobs, request.plan)
        task = Task(
            command,
            request.launcher,
            request.jobs,
            tuple(request.fixed),
            request.source.user_conf,
            swept=tuple(request.axes),
            folder=folder.path,
            lock=folder.lock,
            searches=not request.plan,
        )
        _hush(request.sweeper)
        error = planned_jobs(
            folder,
            plan,
            task,
            request.launching,
            lambda: _through_hydra(request, task, [f"hydra.sweep.dir={quoted(folder.path)}"]),
        )
        overview = folder.look()
        assert overview is not None
        return summary(overview, error)


def plan_of(command: str, launcher: str, jobs: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What plan.json is to hold. `runs`: what each job will run, where that is known before they start."""
    about = {"command": command, "started": now(), **process.about()}
    return {**about, "jobs": jobs, "launcher": launcher, "runs": runs}


def planned_jobs(
    folder: SweepFolder, plan: dict[str, Any], task: Task, launching: DictConfig, go: Callable[[], None]
) -> Exception | None:
    """Let `go` hand the jobs of a plan to their launcher, and return what went wrong beside the jobs: a worker that
    died, a cluster that cannot be reached. No failing run is among it. Raises Stopped after a signal, Moved where the
    folder is no longer there.

    launching: the launcher's settings, hydra.launcher.
    """
    folder.write_plan(plan)
    error = None
    try:
        if task.launcher == "ray":
            _start_ray(launching)
        with _elsewhere(task.launcher, folder):
            go()
    except Exception as caught:
        error = caught
    finally:
        with suppress(Moved):
            folder.end(plan)
    folder.check_in_place()
    found = ([("the launcher", error)] if error is not None else []) + list(task.lost.items())
    if not found:
        return None
    said = [f"{name}:\n{''.join(traceback.format_exception(one))}" for name, one in found]
    try:
        write_text_atomic(folder.path / "error.txt", redact("\n".join(said)))
    except OSError:
        pass  # its first line is said all the same
    return found[0][1]


def _sweep_name(request: Request) -> str:
    """The same for the same jobs: of the planned names, or of the command line where a sweeper makes the jobs up."""
    return short_hash([run["name"] for run in request.plan] or [*sorted(request.argv), *plugins.hashes().values()])


def short_hash(words: list[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]


def _through_hydra(request: Request, task: Task, overrides: list[str]) -> None:
    import hydra
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.plugins.sweeper import Sweeper

    # it would compose every job once more before the first begins: `Request.check` has
    Sweeper.validate_batch_is_legal = lambda self, batch: None  # type: ignore[method-assign]
    split = BasicSweeper.split_arguments

    def first_alone(given: list[Override], size: int | None) -> list[list[list[str]]]:
        jobs = split(given, None)[0]
        left = jobs if request.first is None else [jobs[number] for number in request.first]
        return list(BasicSweeper.split_overrides_to_chunks(left, size))

    sys.argv = [sys.argv[0], *request.argv, *overrides]  # Hydra reads it
    BasicSweeper.split_arguments = staticmethod(first_alone)  # type: ignore[method-assign,assignment]
    try:
        hydra.main(version_base="1.3", config_path=str(request.source.conf), config_name="config")(task)()
    finally:
        BasicSweeper.split_arguments = staticmethod(split)  # type: ignore[method-assign]


def _single(task: Task) -> int:
    if (stopped := task.last.get("stopped")) is not None:
        raise stopped
    if task.last["outcome"] == "failed":
        print(f"sparse-lab: failed: {task.last['run']}: {task.last['said']}", file=sys.stderr, flush=True)
        return FAILED
    if task.last.get("elsewhere"):
        print(f"{task.last['run']}: skipped: {task.last['said']}", flush=True)
    return 0


def _say_progress(folder: SweepFolder) -> None:
    overview = folder.look()
    if overview is not None and overview.left:
        print(f"sweep: {overview.line()}", flush=True)


def summary(overview: Overview, error: Exception | None) -> int:
    """One line a job, and the best one of a search. Returns the exit status: 0, or 1 where anything is left undone."""
    rows = [(job.state, job.run or f"job {job.number + 1}", _said(job)) for job in overview.jobs]
    counts = ", ".join(f"{number} {state}" for state, number in sorted(overview.counts.items()))
    print(f"{len(rows)} run{'' if len(rows) == 1 else 's'}: {counts}")
    width = max(len(state) for state, _, _ in rows)
    for state, name, said in rows:
        print(f"  {state:{width}}  {name}  {said}".rstrip())
    scored = [job for job in overview.jobs if job.value is not None]
    if not overview.plan["runs"] and scored:
        best = max(scored, key=lambda job: job.value or 0.0)
        print(f"best: trial {best.number + 1}, validation {best.value:.2f}%: {shlex.join(best.swept)}  ({best.run})")
    undone = [job for job in overview.jobs if job.state not in ("done", "skipped")]
    if error is not None and any(job.state != "failed" for job in undone):
        say_error(overview.folder, error)
    sys.stdout.flush()
    return FAILED if undone else 0


def say_error(folder: Path, error: Exception) -> None:
    first = redact((str(error).strip().splitlines() or [""])[0])
    whole = f" (whole: {folder}/error.txt)" if (folder / "error.txt").is_file() else ""
    print(f"sparse-lab: {type(error).__name__}: {first}{whole}", file=sys.stderr)


def _said(job: Job) -> str:
    if job.state == "waiting":
        return "never began: start the same command again"
    return job.said


@contextmanager
def _elsewhere(launcher: str, folder: SweepFolder) -> Iterator[None]:
    """While jobs run in other processes: say what changes, and hand a signal on so that they save and stop."""
    if launcher == "basic":
        yield
        return
    from sparse_lab.training.signals import AGAIN, Stopped, stopping

    asked: list[Stopped] = []

    def stop(number: int, frame: FrameType | None) -> None:
        again = bool(asked)
        asked.append(Stopped(number, AGAIN))
        folder.ask_to_stop()
        if not again:  # a second signal does not wait
            stop_workers(folder, number)
        raise asked[-1]

    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(folder, launcher, over), daemon=True)
    in_main = threading.current_thread() is threading.main_thread()  # elsewhere Python allows no handlers
    before = {number: signal.signal(number, stop) for number in stopping()} if in_main else {}
    watcher.start()
    try:
        yield
    except BaseException:
        if asked:  # Ray makes another exception of it on the way
            raise asked[0] from None
        raise
    finally:
        over.set()
        watcher.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_workers(folder: SweepFolder, number: int) -> None:
    """Tell the jobs on this machine to save and stop, and give them time for it. Jobs on others go on."""
    deadline = time.monotonic() + GRACE
    told: set[int] = set()
    while time.monotonic() < deadline:
        mine = {pid for pid, host in folder.running() if host == socket.gethostname()}
        for pid in mine - told:
            told.add(pid)
            with suppress(ProcessLookupError):  # it has ended by now
                # a terminal sends Ctrl-C to every process of its group itself
                if number != signal.SIGINT or os.getpgid(pid) != os.getpgrp():
                    os.kill(pid, signal.SIGTERM)
        if not mine:
            return
        time.sleep(0.2)


def _watch(folder: SweepFolder, launcher: str, over: threading.Event) -> None:
    """A line whenever something has ended, and when the first job runs; joblib's processes speak for themselves."""
    begun = folder.look()
    known = {job.number for job in begun.jobs if job.state in ENDED} if begun else set()
    spoke = False
    while not over.wait(LOOK_EVERY):
        overview = folder.look()
        ended = {job.number for job in overview.jobs if job.state in ENDED} if overview else set()
        if overview is None or (ended == known and (spoke or not overview.counts["running"])):
            continue
        for job in overview.jobs:
            if launcher != "joblib" and job.number in ended - known:
                print(f"[{job.number + 1}/{len(overview.jobs)}] {job.run}: {job.state}: {job.said}", flush=True)
        known, spoke = ended, True
        if overview.left:
            print(f"sweep: {overview.line()}", flush=True)


def _start_ray(launching: DictConfig) -> None:
    """As the launcher would; but Ray takes SIGTERM for itself when it starts, so it starts before `_elsewhere`."""
    import ray

    if not ray.is_initialized():
        ray.init(**OmegaConf.to_container(launching.ray.init, resolve=True))  # type: ignore[arg-type]


def _hush(sweeper: str) -> None:
    """What Ray and Optuna would say that is of no use here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if sweeper == "optuna":
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        logging.getLogger("hydra_plugins.hydra_optuna_sweeper").setLevel(logging.ERROR)  # failed trials are said here
