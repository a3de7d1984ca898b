"""A table's runs as the jobs of a sweep: planned in a folder, handed to the launcher that is chosen, stopped and gone
on with as a sweep's are. `sparse-lab status` shows them.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import hydra
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode

from sparse_lab.errors import UserError
from sparse_lab.experiment.quoting import quoted
from sparse_lab.records.sweep_dir import Overview, SweepFolder
from sparse_lab.sweep.done import State
from sparse_lab.sweep.launch import Task, plan_of, planned_jobs, short_hash
from sparse_lab.sweep.launchers import Basic, Job
from sparse_lab.sweep.plan import Request, check_extra, planned
from sparse_lab.sweep.table import Run
from sparse_lab.training.signals import AGAIN, Stopped


@dataclass(frozen=True)
class Filled:
    """How far a start came. `error`: what went wrong beside the runs. `stopped`: a signal came."""

    overview: Overview
    error: Exception | None = None
    stopped: Stopped | None = None


class Alarm:
    """Stops the jobs of this process as SIGTERM does, at a time of time.monotonic()."""

    def __init__(self, deadline: float | None) -> None:
        self.rang = False
        self.timer = None if deadline is None else threading.Timer(max(0.0, deadline - time.monotonic()), self._ring)

    def _ring(self) -> None:
        self.rang = True
        print("time is up: what runs is saved and stops", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    def start(self) -> None:
        if self.timer is not None:
            self.timer.daemon = True
            self.timer.start()

    def cancel(self) -> None:
        """Once this returns it will not ring; the signal of one that rang has come."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer.join()


def launching(words: list[str]) -> Request:
    """The request of which a table's jobs take what they share: launcher, folders. Raises UserError.

    words: of one of the table's runs, with those that choose the launcher.
    """
    request = Request.read(["--multirun", *words])
    base = request.read_experiment_axes()
    check_extra(str(base.hydra.launcher.get("_target_")))
    return request


def fill(
    request: Request,
    command: str,
    runs: list[Run],
    state: State,
    unfit: dict[str, str],
    alarm: Alarm,
    ended: Callable[[Run], None],
) -> Filled:
    """Make what is missing of a plan's runs, the most valuable first.

    request: as `launching` returns it. unfit: runs that cannot be made here, and why. ended: called with each run whose
    job has ended, in whatever way.
    """
    with SweepFolder.claim(request.outputs, short_hash([run.name for run in runs])) as folder:
        jobs = []
        for run in runs:
            number = run.number - 1
            if (result := state.done.get(run.name)) is not None:
                said = f"done already, {result['test_accuracy']:.2f}%"
                folder.outcome(number, {"run": run.name, "outcome": "skipped", "said": said})
            elif run.name in unfit:
                folder.outcome(number, {"run": run.name, "outcome": "failed", "said": unfit[run.name]})
            else:
                jobs.append(Job(number, run.name, tuple(run.command), frozenset(state.needs(run))))
        task = Task(
            command,
            request.launcher,
            len(runs),
            user_conf=request.source.user_conf,
            own=tuple(tuple(run.command) for run in runs),
            folder=folder.path,
            lock=folder.lock,
        )
        plan = plan_of(command, request.launcher, len(runs), [planned(run.config) for run in runs])
        error, stopped = None, None

        def go() -> None:
            alarm.start()
            try:
                _launch(request, task, jobs, lambda job: ended(runs[job.number]))
            finally:
                alarm.cancel()

        try:
            error = planned_jobs(folder, plan, task, request.launching, go)
        except (Stopped, KeyboardInterrupt) as caught:
            stopped = caught if isinstance(caught, Stopped) else Stopped(signal.SIGINT, AGAIN)
        overview = folder.look()
        assert overview is not None
        return Filled(overview, error, None if alarm.rang else stopped)


def _launch(request: Request, task: Task, jobs: list[Job], ended: Callable[[Job], None]) -> None:
    """Hand the jobs to the launcher that the request chooses, as Hydra's sweepers do."""
    assert task.folder is not None
    source = request.source
    words = [word for word in request.fixed if word.startswith("hydra")]
    words += [f"hydra.searchpath=[{quoted(f'file://{source.user_conf}')}]"] if source.user_conf is not None else []
    words.append(f"hydra.sweep.dir={quoted(task.folder)}")
    with hydra.initialize_config_dir(str(source.conf), version_base="1.3"):
        own = GlobalHydra.instance().hydra
        assert own is not None
        shared = [word for word in request.fixed if not word.startswith("hydra")]  # what a launcher's settings refer to
        config = own.compose_config("config", [*shared, *words], RunMode.MULTIRUN, with_log_configuration=False)
        HydraConfig.instance().set_config(config)
        context = HydraContext(config_loader=own.config_loader, callbacks=Callbacks(config))
        launcher = Plugins.instance().instantiate_launcher(context, task, config)
        assert isinstance(launcher, Basic)
        launcher.run(jobs, ended)


def check_launching(lines: list[str]) -> None:
    """Raises UserError for keys of Hydra's that say something else than where jobs run."""
    for line in lines:
        if not line.lstrip("+").startswith(("hydra/launcher=", "hydra.launcher.")):
            raise UserError(f"{line}: of Hydra's keys a table heeds hydra/launcher and hydra.launcher.* alone")
