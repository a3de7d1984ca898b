"""One run: build the parts, fit, record. Read it top to bottom."""

from __future__ import annotations

import errno
import logging
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from rich.console import Console

from sparse_lab import data, stages
from sparse_lab.compute import choice
from sparse_lab.compute.device import device_of
from sparse_lab.config import Config, UserError
from sparse_lab.models.weight_sharing import unshared
from sparse_lab.outcome import outcome, removed, reset_peak_memory
from sparse_lab.parts import agreed, assemble, make_trainer, rank
from sparse_lab.record import RunFolder
from sparse_lab.secrets import redact
from sparse_lab.training.files import load, save_network
from sparse_lab.training.stop import Stopped, StopRequest

RESUMABLE = {"state_dict", "callbacks", "optimizer_states", "random_state", "pytorch-lightning_version"}


def run(config: Config, command: str, console: Console, label: str = "", wait: bool = False) -> dict[str, Any]:
    """Make the run that `config` asks for, with the runs that it starts from, and return its record.

    A finished run is not made again. Raises UserError for what the user can mend (Elsewhere while another process has
    the run, unless `wait`) and Stopped after a signal; every failure is in status.json too.
    """
    folder = RunFolder(config)
    label = f"{label} {folder.name}".strip()

    def say(line: str) -> None:
        if rank() == 0:
            console.print(redact(f"{label}: {line}"), highlight=False, soft_wrap=True, markup=False)

    with folder.claim(say, wait) if rank() == 0 else nullcontext(), StopRequest(say) as stop:
        done = agreed(folder.result())
        if done is not None:
            if rank() == 0:
                folder.settle()
            say(f"done already, test {done['test_accuracy']:.2f}%{_not_watched(config, folder)}")
            return done
        try:
            if rank() == 0:
                folder.begin()
                folder.set_aside_damaged(say)
            starts, parent = _starts(config, command, console)
            chosen = choice.choose(config)
            if chosen.line is not None:
                say(chosen.line)
            result = _fit(folder.config, folder, starts, parent, command, console, label, stop)
        except BaseException as error:
            raise _failure(folder, error) from error
        say(
            f"test {result['test_accuracy']:.2f}%, {result['kept']:,} of {result['total']:,} weights, "
            f"{result['seconds']:.0f} s"
        )
        if stop.number is not None:  # asked for in the last epoch
            raise stop.stopped("this run is done; start the same command again to go on with the others")
    return result


def _not_watched(config: Config, folder: RunFolder) -> str:
    """A finished run cannot be watched afterwards: which diagnostics are asked for and were not written."""
    asked = {"activations": config.diagnostics.activations, "gradients": config.diagnostics.gradients}
    missing = [name for name, wanted in asked.items() if wanted and not (folder.path / f"{name}.jsonl").exists()]
    return f"; made without diagnostics of {', '.join(missing)}: remove its folder to make it again" if missing else ""


def _starts(config: Config, command: str, console: Console) -> tuple[dict[str, Path], str | None]:
    """Make (or find) the runs that this one starts from: name of the part -> its network; and the parent's name."""
    wanted = {
        "parent": stages.parent(config),
        "reference": stages.reference(config),
        "rewound": stages.rewound(config),
    }
    if config.method.regrows:
        wanted["dense"] = stages.dense(config)
    starts: dict[str, Path] = {}
    names: dict[str, str] = {}
    for part, other in wanted.items():
        if other is not None:
            names[part] = run(other, command, console, label="  needed first:", wait=True)["name"]
            starts[part] = RunFolder(other).best
    if config.method.regrows and config.method.regrow.reference is not None:
        starts["reference"] = Path(config.method.regrow.reference)
    return starts, names.get("parent")


def _fit(
    config: Config,
    folder: RunFolder,
    starts: dict[str, Path],
    parent: str | None,
    command: str,
    console: Console,
    label: str,
    stop: StopRequest,
) -> dict[str, Any]:
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    pl.seed_everything(config.seed, verbose=False)
    reset_peak_memory()
    device = device_of(config.trainer.accelerator, rank())
    processes = config.trainer.devices
    batches = data.build(config.dataset, config.training, config.seed, device, rank(), processes)
    parts = assemble(config, batches, folder, starts, console, label, stop, device)
    trainer = make_trainer(config, parts, folder)
    resume = agreed(folder.newest())
    if resume is not None and not load(resume).keys() >= RESUMABLE:
        raise UserError(f"{resume} is not a checkpoint of this run: remove it and start the same command again")
    stop.say(f"goes on from {resume.name}" if resume else f"started{f' from {parent}' if parent else ''}")
    trainer.fit(parts.module, batches.train, batches.validation, ckpt_path=resume, weights_only=True)
    stop.line = f"saved at step {trainer.global_step:,}, the last one; start the same command again for the result"
    result = outcome(config, parts, batches, folder, parent, command)
    if rank() == 0:
        about = {"run": folder.name, **{key: result[key] for key in ("sparsity", "kept", "kept_with_reuse")}}
        # loads into a plain network, or through models.surgery.match
        save_network(unshared(parts.model), folder.best, about)
        if config.method.prunes_filters:
            small, result["small"] = removed(config, parts, batches)
            save_network(small, folder.small, about)
        folder.finish(result)
    trainer.strategy.barrier()  # the other processes of this run go on from what was just written
    stop.wanted(trainer)  # of a signal that came after the last step all of them know, or none
    return result


def _failure(folder: RunFolder, error: BaseException) -> BaseException:
    """Put the failure on record; a full disk becomes one clear line."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        error = UserError(
            f"the disk is full: {folder.path} holds what was saved before; make room and start the same command again"
        )
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if rank() != 0:
        return error
    try:
        if isinstance(error, Stopped):
            folder.interrupt(line)
        else:
            said = line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"
            folder.fail(said, traceback.format_exc())
    except OSError:
        pass  # nothing can be written any more: the error itself still reaches the user
    return error
