"""What a person sees while a run trains: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from sparse_lab.callbacks.rounds import Rounds

QUIET_SECONDS = 5.0  # between two plain lines


class Progress(pl.Callback):
    """Counts steps of the whole run; shows loss and accuracy of the last epoch beside them."""

    def __init__(self, label: str, rounds: Rounds, console: Console) -> None:
        self.label = label
        self.rounds = rounds
        self.console = console
        self.bar: Bar | None = None
        self._spoke = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._spoke = time.monotonic()
        if not self.console.is_terminal or not trainer.is_global_zero:
            return
        clock = self.rounds.clock
        self.bar = Bar(
            TextColumn("  {task.fields[figures]}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            console=self.console,
            transient=True,
        )
        total = clock.total_epochs * clock.steps_an_epoch
        self.task = self.bar.add_task("", total=total, completed=clock.step, figures="first epoch")
        self.bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=self.rounds.clock.step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        row = self.rounds.row
        figures = (
            f"epoch {row['epoch']}/{self.rounds.clock.total_epochs} loss {row['train_loss']:.3f} "
            f"train {row['train_accuracy']:.1f}% validation {row['validation_accuracy']:.1f}%"
        )
        if self.bar is not None:
            self.bar.update(self.task, figures=figures)
        elif trainer.is_global_zero and time.monotonic() - self._spoke >= QUIET_SECONDS:
            self._spoke = time.monotonic()
            self.console.print(f"  {self.label}: {figures}", highlight=False, soft_wrap=True)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.bar is not None:
            self.bar.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self.bar is not None:
            self.bar.stop()
