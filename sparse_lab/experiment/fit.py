"""The training of one run: build the parts, fit, record."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from rich.console import Console

from sparse_lab import data
from sparse_lab.config import Config
from sparse_lab.experiment.build import assemble
from sparse_lab.experiment.identity import surroundings
from sparse_lab.experiment.result import make_result, remove_channels_of
from sparse_lab.experiment.selection import check_selection
from sparse_lab.experiment.trace_file import save_trace_of
from sparse_lab.experiment.trainer import make_trainer
from sparse_lab.experiment.validate import check_step
from sparse_lab.models.weight_sharing import unshared
from sparse_lab.records.run_dir import RunDir
from sparse_lab.records.system import reset_peak_memory
from sparse_lab.sparsity.processes import are_connected, broadcast_from_rank0, rank
from sparse_lab.training.checkpoint_io import load_checkpoint, save_network
from sparse_lab.training.device import device_of
from sparse_lab.training.signals import StopRequest

RESUMABLE = {"state_dict", "callbacks", "optimizer_states", "random_state", "trained", "run"}


def fit(
    config: Config,
    folder: RunDir,
    starts: dict[str, Path],
    parent: str | None,
    command: str,
    console: Console,
    label: str,
    job: str,
    stop: StopRequest,
) -> dict[str, Any]:
    """Train what `config` asks for, from the networks in `starts` on, and return the record that stands in `folder`.

    Raises Stopped after a signal, UserError where too few images would select an epoch.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    pl.seed_everything(config.seed, verbose=False)
    reset_peak_memory()
    device = device_of(config.trainer.accelerator, rank())
    around = surroundings(config)
    processes = config.trainer.devices
    batches = data.build(config.dataset, config.training, config.seed, device, rank(), processes)
    check_selection(config, batches.images)
    check_step(config, min(config.training.batch_size, batches.train.count))
    parts = assemble(config, batches, folder, starts, console, label, job, stop, device)
    trainer = make_trainer(config, parts, folder)
    # a process that the first one has started for this run asks nobody yet, and finds what that one has left there
    looks = rank() == 0 or not are_connected()
    resume = broadcast_from_rank0(_own_checkpoint(folder, stop.say) if looks else None)
    stop.say(f"goes on from {resume.name}" if resume else f"started{f' from {parent}' if parent else ''}")
    trainer.fit(parts.module, batches.train, batches.validation, ckpt_path=resume, weights_only=True)
    stop.line = f"saved at step {trainer.global_step:,}, the last one; start the same command again for the result"
    result = make_result(config, parts, batches, folder, parent, command)
    if rank() == 0:
        about = {"run": folder.name, **{key: result[key] for key in ("sparsity", "kept", "nonzero", "kept_with_reuse")}}
        # loads into a plain network, or through models.surgery.rebuild_structure
        save_network(unshared(parts.model), folder.to_write(folder.best), about)
        small = None
        if config.method.filters:
            small, result["small"] = remove_channels_of(config, parts, batches)
            save_network(small, folder.to_write(folder.small), about)
        save_trace_of(config, parts.model, small, folder, stop.say)
        data.look_again()
        if surroundings(config) != around:
            stop.say("WARNING: the files of the data set have changed while it trained: the record says so")
            result["data"]["changed"] = True
        result["networks"] = folder.networks()
        folder.finish(result)
    trainer.strategy.barrier()  # the other processes of this run go on from what was just written
    stop.wanted(trainer)  # of a signal that came after the last step all of them know, or none
    return result


def _own_checkpoint(folder: RunDir, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint here that this run saved. Those of other runs, or of other programs, are set aside."""
    while (path := folder.newest()) is not None:
        found = load_checkpoint(path)
        if found.keys() >= RESUMABLE and found["run"] == folder.name:
            return path
        whose = f"run {found['run']}" if isinstance(found.get("run"), str) else "another version or program"
        folder.set_aside(path, "foreign", f"is of {whose}", say)
    return None
