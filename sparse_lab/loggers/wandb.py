"""Weights & Biases: one W&B run a run, under the run's own hash."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_lab.loggers.base import RunInfo

FINISH_SECONDS = 20.0  # for uploads at the end; what is left stays on disk for `wandb sync`


class Wandb:
    """Offline unless WANDB_API_KEY is set or WANDB_MODE says otherwise; never a prompt, never a word on the screen.

    A run that goes on keeps its id. Online the same W&B run is resumed, and rows of steps that it has already are
    dropped by W&B. Offline every start writes a folder wandb/offline-run-TIME-HASH of its own, with the rows from
    there on (steps trained twice after a kill are in two of them); `wandb sync` sends folders of one id in the order
    of their start into one run.
    """

    def __init__(self) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.wandb = wandb
        self.run: Any = None

    def open(self, about: RunInfo) -> None:
        """Raises ConnectionError when it is to log online and nobody is logged in."""
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        if mode == "online" and not self.wandb.login(prompt=False):
            raise ConnectionError("nobody is logged in: set WANDB_API_KEY, or WANDB_MODE=offline")
        # create_new: beside another run of this process; console off: what is printed is nobody's but the user's
        settings = self.wandb.Settings(
            reinit="create_new",
            console="off",
            disable_git=True,
            disable_code=True,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=1.0,  # a kill loses what is not on disk yet
        )
        self.run = self.wandb.init(
            id=about.hash,
            name=about.name,
            group=about.group,
            project=about.project,
            config=about.config,
            dir=about.folder,
            mode=mode,  # type: ignore[arg-type]
            resume="allow",
            settings=settings,
        )

    def log(self, row: dict[str, float], step: int) -> None:
        # committed at once: W&B would keep the row back until the next one, and a kill would lose it
        self.run.log(row, step=step, commit=True)

    def summary(self, figures: dict[str, float], step: int) -> None:
        self.run.summary.update(figures)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[float]], step: int) -> None:
        self.run.log({name: self.wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def close(self, failed: bool) -> None:
        """Raises TimeoutError when W&B does not take the rest in time."""
        if self.run is None:
            return
        try:
            self.run.finish(exit_code=int(failed))
        except TimeoutError:
            raise TimeoutError(
                f"W&B has not taken everything: wandb sync {Path(self.run.dir).parent} sends it"
            ) from None
