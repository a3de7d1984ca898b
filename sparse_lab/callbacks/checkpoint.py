"""`checkpoints/last.ckpt`: everything that a run needs to go on, written whole; `previous.ckpt` is the one before."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from sparse_lab.coding.packed_state import packed, unpacked
from sparse_lab.errors import SparseLabError
from sparse_lab.records.lock import Moved
from sparse_lab.records.run_dir import RunDir
from sparse_lab.training.accumulation import steps_after
from sparse_lab.training.checkpoint_io import random_state, replacing, set_random_state
from sparse_lab.training.signals import AGAIN, Stopped, StopRequest

# validation has begun and no batch of it is done: with these counts Lightning does it again, from its first batch
VALIDATION = "epoch_loop.val_loop.batch_progress"
BEGUN = {"ready": 1, "started": 1, "processed": 0, "completed": 0}


class Checkpoint(pl.Callback):
    """Saves every `every` epochs, at the last one and before a long scoring, and when the run is asked to stop.

    A signal that comes within a step, be it of several batches, is heeded after it. Elsewhere nothing may be computed
    for long that could not be left at once: until the first step is done the run would go on from where it began; from
    the start of validation to the end of the epoch what the epoch's last step has left is held in memory, and written
    on the way out; and where a scoring comes next that passes over data (`scores_next`), it is on disk already. Several
    processes leave together, after a step or an epoch.

    computed: how this process computes, where that may change the last bits; a run that goes on under another one knows
    of both.

    Must stand last in the list of callbacks, or raises SparseLabError: what the others change at a step's or an epoch's
    end is then inside.
    """

    def __init__(
        self,
        folder: RunDir,
        every: int,
        finished: Callable[[], bool],
        scores_next: Callable[[], bool],
        stop: StopRequest,
        computed: dict[str, Any],
    ) -> None:
        self.folder = folder
        self.every = every
        self.finished = finished
        self.scores_next = scores_next
        self.stop = stop
        self.computed = [computed]
        self._together = False  # with other processes
        self._stepped = False
        self._goes_on_at: int | None = None  # the step from which the run would go on
        self._held: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.callbacks[-1] is not self:  # type: ignore[attr-defined]
            raise SparseLabError("Checkpoint must stand last in the list of callbacks: it saves what the others change")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        restored = self.__dict__.pop("_random_state", None)
        if restored is not None:
            set_random_state(restored)
        self._goes_on_at = trainer.global_step
        self._together = trainer.world_size > 1
        self.stop.listen()
        self.stop.training = self._together

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.stop.training = self._together or self._stepped

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # a run that goes on does so from an optimizer step: gradients that have not stepped yet are saved nowhere
        if not steps_after(batch_idx, int(trainer.num_training_batches), trainer.accumulate_grad_batches):
            return
        self._stepped = self.stop.training = True
        if batch_idx + 1 == trainer.num_training_batches:
            return  # its validation and its row in metrics.csv belong to it
        if self.stop.wanted(trainer):
            self._save(trainer)
            raise self.stop.stopped(self._line())
        self._prepare(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # of a run that goes on from here: it counts the validation that was left as well
        trainer.fit_loop.epoch_loop.val_loop.batch_progress.reset()
        if not self._together:
            self._held = self._hold(trainer)
            self.stop.at_once()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop.training = True
        stop = self.stop.wanted(trainer)
        if stop or (trainer.current_epoch + 1) % self.every == 0 or self.finished():
            self._save(trainer)
        self._held = None
        if stop:
            raise self.stop.stopped(self._line())
        self._prepare(trainer)

    def _prepare(self, trainer: pl.Trainer) -> None:
        """Before a long scoring, or the record of a run that is done: save, and from here on stop at once."""
        if self._together or not (self.finished() or self.scores_next()):
            return
        if self._goes_on_at != trainer.global_step:
            self._save(trainer)
        self.stop.at_once()

    def leave(self, trainer: pl.Trainer, stopped: Stopped) -> None:
        """Write what is held, if anything is, and say where the run goes on."""
        if self._held is not None:
            held, self._held = self._held, None
            with suppress(Moved), self._replacing(trainer) as temporary:  # said by who made the run
                trainer.strategy.save_checkpoint(held, temporary)
                self._goes_on_at = held["global_step"]
        stopped.line = self._line()

    def _line(self) -> str:
        if self._goes_on_at is None:  # a checkpoint may just have been read
            return self.stop.line
        saved = f"saved at step {self._goes_on_at:,}" if self._goes_on_at else "nothing was trained yet"
        return f"{saved}; {AGAIN}"

    def _hold(self, trainer: pl.Trainer) -> dict[str, Any]:
        """The checkpoint of this moment, to be written while only the weights have changed since."""
        strategy, memory = trainer.strategy, InMemory()
        io, strategy.checkpoint_io = strategy.checkpoint_io, memory
        try:
            trainer.save_checkpoint("held")
        finally:
            strategy.checkpoint_io = io
        held = memory.checkpoint
        # the weights of the best epoch come back at a round's end, before the test set is read
        held["state_dict"] = {name: value.clone() for name, value in held["state_dict"].items()}
        held["loops"]["fit_loop"][VALIDATION] |= {"total": dict(BEGUN), "current": dict(BEGUN)}
        return held

    def _replacing(self, trainer: pl.Trainer) -> AbstractContextManager[Path]:
        last = self.folder.to_write(self.folder.last)
        return replacing(last, self.folder.previous, writes=trainer.is_global_zero)

    def _save(self, trainer: pl.Trainer) -> None:
        with self._replacing(trainer) as temporary:
            trainer.save_checkpoint(temporary)
        self._goes_on_at = trainer.global_step

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["random_state"] = random_state()
        checkpoint["run"] = self.folder.name
        checkpoint["computed"] = self.computed

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._random_state = checkpoint["random_state"]
        before = list(checkpoint["computed"])
        self.computed = before + [one for one in self.computed if one not in before]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.stop.training = False


class CheckpointOnExit(pl.Callback):
    """Must stand first in the list of callbacks: on the way out saving comes before others wait for a dashboard."""

    def __init__(self, save: Checkpoint) -> None:
        self.save = save

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Stopped):
            self.save.leave(trainer, exception)


class Straight(TorchCheckpointIO):
    """Writes where it is told to: Lightning's own writes among the temporary files and copies that, and where the disk
    is full there it looks as if it were here. What is masked takes no room.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with open(path, "wb") as file:
            torch.save(packed(checkpoint), file)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return unpacked(super().load_checkpoint(path, *args, **kwargs), path)


class InMemory(TorchCheckpointIO):
    """Keeps a checkpoint as it is, where another would write a file."""

    checkpoint: dict[str, Any]

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.checkpoint = checkpoint
