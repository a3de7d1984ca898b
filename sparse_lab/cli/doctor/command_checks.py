"""What is missing for one command: read, composed and checked as if it were to run, with every fault told at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig

from sparse_lab import data, loggers
from sparse_lab.cli.doctor.checks import Finding, room, sparse_arithmetic
from sparse_lab.coding.rice_coding import entropy
from sparse_lab.config import Config
from sparse_lab.errors import SparseLabError
from sparse_lab.experiment import backend
from sparse_lab.experiment.identity import run_dir
from sparse_lab.experiment.validate import check_request
from sparse_lab.host.machine import size, usable_cores
from sparse_lab.methods import table
from sparse_lab.methods.recipes import recipe_of
from sparse_lab.sparsity.masks import layers
from sparse_lab.sweep.plan import Request, check_extra

SLURM = "SlurmLauncher"
SHOWN = 5  # faults of a sweep's jobs that are told; the rest is counted


def look(argv: list[str]) -> Iterator[Finding]:
    """One finding for each thing that the command asks of this machine. What starts it has the last word."""
    told: list[Finding] = []
    for finding in _each(argv):
        told.append(finding)
        yield finding
    if any(finding.needed and not finding.good for finding in told):
        return
    try:
        for line in Request.read(argv).look():
            yield Finding(False, line)
    except SparseLabError as error:
        yield Finding(False, str(error), needed=True)


def _each(argv: list[str]) -> Iterator[Finding]:
    try:
        request = Request.read(argv)
        base = request.read_experiment_axes()
        configs, sound, faults = _jobs(request)
    except SparseLabError as error:
        yield Finding(False, str(error), needed=True)
        return
    yield from _told(faults)
    yield from _plugins(request, base)
    if request.multirun and any(config.trainer.devices > 1 for config in configs):
        way = "run its lines one by one without -m, or trainer.devices=1 hydra/launcher=ray"
        yield Finding(False, f"trainer.devices > 1 (DDP) does not go with -m: {way}", needed=True)
    yield from _devices(configs)
    yield from _arithmetic(sound)
    yield from _loggers(configs)
    yield from _data(configs)
    yield from _room(sound, base)


def _jobs(request: Request) -> tuple[list[Config], list[Config], list[str]]:
    """Every job's config, those of them that could be run anywhere, and what is wrong with the others."""
    configs: list[Config] = []
    sound: list[Config] = []
    faults: dict[str, None] = {}
    composer = request.composer()
    for job in request.corners():
        try:
            config = composer.config(job)
            configs.append(config)
            check_request(config)
            sound.append(config)
        except SparseLabError as error:
            faults[str(error)] = None
    return configs, sound, list(faults)


def _told(faults: list[str]) -> Iterator[Finding]:
    for line in faults[:SHOWN]:
        yield Finding(False, line, needed=True)
    if len(faults) > SHOWN:
        yield Finding(False, f"and {len(faults) - SHOWN} more such faults", needed=True)


def _plugins(request: Request, base: DictConfig) -> Iterator[Finding]:
    for group, plugin in (("launcher", base.hydra.launcher), ("sweeper", base.hydra.sweeper)):
        chosen, target = getattr(request, group), str(plugin.get("_target_"))
        if chosen == "basic":
            continue
        if not request.multirun:
            yield Finding(False, f"hydra/{group}={chosen} has a say under -m alone: add -m")
            continue
        try:
            check_extra(target)
            yield Finding(True, f"hydra/{group}={chosen}")
        except SparseLabError as error:
            yield Finding(False, f"hydra/{group}={chosen}: {error}", needed=True)
        if target.endswith(SLURM) and shutil.which("sbatch") is None:
            way = "start the command on a login node, or take hydra/launcher=joblib or ray"
            yield Finding(False, f"hydra/{group}={chosen}: no sbatch here, so no Slurm: {way}", needed=True)


def _devices(configs: list[Config]) -> Iterator[Finding]:
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    asking = {(config.trainer.accelerator, config.trainer.devices) for config in configs}
    for accelerator, devices in sorted(asking):
        said = f"trainer.accelerator={accelerator} trainer.devices={devices}"
        if accelerator == "gpu" and not here:
            yield Finding(False, f"{said}: torch finds no GPU here: trainer=cpu", needed=True)
        elif accelerator != "cpu" and here and devices > here:
            yield Finding(False, f"{said}: {here} GPU(s) here: trainer.devices={here}", needed=True)
        else:
            yield Finding(True, f"{said}: {'GPU' if accelerator != 'cpu' and here else 'CPU'}")


def _arithmetic(configs: list[Config]) -> Iterator[Finding]:
    """What compute=sparse and compute=auto come to on this machine."""
    said: dict[str, bool] = {}
    for config in configs:
        try:
            backend.check(config, here=True)
            chosen = backend.choose(config)
        except SparseLabError as error:
            said[str(error)] = False
            continue
        if chosen.line is not None:
            said[chosen.line] = True
    for line, good in said.items():
        yield Finding(good, line, needed=not good)
    if any(backend.resolve_backend(config).compute == "sparse" for config in configs):
        yield from sparse_arithmetic(needed=True)


def _loggers(configs: list[Config]) -> Iterator[Finding]:
    asked = {name for config in configs for name in config.logger.names}
    for name in sorted(asked):
        try:
            loggers.check([name])
            online = "online" if "WANDB_API_KEY" in os.environ else "offline, for WANDB_API_KEY is not set"
            yield Finding(True, f"logger={name}{f' ({online})' if name == 'wandb' else ''}")
        except SparseLabError as error:
            yield Finding(False, str(error), needed=True)


def _data(configs: list[Config]) -> Iterator[Finding]:
    for dataset in {repr(config.dataset): config.dataset for config in configs}.values():
        try:
            data.check(replace(dataset, download=False))
            yield Finding(True, f"dataset={dataset.name} in {dataset.root}")
        except (SparseLabError, OSError) as error:
            fetched = dataset.download and _could_be_fetched(dataset.name)
            line = f"dataset={dataset.name} is fetched at the start: the network is needed" if fetched else str(error)
            yield Finding(False, line, needed=not fetched)


def _could_be_fetched(name: str) -> bool:
    return name in ("cifar10", "cifar100", "fashion_mnist")


def _room(configs: list[Config], base: DictConfig) -> Iterator[Finding]:
    """What the runs that are still to be made will leave, and what those at work hold beside it."""
    if not configs:
        yield from room(Path(base.paths.outputs))
        return
    left: dict[str, Config] = {}
    for config in configs:
        _still_to_make(config, left)
    kept, working = [], []
    for config in left.values():
        kept.append(sum(checkpoint_bytes(config, config.sparsity.target)))
        # the one before and the one being written, each with the best so far, and many a run begins dense
        working.append(2 * sum(checkpoint_bytes(config, 0.0)))
    at_once = int(base.hydra.launcher.get("n_jobs") or 1)
    at_once = at_once if at_once > 0 else usable_cores()
    wanted = sum(kept) + sum(sorted(working, reverse=True)[:at_once])
    done = "" if left else "; all of it is done already"
    yield Finding(True, f"runs to make: {len(left)}, with those needed first, {size(wanted)} of checkpoints{done}")
    yield from room(Path(base.paths.outputs), wanted)


def _still_to_make(config: Config, left: dict[str, Config]) -> None:
    try:
        folder = run_dir(config)
        if folder.name in left or folder.result() is not None:
            return
    except OSError:  # a folder that cannot be read: `room` says so
        return
    left[folder.name] = config
    for first in table.starts(config).values():
        _still_to_make(first, left)


def checkpoint_bytes(config: Config, sparsity: float) -> tuple[int, int]:
    """(last.ckpt, best.ckpt) in bytes, about, at a sparsity: the network and its masks, with the optimizer's state and
    without. What is masked takes no room once half of the weights are.
    """
    model = table.altered_meta_network(config)
    network = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    trained = sum(value.numel() * value.element_size() for value in model.parameters())
    if config.method.prune is not None:
        weights = [module.weight for module in layers(model).values()]
        counted = sum(weight.numel() for weight in weights)
        if sparsity < 0.5:
            network += counted
        else:
            left_out = sparsity * sum(weight.numel() * weight.element_size() for weight in weights)
            network += round(entropy(1.0 - sparsity) * counted / 8 - left_out)
            trained -= round(left_out)
    recipe = recipe_of(config)
    state = 2 if recipe.optimizer != "sgd" else int(recipe.momentum > 0)
    return network + state * trained, network
