"""Mask changes right after an optimizer step, by the dense gradients of that very step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import pytorch_lightning as pl
import torch

from sparse_lab.errors import UserError
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.masks import Masks
from sparse_lab.sparsity.scores import Scores, View, find_score
from sparse_lab.training.lightning_module import Classifier

# scores that look at no gradients; of any other, dense ones are computed in the steps that change the masks
WITHOUT_GRADIENTS = frozenset({"magnitude", "lamp", "random"})


class Rule(Protocol):
    """When the masks change, and how: `rewire.Rewire`, `cyclic.CyclicSparsity`."""

    @property
    def name(self) -> str: ...

    def due(self, steps_done: int) -> bool: ...

    def change(
        self, masks: Masks, steps_done: int, drop: Scores, grow: Scores, chance: torch.Generator
    ) -> tuple[int, list[Scores]]:
        """(how many weights are to be kept, the masks to set in turn). `chance` draws among equal scores."""
        ...


class DropAndGrowScores(Protocol):
    """The part of a config that names the scores: what goes last and what comes first."""

    drop: str
    grow: str


class AfterStep(pl.Callback):
    """Asks `rule` after every optimizer step that really happened, and takes the masks that it makes of the two scores.
    What grows starts at zero, with fresh optimizer state.

    Masked dense arithmetic computes the gradients of pruned weights anyway, so an update costs no extra pass; sparse
    arithmetic computes them in the steps after which a score will read them. They are unscaled; gradients:
    'after_clipping' reads them as the step used them, 'before_clipping' as they were before.
    """

    def __init__(
        self,
        rule: Rule,
        scores: DropAndGrowScores,
        gradients: str,
        masks: Masks,
        clock: Clock,
        seed: int,
        changed: Callable[[str, int], None],
    ) -> None:
        self.rule = rule
        self.drop, self.grow = find_score(scores.drop), find_score(scores.grow)
        self.reads_gradients = not {scores.drop, scores.grow} <= WITHOUT_GRADIENTS
        self.gradients = gradients
        self.masks = masks
        self.clock = clock
        self.seed = seed
        self.changed = changed
        self._copied: Scores | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if self._due(self.clock.step_in_round):
                self._update(pl_module, optimizer, trainer.strategy.broadcast)

        assert isinstance(pl_module, Classifier)
        pl_module.readers.append(self._reads_the_next_step)
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(after_step)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.gradients == "before_clipping" and self._reads_the_next_step():
            self._copied = {name: gradient.clone() for name, gradient in self._dense_gradients().items()}

    def _reads_the_next_step(self) -> bool:
        return self.reads_gradients and self._due(self.clock.step_in_round + 1)

    def _due(self, steps_done: int) -> bool:
        # after the last step nothing is trained any more: a change there would only lose what was learned
        return steps_done < self.clock.steps_a_round and self.rule.due(steps_done)

    @torch.no_grad()
    def _update(
        self, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer, broadcast: Callable[[Any], Any]
    ) -> None:
        step = self.clock.step_in_round
        taken = self._dense_gradients() if self._copied is None else self._copied
        self._copied = None
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        view = View(pl_module.model, generator=generator, taken=taken)  # type: ignore[arg-type]
        try:
            kept, stages = self.rule.change(self.masks, step, self.drop(view), self.grow(view), generator)
        except ValueError as error:
            raise UserError(f"step {step}: masks cannot change: {error}: lower training.lr or clip gradients") from None
        for new in stages:
            self.masks.set(broadcast(new), optimizer)
        self.changed(self.rule.name, kept)

    def _dense_gradients(self) -> Scores:
        if not self.reads_gradients:
            return {}
        weights = self.masks.weights().items()
        return {name: torch.zeros_like(weight) if weight.grad is None else weight.grad for name, weight in weights}
