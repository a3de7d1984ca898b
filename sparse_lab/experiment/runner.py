"""One run: is it done already, what does it start from, fit it, what went wrong. Read it top to bottom.

torch is imported by `fit` alone, so that a finished run is looked up at once.
"""

from __future__ import annotations

import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from sparse_lab import data
from sparse_lab.config import Config
from sparse_lab.errors import NOTED, SparseLabError, UserError
from sparse_lab.experiment import backend
from sparse_lab.experiment.identity import is_to_be_measured, run_dir, settled
from sparse_lab.host import full_disk
from sparse_lab.methods import table
from sparse_lab.records.redaction import redact
from sparse_lab.records.run_dir import RunDir, zeros_among
from sparse_lab.sparsity.processes import broadcast_from_rank0, rank
from sparse_lab.training.signals import AGAIN, Stopped, StopRequest


def run(
    config: Config, command: str, console: Console, job: str = "", role: str = "", wait: bool = False
) -> dict[str, Any]:
    """Make the run that `config` asks for, with the runs that it starts from, and return its record.

    job: which of a sweep it is, such as [3/10]. role: what it is made for. Both stand before its lines.

    A finished run is not made again. Raises SparseLabError for what the user can mend (RunLocked while another process
    has the run, unless `wait`) and Stopped after a signal; every failure is in status.json too.
    """
    data.look_again()  # hours may lie between the plan and this run
    if is_to_be_measured(config):
        backend.measure(config)
    folder = run_dir(config)
    label = " ".join(word for word in (job, role, folder.name) if word)

    def say(line: str) -> None:
        if rank() == 0:
            console.print(redact(f"{label}: {line}"), highlight=False, soft_wrap=True, markup=False)

    with folder.claim(say, wait) if rank() == 0 else nullcontext(), StopRequest(say) as stop:
        done = broadcast_from_rank0(folder.result())
        if done is not None:
            if rank() == 0:
                folder.settle()
            say(f"done already, test {done['test_accuracy']:.2f}%{_not_watched(config, folder)}")
            return done
        try:
            if rank() == 0:
                folder.begin()
                folder.set_aside_damaged(say)
            starts, parent = _starts(config, folder, command, console)
            chosen, settings = backend.choose(config), settled(config)
            if chosen.line is not None and chosen.compute == settings.compute:
                say(chosen.line)
            from sparse_lab.experiment.fit import fit

            result = fit(settings, folder, starts, parent, command, console, label, job, stop)
        except BaseException as error:
            raise _failure(folder, error, stop) from error
        say(
            f"test {result['test_accuracy']:.2f}%, {result['kept']:,} of {result['total']:,} weights"
            f"{zeros_among(result)}, {result['seconds']:.0f} s"
        )
        if stop.number is not None:  # asked for in the last epoch
            raise stop.stopped("this run is done; start the same command again to go on with the others")
    return result


def _not_watched(config: Config, folder: RunDir) -> str:
    """A finished run cannot be watched afterwards: which diagnostics are asked for and were not written."""
    asked = {"activations": config.diagnostics.activations, "gradients": config.diagnostics.gradients}
    missing = [name for name, wanted in asked.items() if wanted and not (folder.path / f"{name}.jsonl").exists()]
    return f"; made without diagnostics of {', '.join(missing)}: remove its folder to make it again" if missing else ""


def _starts(config: Config, folder: RunDir, command: str, console: Console) -> tuple[dict[str, Path], str | None]:
    """Make (or find) the runs that this one starts from: name of the part -> its network; and the parent's name."""
    starts: dict[str, Path] = {}
    names: dict[str, str] = {}
    for part, other in table.starts(config).items():
        names[part] = run(other, command, console, role="needed first:", wait=True)["name"]
        starts[part] = RunDir(folder.path.with_name(names[part]), {}).best
    data.look_again()
    if run_dir(config).name != folder.name:
        raise UserError("the files of the data set have changed since this run began: start the same command again")
    return starts, names.get("parent")


def _failure(folder: RunDir, error: BaseException, stop: StopRequest) -> BaseException:
    """Put the failure on record; a full disk becomes one clear line. A note says where the traceback is, if it is. Of a
    folder that is no longer there that alone is said: it may be what went wrong, and nothing is written to another
    process's.
    """
    if (moved := folder.moved) is not None:
        if isinstance(error, Stopped):
            error.line = str(moved)
            return error
        return moved if stop.number is None else stop.stopped(str(moved))
    if not isinstance(error, SparseLabError | Stopped) and (full := full_disk.found_in(error)) is not None:
        said = full_disk.what_of(full, folder.path)
        error = UserError(f"{said} and {AGAIN}: {folder.path} holds what was saved before")
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if rank() != 0:
        return error
    try:
        if isinstance(error, Stopped):
            folder.interrupt(line)
        else:
            said = line if isinstance(error, SparseLabError) else f"{type(error).__name__}: {line}"
            folder.fail(said, traceback.format_exc())
            error.add_note(f"{NOTED}{folder.path / 'error.txt'}")
    except OSError:
        pass  # nothing can be written any more: the error itself still reaches the user
    return error
