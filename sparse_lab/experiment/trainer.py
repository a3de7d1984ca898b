"""Lightning's trainer as runs need it: it writes nothing of its own, and computes the same bits each time."""

from __future__ import annotations

import os
import warnings

import pytorch_lightning as pl
import torch

from sparse_lab.callbacks.checkpoint import Straight
from sparse_lab.config import Config
from sparse_lab.experiment.build import Parts
from sparse_lab.methods.table import present
from sparse_lab.records.run_dir import RunDir
from sparse_lab.training.device import device_of
from sparse_lab.training.step import resolve_compile_mode

# hooks that Lightning calls in every step
IN_STEPS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


def leave_out(callback: pl.Callback) -> None:
    """Lightning calls every hook of every callback, those that do nothing too: a third of a millisecond a step. It
    leaves out what cannot be called.
    """
    for hook in IN_STEPS:
        if getattr(type(callback), hook) is getattr(pl.Callback, hook):
            setattr(callback, hook, None)


def make_trainer(config: Config, parts: Parts, folder: RunDir) -> pl.Trainer:
    """A Lightning trainer that writes nothing of its own: what a run leaves on disk is ours."""
    trainer = config.trainer
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*GPU available but not used.*|.*LeafSpec.*")
    profiler = None
    if trainer.profiler is not None:
        kind = {"simple": pl.profilers.SimpleProfiler, "advanced": pl.profilers.AdvancedProfiler}[trainer.profiler]
        profiler = kind(dirpath=folder.path, filename="profile")
    device = device_of(trainer.accelerator)
    on_gpu = device.type == "cuda"
    _only_deterministic(trainer.deterministic, device, compiles=resolve_compile_mode(trainer.compile, device) == "full")
    # a pass over every new tensor, for nothing: none is read before it is written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    for callback in parts.callbacks:
        leave_out(callback)
    return pl.Trainer(
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        strategy=_strategy(config),
        precision=trainer.precision,  # type: ignore[arg-type]
        benchmark=on_gpu and not trainer.deterministic,
        max_epochs=parts.clock.total_epochs,
        accumulate_grad_batches=config.training.accumulate,
        gradient_clip_val=parts.module.recipe.clip_norm,
        callbacks=parts.callbacks,
        plugins=[Straight()],
        logger=False,
        profiler=profiler,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _strategy(config: Config) -> str:
    if config.trainer.devices == 1:
        return "auto"
    # DDP would wait for the gradients of parameters that leave in the middle of the training
    leave = any(one.removes_parameters for one in present(config.method))
    return "ddp_find_unused_parameters_true" if leave else "ddp"


def _only_deterministic(wanted: bool, device: torch.device, compiles: bool) -> None:
    """trainer.deterministic, as Lightning would set it; but what torch compiles with is imported only where something
    is compiled.
    """
    # torch calls max-pooling's gradient nondeterministic on a GPU; where windows do not overlap it is not
    # (and where they do, the request is refused)
    mode = "default" if not wanted else "warn" if device.type == "cuda" else "error"
    if compiles:
        torch.use_deterministic_algorithms(wanted, warn_only=mode == "warn")
    else:
        torch.set_deterministic_debug_mode(mode)
    if wanted:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
