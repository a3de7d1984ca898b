"""The rounds of a run: each starts with a fresh optimizer and ends with a level on record.

A dense run is one round; iterative pruning has one a mask change; regrowth one a step. At the end of a round the
weights of its best epoch come back, the test set is read, and the level is written down.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from sparse_lab.algorithms.base import Algorithm, StepHooks
from sparse_lab.errors import UserError
from sparse_lab.records.run_dir import zeros_among
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.optimizer_state import reset_state
from sparse_lab.sparsity.processes import overwrite_from_rank0
from sparse_lab.sparsity.state import load_state
from sparse_lab.training.evaluate import accuracy, class_accuracy, recognised
from sparse_lab.training.figures import Figures


class Rounds(pl.Callback):
    """Owns the clock: ticks it, ends epochs and rounds, selects each level's weights.

    network: what trains. figures: its sums of the epoch. algorithms: those whose steps begin anew with each round.

    select: 'validation_best', 'last' or 'test_best' (the last is what some papers do; the record is marked).
    patience: a round ends after so many epochs at its target without a better validation accuracy, whatever `select`
    says.
    at_target: is the network as sparse as this round is to end? A better epoch before that does not count.
    measure: facts about the network for the level's record (sparsity, kept and nonzero weights, paths).
    """

    def __init__(
        self,
        network: nn.Module,
        figures: Figures,
        clock: Clock,
        select: str,
        patience: int | None,
        test: Iterable[tuple[Tensor, Tensor]],
        at_target: Callable[[], bool],
        measure: Callable[[], dict[str, Any]],
        say: Callable[[str], None],
        algorithms: Iterable[Algorithm] = (),
    ) -> None:
        self.network = network
        self.figures = figures
        self.algorithms = list(algorithms)
        self.clock = clock
        self.select = select
        self.patience = patience
        self.test = test
        self.at_target = at_target
        self.measure = measure
        self.say = say
        self.levels: list[dict[str, Any]] = []
        self.row: dict[str, Any] = {}
        self._start_round()
        self._since = time.monotonic()

    def _start_round(self) -> None:
        self.best: dict[str, Any] | None = None
        self.best_validation: float | None = None
        self.waited = 0
        self.seconds = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            StepHooks.of(optimizer).add(_Ticking(self.clock))
        self._since = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # killed after the last epoch and before the result was written: nothing is left to train
        trainer.should_stop = self.clock.finished

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.clock.step_in_round == 0:
            for optimizer in trainer.optimizers:
                reset_state(optimizer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        train_loss, train_accuracy = self.figures.take("train")
        loss, validation = self.figures.take("validation")
        self.seconds += time.monotonic() - self._since
        self._since = time.monotonic()
        self.row = {
            "epoch": trainer.current_epoch + 1,
            "round": self.clock.round + 1,
            "step": trainer.global_step,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "validation_loss": loss,
            "validation_accuracy": validation,
        }
        if not math.isfinite(loss):
            # the last step may have broken the weights after its own loss was still a number
            raise UserError(
                f"the validation loss is NaN or infinite after step {trainer.global_step}: lower training.lr"
            )
        self.clock.end_epoch()
        self._keep_best(trainer, pl_module, validation)
        if self.clock.epoch_in_round >= self.clock.epochs_a_round or self._out_of_patience():
            self._end_round(trainer, pl_module)

    def _keep_best(self, trainer: pl.Trainer, module: pl.LightningModule, validation: float) -> None:
        if not self.at_target():
            return
        score = accuracy(self._tested(trainer, module)) if self.select == "test_best" else validation
        self.waited += 1
        if self.best_validation is None or validation > self.best_validation:
            self.best_validation, self.waited = validation, 0
        if self.best is None or self.select == "last" or score > self.best["score"]:
            network = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
            self.best = {
                "score": score,
                "epoch": self.clock.epoch_in_round,
                "validation": validation,
                "network": network,
            }

    def _out_of_patience(self) -> bool:
        return self.patience is not None and self.waited >= self.patience

    def _end_round(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert self.best is not None, "the schedule has not reached its target by the end of the round"
        load_state(self.network, self.best["network"])
        tested = self._tested(trainer, module)
        test = accuracy(tested)
        level = {
            "level": self.clock.round + 1,
            **self.measure(),
            "validation_accuracy": self.best["validation"],
            "test_accuracy": test,
            "class_accuracy": class_accuracy(tested),
            "best_epoch": self.best["epoch"],
            "epochs": self.clock.epoch_in_round,
            "seconds": round(self.seconds + time.monotonic() - self._since, 3),
        }
        self.levels.append(level)
        self.say(
            f"level {level['level']}/{self.clock.rounds}: sparsity {100 * level['sparsity']:.4g}% "
            f"({level['kept']:,} weights{zeros_among(level)}), "
            f"validation {level['validation_accuracy']:.2f}%, test {test:.2f}%"
        )
        self.clock.end_round()
        for one in self.algorithms:  # a round that ended early counts in full
            one.step = self.clock.round * self.clock.steps_a_round
        self._start_round()
        self._since = time.monotonic()
        trainer.should_stop = self.clock.finished

    def _tested(self, trainer: pl.Trainer, module: pl.LightningModule) -> Tensor:
        """What the network recognises of the test set, of which each process reads a share."""
        # each process has BatchNorm statistics of its own: those count that are saved, as in the next training step
        overwrite_from_rank0(buffer for buffer in self.network.buffers() if buffer.is_floating_point())
        with trainer.precision_plugin.forward_context():
            return self.figures.over_ranks(recognised(self.network, self.test, module.forward))

    def state_dict(self) -> dict[str, Any]:
        seconds = self.seconds + time.monotonic() - self._since
        return {
            "clock": self.clock.state_dict(),
            "levels": list(self.levels),
            "best": self.best,
            "best_validation": self.best_validation,
            "waited": self.waited,
            "seconds": seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clock.load_state_dict(state["clock"])
        self.levels = state["levels"]
        self.best = state["best"]
        self.best_validation = state["best_validation"]
        self.waited = state["waited"]
        self.seconds = state["seconds"]
        if self.best is not None:
            self.best["network"] = {name: torch.as_tensor(value) for name, value in self.best["network"].items()}


class _Ticking(Algorithm):
    """The clock counts a step before anything else looks at it."""

    order = -100

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.clock.tick()
