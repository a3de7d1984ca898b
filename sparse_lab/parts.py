"""From a config to the parts of a run: network, masks, clock, callbacks, trainer."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger
from rich.console import Console
from torch import nn

from sparse_lab import models, stages
from sparse_lab.callbacks.connectivity_watch import ConnectivityWatch
from sparse_lab.callbacks.dashboards import Dashboards
from sparse_lab.callbacks.diverged import StopWhenDiverged
from sparse_lab.callbacks.history import History
from sparse_lab.callbacks.keep_masks import KeepMasks
from sparse_lab.callbacks.progress import Progress
from sparse_lab.callbacks.prune import Prune
from sparse_lab.callbacks.regrow import Regrow, check_layers
from sparse_lab.callbacks.rounds import Rounds
from sparse_lab.callbacks.save_last import SaveLast
from sparse_lab.config import Config, RecipeConfig
from sparse_lab.data import Data
from sparse_lab.record import RunFolder, digest, identity
from sparse_lab.sparsity.masks import Masks, count, kept_for
from sparse_lab.sparsity.schedules import Constant, Cubic, Iterative, OneShot, Regrowth, Schedule
from sparse_lab.training.clock import Clock
from sparse_lab.training.files import into, load_network
from sparse_lab.training.module import Classifier


@dataclass
class Parts:
    model: nn.Module
    masks: Masks | None
    clock: Clock
    module: Classifier
    rounds: Rounds
    callbacks: list[pl.Callback]


def rank() -> int:
    """Which process of a DDP run this is; 0 everywhere else."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def build_model(config: Config) -> nn.Module:
    """The plain network of `config`."""
    model, data = config.model, config.dataset
    return models.build(model.name, data.num_classes, model.width, data.image_size, model.weights)


def recipe_of(config: Config) -> RecipeConfig:
    """The recipe of the run's last part."""
    if config.method.goes_on:
        return config.training.regrow
    if not config.method.prunes:
        return config.training
    if config.method.prune.rewind_lr:
        return replace(config.training, epochs=config.training.finetune.epochs)
    return config.training.finetune


def clock_of(config: Config, steps_an_epoch: int) -> Clock:
    """How many rounds of how many epochs the run's last part has."""
    epochs = recipe_of(config).epochs
    if config.method.goes_on:
        return Clock(config.method.regrow.steps, epochs, steps_an_epoch)
    if config.method.prunes and config.schedule.name == "iterative":
        rounds = Iterative(config.sparsity.target, config.schedule.share, every=1).rounds()
        return Clock(rounds, config.schedule.round_epochs or max(1, epochs // rounds), steps_an_epoch)
    return Clock(1, epochs, steps_an_epoch)


def schedule_of(config: Config, clock: Clock) -> Schedule:
    """When the masks of the run's last part change."""
    target, chosen, steps = config.sparsity.target, config.schedule, clock.steps_a_round
    if config.method.goes_on:
        start, end = stages.regrowth_start(config), stages.final_sparsity(config)
        return Regrowth(start, end, config.method.regrow.steps, steps)
    if chosen.name == "iterative":
        return Iterative(target, chosen.share, every=steps)
    if chosen.name == "cubic":
        end = min(math.floor(chosen.end * steps), steps - 1)
        return Cubic(target, math.floor(chosen.begin * steps), end, chosen.every, chosen.initial)
    return Constant(target) if chosen.name == "constant" else OneShot(target)


def assemble(
    config: Config, data: Data, folder: RunFolder, starts: dict[str, Path], console: Console, label: str
) -> Parts:
    """Everything that trains. `starts` holds the networks to start from: 'parent', and for regrowth 'dense',
    'reference'.
    """

    def say(line: str) -> None:
        if rank() == 0:
            console.print(f"  {line}", highlight=False, soft_wrap=True, style="bold red" if "WARNING" in line else None)

    model = build_model(config)
    masks = Masks(model) if config.method.prunes else None
    if "parent" in starts:
        into(model, load_network(starts["parent"]), starts["parent"])
    clock = clock_of(config, len(data.train))
    module = Classifier(model, recipe_of(config), clock, config.training.label_smoothing)
    watch = ConnectivityWatch(model, config.dataset.image_size, config.sparsity.require_connected, say)
    changes = _mask_changes(config, data, masks, clock, starts, watch)
    rounds = Rounds(
        clock,
        config.training.select,
        module.recipe.patience,
        data.test,
        _at_target(config, masks, clock),
        _measure(model, masks, watch),
        say,
    )
    keep = [] if masks is None else [KeepMasks(masks)]
    history = History(folder, clock, lambda: {**rounds.row, **_kept(model, masks)})
    boards = Dashboards(dashboards(config, folder), history.row, say)
    save = SaveLast(folder.last, config.trainer.checkpoint_every, lambda: clock.finished)
    progress = [Progress(label, rounds, console)] if config.trainer.progress else []
    callbacks = [rounds, *keep, *changes, StopWhenDiverged(), history, boards, *progress, save]
    return Parts(model, masks, clock, module, rounds, callbacks)


def _mask_changes(
    config: Config, data: Data, masks: Masks | None, clock: Clock, starts: dict[str, Path], watch: ConnectivityWatch
) -> list[pl.Callback]:
    method, regrow = config.method, config.method.regrow
    if masks is None or (method.goes_on and (not method.regrows or regrow.score == "none")):
        return []
    schedule = schedule_of(config, clock)
    if not method.regrows:
        return [Prune(method.prune, schedule, masks, clock, data.train.fixed, config.seed, watch)]
    dense_model = build_model(config)
    check_layers(regrow, dense_model)
    into(dense_model, load_network(starts["dense"]), starts["dense"])
    reference = None
    if "reference" in starts:
        state = load_network(starts["reference"])
        reference = {name: state[f"{name}.weight"] for name in masks.layers}
    return [Regrow(regrow, schedule, masks, clock, dense_model, reference, data.train.fixed, config.seed, watch)]


def _at_target(config: Config, masks: Masks | None, clock: Clock) -> Callable[[], bool]:
    if masks is None:
        return lambda: True
    schedule, total = schedule_of(config, clock), masks.total()
    return lambda: masks.kept() == kept_for(schedule.sparsity((clock.round + 1) * clock.steps_a_round - 1), total)


def _kept(model: nn.Module, masks: Masks | None) -> dict[str, Any]:
    total = count(model)
    kept = total if masks is None else masks.kept()
    return {"sparsity": 1.0 - kept / total, "kept": kept}


def _measure(model: nn.Module, masks: Masks | None, watch: ConnectivityWatch) -> Callable[[], dict[str, Any]]:
    return lambda: {**_kept(model, masks), "effective": (watch.last or watch()).as_dict()}


def dashboards(config: Config, folder: RunFolder) -> dict[str, Callable[[], Logger]]:
    """How to open the dashboards chosen. W&B stays offline unless a key is set, and never asks."""

    def tensorboard() -> Logger:
        from pytorch_lightning.loggers import TensorBoardLogger

        return TensorBoardLogger(folder.path, name="tensorboard", version="")

    def wandb() -> Logger:
        from pytorch_lightning.loggers import WandbLogger

        os.environ.setdefault("WANDB_SILENT", "true")
        logger = WandbLogger(
            name=folder.name,
            id=digest(identity(config)),
            project=config.logger.project,
            save_dir=folder.path,
            group=f"{config.method.name}-{stages.final_sparsity(config):g}",
            offline="WANDB_API_KEY" not in os.environ,
            resume="allow",
        )
        logger.experiment.config.update(identity(config))
        return logger

    chosen = {"tensorboard": (config.logger.tensorboard, tensorboard), "wandb": (config.logger.wandb, wandb)}
    return {name: factory for name, (wanted, factory) in chosen.items() if wanted}


def make_trainer(config: Config, parts: Parts, folder: RunFolder) -> pl.Trainer:
    """A Lightning trainer that writes nothing of its own: what a run leaves on disk is ours."""
    trainer = config.trainer
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*GPU available but not used.*|.*LeafSpec.*")
    profiler = None
    if trainer.profiler is not None:
        kind = {"simple": pl.profilers.SimpleProfiler, "advanced": pl.profilers.AdvancedProfiler}[trainer.profiler]
        profiler = kind(dirpath=folder.path, filename="profile")
    return pl.Trainer(
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        strategy="ddp" if trainer.devices > 1 else "auto",
        precision=trainer.precision,  # type: ignore[arg-type]
        deterministic=trainer.deterministic,
        max_epochs=parts.clock.total_epochs,
        gradient_clip_val=parts.module.recipe.clip_norm,
        callbacks=parts.callbacks,
        logger=False,
        profiler=profiler,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
