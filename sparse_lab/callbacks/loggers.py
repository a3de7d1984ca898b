"""Feeds the dashboards beside metrics.csv: extra, never needed. One that is down is said once; the run goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl

from sparse_lab.callbacks.mask_logger import MaskLogger
from sparse_lab.callbacks.rounds import Rounds
from sparse_lab.loggers import LoggerThread, RunInfo, RunLogger, close_all, left_out, reason

LEVEL = ("level", "sparsity", "kept", "validation_accuracy", "test_accuracy")
SUMMARY = ("test_accuracy", "validation_accuracy", "kept", "sparsity")


class Loggers(pl.Callback):
    """One row an epoch: that of metrics.csv, what the masks are, the levels that were passed; at the end all levels as
    a table, and the last one as the summary. Closed whatever happens.

    The trainer does not know of the dashboards: it would open them unguarded.
    """

    def __init__(
        self,
        factories: dict[str, Callable[[], RunLogger]],
        about: RunInfo,
        row: Callable[[], dict[str, Any]],
        rounds: Rounds,
        mask_log: MaskLogger,
        say: Callable[[str], None],
    ) -> None:
        self.factories = factories
        self.about = about
        self.row = row
        self.rounds = rounds
        self.mask_log = mask_log
        self.say = say
        self.feeds: list[LoggerThread] = []
        self._seen = -1  # mask changes

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._open(trainer)

    def _open(self, trainer: pl.Trainer) -> None:
        self._levels = len(self.rounds.levels)
        about = dataclasses.replace(self.about, step=trainer.global_step)
        factories, self.factories = self.factories, {}  # opened once
        for name, make in factories.items() if trainer.is_global_zero else ():
            try:
                board = make()
            except Exception as error:  # an SDK that cannot even be imported
                self.say(left_out(name, reason(error)))
            else:
                self.feeds.append(LoggerThread(name, board, about, self.say))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not any(feed.alive for feed in self.feeds):
            return
        row = self.row()
        step = row.pop("step")
        figures = {name: float(value) for name, value in {**row, **self._level(), **self._masks()}.items()}
        for feed in self.feeds:
            feed.send(lambda board=feed.board: board.log(figures, step))  # type: ignore[misc]

    def _level(self) -> dict[str, float]:
        """The level that has just ended, if one has."""
        new = self.rounds.levels[self._levels :]
        self._levels += len(new)
        if not new:
            return {}
        self._seen = -1  # the masks of its best epoch came back
        return {"level" if name == "level" else f"level/{name}": new[-1][name] for name in LEVEL}

    def _masks(self) -> dict[str, float]:
        """Where masks have changed since the last row: how much of what they keep has an effect, density by layer."""
        masks = self.mask_log.masks
        if masks is None or self._seen == self.mask_log.changes:
            return {}
        self._seen = self.mask_log.changes
        found, kept = self.mask_log.look(), masks.kept_by_layer()
        figures = {f"density/{name}": kept[name] / mask.numel() for name, mask in masks.masks().items()}
        if found.effective is not None:
            figures["masks/effective_share"] = found.effective / max(found.kept, 1)
        if self.mask_log.explored is not None:
            figures["masks/explored"] = self.mask_log.explored
        return figures

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training ended as it should; a run that was killed behind its last epoch comes here at once."""
        self._open(trainer)
        levels, step = self.rounds.levels, trainer.global_step
        if not levels:
            return
        summary = {name: float(levels[-1][name]) for name in SUMMARY}
        rows = [[float(level[name]) for name in LEVEL] for level in levels]
        for feed in self.feeds:
            feed.send(lambda board=feed.board: board.summary(summary, step))  # type: ignore[misc]
            feed.send(lambda board=feed.board: board.table("levels", LEVEL, rows, step))  # type: ignore[misc]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close(failed=False)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close(failed=True)

    def _close(self, failed: bool) -> None:
        feeds, self.feeds = self.feeds, []
        close_all(feeds, failed)
