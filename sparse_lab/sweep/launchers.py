"""Where jobs run: in this process, in others on this machine, on Ray, on Slurm.

Every launcher submits each job under its name, keeps what it got for it by that name, and waits for all of them: a
process that dies ends no other job. Hydra finds the launchers in hydra_plugins/sparse_lab_launchers.py.
"""

from __future__ import annotations

import os
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import hydra.plugins.launcher
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from omegaconf import DictConfig, OmegaConf, open_dict

from sparse_lab.config import conf_dir
from sparse_lab.errors import UserError, nearest
from sparse_lab.experiment import plugins
from sparse_lab.experiment.compose import ConfigSource, leave_out_plugins_own
from sparse_lab.experiment.plugins import Handed
from sparse_lab.experiment.security.allowed import ALLOWED
from sparse_lab.experiment.security.composed import check_composed
from sparse_lab.experiment.security.launching import FOLDER, SHELL_LINES, check_batch
from sparse_lab.host import console
from sparse_lab.host.machine import usable_cores
from sparse_lab.records.sweep_dir import SweepFolder

if TYPE_CHECKING:
    from hydra.types import HydraContext, TaskFunction

    from sparse_lab.sweep.launch import Task

MOST_DEATHS = 3
KILLED_AGAIN = (
    f"its process was killed {MOST_DEATHS} times, the last time with nothing beside it: most often memory is short: a "
    "smaller training.batch_size or model.width; the same command again goes on where it was saved"
)
EXIT_CODES = re.compile(r"exit codes of the workers are \{(.+)\}")
LOOK_EVERY = 0.1  # seconds between two looks at jobs in other processes
NOT_LOADED = re.compile(r"UserError: ((?:plugin|the installed package) .* cannot be loaded: .*)")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
# a thread that waits for the others of its process leaves its processor to another run: waiting awake, a VGG16 of two
# threads beside other work on two processors took 988 ms a step, asleep 184, with one thread 208
WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}
# keys of hydra.launcher that submitit knows by these names; the others are Slurm's own
SHARED = {"name", "timeout_min", "nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "mem_gb"} | {
    "stderr_to_stdout"
}
# all that a batch system's launcher takes
BATCH = {FOLDER, "additional_parameters", *SHELL_LINES} | {
    key.removeprefix("launcher.") for key in ALLOWED if key.count(".") == 1 and key.startswith("launcher.")
} - {"n_jobs", "_target_"}


@dataclass(frozen=True)
class Job:
    """What makes one run. `number`: its place in the plan, from 0. `needs`: runs that it makes first where they are
    not there yet, so that no other job that makes one of them should run at the same time. `deaths`: how often its
    process was killed.
    """

    number: int
    run: str
    overrides: tuple[str, ...]
    needs: frozenset[str] = frozenset()
    deaths: int = 0

    @property
    def alone(self) -> bool:
        """Must nothing else run beside it? The last try: what was short of memory has all of it then."""
        return self.deaths == MOST_DEATHS - 1

    @property
    def name(self) -> str:
        return f"{self.number:03d}-{self.run}"


class Basic(hydra.plugins.launcher.Launcher):
    """One job after the other, in this process; and what all launchers share."""

    room: int | None = 1  # how many jobs are handed over at a time; None: all
    about = ""  # how many runs there are at a time, and how each computes, where the launcher knows it

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context = hydra_context
        self.task: Task = task_function  # type: ignore[assignment]
        self.handed = replace(self.task, lost={})  # what other processes get of it
        self.config = config
        assert self.task.sweep is not None
        self.folder: SweepFolder = self.task.sweep

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """What Hydra's sweepers call."""
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        names = dict(enumerate(self.folder.planned_names()))
        jobs = [
            Job(number, names.get(number, f"job-{number + 1}"), tuple(words))
            for number, words in zip(numbers, job_overrides, strict=True)
        ]
        returned = self.run(jobs)
        return [returned[job.name] for job in jobs]

    def run(self, jobs: list[Job], ended: Callable[[Job], None] = lambda job: None) -> dict[str, JobReturn]:
        """Run all jobs, the first that can begin first, and return what Hydra's `run_job` made of each, by its name.

        ended: called with each job once it has ended. Raises what a signal raises, what keeps jobs from being submitted
        at all, and Moved where the sweep's folder is no longer there, once those that run have ended.
        """
        waiting, running, returned = list(jobs), dict[str, tuple[Job, Any]](), dict[str, JobReturn]()
        try:
            while waiting or running:
                if waiting and self.folder.moved is not None:
                    waiting.clear()
                ready = self._ready(waiting, [job for job, _ in running.values()])
                handles = self.submit(ready) if ready else []
                running |= {job.name: (job, handle) for job, handle in zip(ready, handles, strict=True)}
                over = [name for name, (_, handle) in running.items() if self.over(handle)]
                for name in over:
                    job, handle = running.pop(name)
                    if (result := self._returned(job, handle)) is None:
                        waiting.append(replace(job, deaths=job.deaths + 1))
                        continue
                    returned[name] = result
                    ended(job)
                if not over:
                    time.sleep(LOOK_EVERY)
        finally:
            self.close()
        self.folder.check_in_place()
        return returned

    def _ready(self, waiting: list[Job], running: list[Job]) -> list[Job]:
        """Take from `waiting` the first jobs that there is room for and that make nothing that another one makes."""
        room = len(waiting) if self.room is None else self.room - len(running)
        if room <= 0 or any(job.alone for job in running):
            return []
        made = self.folder.has_result
        busy = {name for job in running for name in (job.run, *job.needs) if not made(name)}
        ready: list[Job] = []
        for job in list(waiting):
            if len(ready) == room:
                break
            if job.alone and (running or ready):
                continue
            making = {name for name in (job.run, *job.needs) if not made(name)}
            if not making & busy:
                ready.append(job)
                waiting.remove(job)
                busy |= making
                if job.alone:
                    break
        return ready

    def _returned(self, job: Job, handle: Any) -> JobReturn | None:
        """What a job that is over returned; None where its process died and it is to be submitted again."""
        try:
            return self.collect(handle)
        except Exception as error:  # its process died: a job that fails returns
            if (said := _not_loaded(error)) is not None:
                return _failed(self.task, job, said)
            if (killed := self.killed(job, error)) is not None and job.deaths + 1 < MOST_DEATHS:
                print(f"sweep: {killed}; it is submitted again", flush=True)
                self.folder.again(job.number)
                return None
            self.task.lost[job.name] = error
            if killed is not None:
                print(f"sweep: {killed}; after {MOST_DEATHS} deaths it counts as failed", flush=True)
                return _failed(self.task, job, KILLED_AGAIN)
            return JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED)  # without a value, as one that fails

    def submit(self, jobs: list[Job]) -> list[Any]:
        """Start these jobs and return what each is known by from now on."""
        setup_globals()
        return [perform(self.context, self.task, composed(self.context, self.config, self.handed, job)) for job in jobs]

    def over(self, handle: Any) -> bool:
        """Return whether the job has ended, well or not."""
        return True

    def collect(self, handle: Any) -> JobReturn:
        """Return what a job that is over returned. Raise what ended its process."""
        return handle

    def killed(self, job: Job, error: Exception) -> str | None:
        """Return what is to be said of a job whose process was killed, if this launcher is to submit it again."""
        return None

    def close(self) -> None:
        """Let nothing go on that the command started for its jobs on this machine."""


class Joblib(Basic):
    """Several jobs at a time on this machine. Each place has a process of its own, which it keeps for its next job."""

    def __init__(self, n_jobs: int) -> None:
        cores = usable_cores()
        self.room = places = n_jobs if n_jobs > 0 else cores
        self.environment = threads_of(places)
        each = self.environment.get(THREADS[0]) or os.environ[THREADS[0]]
        self.about = f"{places} runs at a time, {each} thread{'s' if each != '1' else ''} each, on {cores} processors"
        self.processes: list[Any] = []
        self.idle: list[Any] = []

    def submit(self, jobs: list[Job]) -> list[Any]:
        state, brought = Singleton.get_state(), plugins.handed()
        handles = []
        for job in jobs:
            handed = (brought, self.context, self.config, self.handed, state, job)
            handles.append(self._start(compose_elsewhere, *handed))
        return handles

    def _start(self, *what: Any) -> tuple[Any, Any]:
        from joblib.externals.loky import ProcessPoolExecutor
        from joblib.externals.loky.process_executor import BrokenProcessPool

        while self.idle:
            process = self.idle.pop()
            try:
                return process, process.submit(*what)
            except BrokenProcessPool:  # killed while it waited
                self._drop(process)
        process = ProcessPoolExecutor(1, env=self.environment)
        self.processes.append(process)
        return process, process.submit(*what)

    def _drop(self, process: Any) -> None:
        self.processes.remove(process)
        process.shutdown(wait=True, kill_workers=True)

    def over(self, handle: Any) -> bool:
        return handle[1].done()

    def collect(self, handle: Any) -> JobReturn:
        process, future = handle
        try:
            returned = future.result()
        except Exception:
            self._drop(process)  # of a place whose process died nothing more comes
            raise
        self.idle.append(process)
        return returned

    def killed(self, job: Job, error: Exception) -> str | None:
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        if not isinstance(error, TerminatedWorkerError):
            return None
        told = EXIT_CODES.search(str(error))
        begun = self.folder.begun(job.number)
        who = f"the process of {job.run}" if begun is None else f"process {begun['pid']}, which made {begun['run']},"
        return f"{who} was killed ({'' if told is None else f'{told[1]}, '}most often for want of memory)"

    def close(self) -> None:
        for process in self.processes:
            process.shutdown(wait=True, kill_workers=True)
        self.processes, self.idle = [], []


class Ray(Basic):
    """A task of a Ray cluster for each job."""

    def __init__(self, ray: DictConfig) -> None:
        self.remote: dict[str, Any] = OmegaConf.to_container(ray.remote, resolve=True)  # type: ignore[assignment]

    @property
    def room(self) -> int | None:  # type: ignore[override]
        """What the cluster has room for now, and as many that wait there, so that it may grow."""
        import ray

        there = ray.cluster_resources()
        wanted = {"CPU": self.remote.get("num_cpus"), "GPU": self.remote.get("num_gpus")}
        at_once = [int(there.get(kind, 0) / amount) for kind, amount in wanted.items() if amount]
        return 2 * max(1, min(at_once)) if at_once else None

    def submit(self, jobs: list[Job]) -> list[Any]:
        import ray

        state, brought, handles = Singleton.get_state(), plugins.handed(), []
        for job in jobs:
            # a function for each: Ray may hand another call of the same to a worker that ends after one (max_calls)
            task = ray.remote(**self.remote)(perform_elsewhere).options(name=job.name)
            whole = composed(self.context, self.config, self.handed, job)
            handles.append(task.remote(brought, self.context, self.handed, state, whole, job))
        return handles

    def over(self, handle: Any) -> bool:
        import ray

        return bool(ray.wait([handle], timeout=0)[0])

    def collect(self, handle: Any) -> JobReturn:
        import ray

        return ray.get(handle)


class Submitit(Basic):
    """A job of a batch system for each job: those that can begin at one time as an array."""

    room = None
    cluster = ""

    def __init__(self, **params: Any) -> None:
        if unknown := params.keys() - BATCH:
            raise TypeError(f"got an unexpected keyword argument {min(unknown)!r}; {nearest(min(unknown), BATCH)}")
        self.params: dict[str, Any] = {
            key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for key, value in params.items()
        }

    def submit(self, jobs: list[Job]) -> list[Any]:
        import submitit

        check_batch(self.params)
        own = dict(self.params)
        folder, resubmitted = own.pop("submitit_folder"), own.pop("max_num_timeout", None)
        again = {} if resubmitted is None else {f"{self.cluster}_max_num_timeout": resubmitted}
        executor = submitit.AutoExecutor(folder, cluster=self.cluster, **again)
        executor.update_parameters(
            **{key if key in SHARED else f"{self.cluster}_{key}": value for key, value in own.items()}
        )
        brought, state = plugins.handed(), Singleton.get_state()
        with _with(self.threads(len(jobs))):
            return executor.map_array(Resubmitted(brought, self.context, self.config, self.handed, state), jobs)

    def threads(self, jobs: int) -> dict[str, str]:
        """What jobs that are submitted together get of the environment beside; a batch system gives them processors."""
        return {}

    def over(self, handle: Any) -> bool:
        return handle.done()

    def collect(self, handle: Any) -> JobReturn:
        return handle.results()[0]


class SubmititLocal(Submitit):
    """Without a batch system, to try one's use of it out."""

    cluster = "local"

    def threads(self, jobs: int) -> dict[str, str]:
        return threads_of(jobs)


class SubmititSlurm(Submitit):
    """On Slurm."""

    cluster = "slurm"


@dataclass
class Resubmitted:
    """What submitit calls with a job, and submits again after a time limit."""

    brought: Handed
    context: HydraContext
    config: DictConfig
    task: Task
    state: dict[Any, Any]

    def __call__(self, job: Job) -> JobReturn:
        return compose_elsewhere(self.brought, self.context, self.config, self.task, self.state, job)

    def checkpoint(self, job: Job) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self, job)


def threads_of(places: int) -> dict[str, str]:
    """The environment by which so many processes share the processors out; what is set there already stays."""
    each = str(max(1, usable_cores() // places))
    wanted = dict.fromkeys(THREADS, each) | WAITING
    return {name: value for name, value in wanted.items() if name not in os.environ}


@contextmanager
def _with(environment: dict[str, str]) -> Iterator[None]:
    """What processes get that are started meanwhile."""
    os.environ.update(environment)
    try:
        yield
    finally:
        for name in environment:
            del os.environ[name]


def composed(context: HydraContext, config: DictConfig, task: Task, job: Job) -> DictConfig:
    """What Hydra makes of a job's overrides, with its own node. Raises UserError for what must not start."""
    ConfigSource(conf_dir(), task.user_conf).check_files(job.overrides)
    whole = context.config_loader.load_sweep_config(config, list(job.overrides))
    with open_dict(whole):
        whole.hydra.job.id, whole.hydra.job.num = job.name, job.number
    check_composed(whole)  # some values are known only now
    return whole


def perform(context: HydraContext, task: TaskFunction, whole: DictConfig) -> JobReturn:
    """Run a job in this process."""
    return run_job(
        task_function=task,
        config=whole,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
        hydra_context=context,
    )


def perform_elsewhere(
    brought: Handed, context: HydraContext, task: Task, state: dict[Any, Any], whole: DictConfig, job: Job
) -> JobReturn:
    """Run a job in the process of a worker, which knows nothing of the command's.

    `brought` stands first, for what comes behind it may hold what plugins define.
    """
    return _elsewhere(brought, task, state, job, lambda: perform(context, task, whole))


def compose_elsewhere(
    brought: Handed, context: HydraContext, config: DictConfig, task: Task, state: dict[Any, Any], job: Job
) -> JobReturn:
    """The same, composed there: many jobs that are handed over at one time do not wait for one another."""
    return _elsewhere(brought, task, state, job, lambda: perform(context, task, composed(context, config, task, job)))


def _elsewhere(brought: Handed, task: Task, state: dict[Any, Any], job: Job, go: Callable[[], JobReturn]) -> JobReturn:
    console.keep_going()
    try:
        brought.check()
    except UserError as error:
        return _failed(task, job, str(error))
    setup_globals()
    Singleton.set_state(state)
    leave_out_plugins_own()
    return go()


def _failed(task: Task, job: Job, said: str) -> JobReturn:
    """Put a job that did not begin on record as one that failed."""
    assert task.sweep is not None
    begun = task.sweep.begun(job.number)
    run = job.run if begun is None else begun["run"]
    task.sweep.outcome(job.number, {"run": run, "outcome": "failed", "said": said})
    return JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED)


def _not_loaded(error: Exception) -> str | None:
    """What a worker said of a plugin that it could not load: then it cannot read its job, which says little."""
    told = NOT_LOADED.search("".join(traceback.format_exception(error)))
    return None if told is None else told[1]
