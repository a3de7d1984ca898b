"""Mask updates right after an optimizer step, by the dense gradients of that very step."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from sparse_lab.algorithms.enforce import Changed, MaskAlgorithm, nobody
from sparse_lab.errors import SparseLabError
from sparse_lab.sparsity.masks import Masks
from sparse_lab.sparsity.scores import WITHOUT_PASSES, Scores, View, find_score


class MaskUpdate(MaskAlgorithm):
    """Asks after every optimizer step whether an update is `due`, and takes the masks that `update` makes of two
    scores: what drops first is lowest by `drop`, what grows first is highest by `grow`. What grows starts at zero, with
    fresh optimizer state.

    Masked dense arithmetic computes the gradients of pruned weights anyway, so an update costs no extra pass; sparse
    arithmetic computes them in the steps after which a score will read them. They are unscaled; gradients:
    'after_clipping' reads them as the step used them, 'before_clipping' as they were before.

    total_steps: of the training; after the last one nothing is updated. changed: told of each update, with the number
    of weights that it was to keep.
    """

    order = 30
    name = "mask_update"

    def __init__(
        self,
        model: nn.Module,
        masks: Masks,
        total_steps: int,
        *,
        drop: str = "magnitude",
        grow: str = "gradient",
        gradients: str = "after_clipping",
        seed: int = 0,
        changed: Changed = nobody,
    ) -> None:
        super().__init__(masks, seed, changed)
        self.model = model
        self.total_steps = total_steps
        self.drop, self.grow = find_score(drop), find_score(grow)
        self.gradients = gradients
        self._needs_gradients = not {drop, grow} <= WITHOUT_PASSES
        self._copied: Scores | None = None

    def due(self, step: int) -> bool:
        """Is there an update after `step` optimizer steps?"""
        raise NotImplementedError

    def update(self, step: int, drop: Scores, grow: Scores, generator: torch.Generator) -> tuple[int, list[Scores]]:
        """Return how many weights are to be kept, and the masks to set in turn. generator: draws among equal scores."""
        raise NotImplementedError

    def reads_gradients(self) -> bool:
        return self._needs_gradients and self._is_due(self.step + 1)

    def gradients_ready(self, optimizer: Optimizer) -> None:
        if self.gradients == "before_clipping" and self.reads_gradients():
            self._copied = {name: gradient.clone() for name, gradient in self._dense_gradients().items()}

    def after_step(self, optimizer: Optimizer) -> None:
        if self._is_due(self.step):
            self._update(optimizer)

    def _is_due(self, step: int) -> bool:
        # after the last step nothing is trained any more: an update there would only lose what was learned
        return step < self.total_steps and self.due(step)

    @torch.no_grad()
    def _update(self, optimizer: Optimizer) -> None:
        grads = self._dense_gradients() if self._copied is None else self._copied
        self._copied = None
        generator = self.generator(self.step)
        view = View(self.model, generator=generator, grads=grads)
        try:
            kept, stages = self.update(self.step, self.drop(view), self.grow(view), generator)
        except ValueError as error:
            raise SparseLabError(
                f"step {self.step}: masks cannot change: {error}: lower the learning rate or clip gradients"
            ) from None
        for new in stages:
            self.masks.set(self.broadcast(new), optimizer)
        self.changed(self.name, kept)

    def _dense_gradients(self) -> Scores:
        if not self._needs_gradients:
            return {}
        weights = self.masks.weights().items()
        return {name: torch.zeros_like(weight) if weight.grad is None else weight.grad for name, weight in weights}
