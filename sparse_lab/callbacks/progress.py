"""What a person sees while a run trains: two live lines in a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sparse_lab.callbacks.rounds import Rounds

DRAW_SECONDS = 0.25  # between two pictures
READ_SECONDS = 2.0  # between two readings from the device: each waits for what it still has to do
QUIET_SECONDS = 5.0  # between two plain lines, at the end of an epoch
SILENT_SECONDS = 60.0  # the same, within an epoch


class Progress(pl.Callback):
    """Loss and accuracy on the training images of this epoch so far, and on validation; sparsity and kept weights;
    images a second of training alone; the time left if the rest is as fast as it was since the start of the process.

    kept: sparsity and kept weights as they are now. Only rank 0 shows anything.
    """

    def __init__(self, label: str, rounds: Rounds, kept: Callable[[], dict[str, Any]], console: Console) -> None:
        self.label = label
        self.rounds = rounds
        self.kept = kept
        self.console = console
        self.live: Live | None = None
        self.figures: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epoch, self.round = trainer.current_epoch, self.rounds.clock.round
        self._spoke = self._drew = self._read = self._began = time.monotonic()
        self._first = self.rounds.clock.step
        self._images, self._epoch_began = 0, self._began  # a run that goes on within an epoch is not told of its start
        self.figures = {**self.figures, **self.kept()}
        if self.console.is_terminal and trainer.is_global_zero:
            self.live = Live(self._picture(), console=self.console, transient=True, auto_refresh=False)
            self.live.start(refresh=True)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epoch, self.round = trainer.current_epoch, self.rounds.clock.round
        self._images, self._epoch_began = 0, time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        self._images += len(batch[1]) * trainer.world_size
        now = time.monotonic()
        if now - self._read >= READ_SECONDS or trainer.is_last_batch:
            self._look()
        if self.live is not None:
            if now - self._drew >= DRAW_SECONDS:
                self._draw()
        elif now - self._spoke >= SILENT_SECONDS:
            self._speak()

    def _look(self) -> None:
        """Read from the device, which has then done all that it was asked to: the rate is that of real work."""
        loss, hits, images = self.rounds.figures.so_far("train")  # with several processes: this one's share
        self.figures |= {"train_loss": loss / images, "train_accuracy": 100.0 * hits / images, **self.kept()}
        self._read = time.monotonic()
        self.figures["rate"] = self._images / max(self._read - self._epoch_began, 1e-9)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self.figures |= {**self.rounds.row, **self.kept()}
        if self.live is not None:
            self._draw()
        elif time.monotonic() - self._spoke >= QUIET_SECONDS:
            self._speak()

    def _draw(self) -> None:
        assert self.live is not None
        self._drew = time.monotonic()
        self.live.update(self._picture(), refresh=True)

    def _speak(self) -> None:
        self._spoke = time.monotonic()
        words = ", ".join([*self._where(), *self._learned(), *self._weights(), *self._pace()])
        self.console.print(f"  {self.label}: {words}", highlight=False, soft_wrap=True, markup=False)

    def _picture(self) -> Group:
        """Two lines that fit into 80 columns; a narrower terminal cuts them off, it does not wrap them."""
        clock = self.rounds.clock
        top = Text("  " + "  ".join([*self._where(), *self._learned()]), no_wrap=True, overflow="ellipsis")
        bar = ProgressBar(clock.total_epochs * clock.steps_an_epoch, clock.step, width=14)
        words = Text("  ".join([*self._weights(), *self._pace()]), no_wrap=True, overflow="ellipsis")
        bottom = Table.grid(padding=(0, 2))
        bottom.add_row("", bar, words)
        return Group(top, bottom)

    def _where(self) -> list[str]:
        clock = self.rounds.clock
        rounds = [f"round {min(self.round + 1, clock.rounds)}/{clock.rounds}"] if clock.rounds > 1 else []
        return [f"epoch {min(self.epoch + 1, clock.total_epochs)}/{clock.total_epochs}", *rounds]

    def _learned(self) -> list[str]:
        known = self.figures
        words = [f"loss {known['train_loss']:.3f}"] if "train_loss" in known else []
        for key, name in (("train_accuracy", "train"), ("validation_accuracy", "validation")):
            words += [f"{name} {known[key]:.1f}%"] if key in known else []
        return words

    def _weights(self) -> list[str]:
        return [f"sparsity {100 * self.figures['sparsity']:.5g}%", f"{int(self.figures['kept']):,} kept"]

    def _pace(self) -> list[str]:
        clock = self.rounds.clock
        done = clock.step - self._first
        left = (clock.total_epochs * clock.steps_an_epoch - clock.step) / done if done > 0 else None
        words = [f"{self.figures['rate']:,.0f} img/s"] if "rate" in self.figures else []
        return words if left is None else [*words, f"{span(left * (time.monotonic() - self._began))} left"]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.live is not None:
            self.live.stop()


def span(seconds: float) -> str:
    """A length of time, short: 0:07, 12:34, 3:04:05, and 2d 3h."""
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24}h"
    return f"{hours}:{minutes:02}:{whole:02}" if hours else f"{minutes}:{whole:02}"
