"""Pruned weights stay pruned: after every optimizer step that really happened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparse_lab.algorithms.base import Algorithm, StepHooks
from sparse_lab.sparsity.masks import Masks

Changed = Callable[[str, int], None]
# where gradient, weight and state are zero these leave all three at zero; of other optimizers nothing is taken for
# granted (Rprop's state starts above zero, Muon mixes positions)
ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adadelta,
)


def nobody(change: str, asked: int) -> None:
    """Nobody is told of mask changes."""


class EnforceMasks(Algorithm):
    """What is masked gets no gradient, so no optimizer moves it: weight and state are zero and stay so. One number a
    weight is touched, where zeroing weights and state after the step would touch up to three.

    Where the gradients of pruned weights are read after the step they are left whole, and weights and state are zeroed
    after it, before any other algorithm looks; so are those whose mask has changed, and those that somebody has written
    into since the last step (a dense checkpoint, an average). What is written through `.data` nobody can see.
    """

    order = -10

    def __init__(self, masks: Masks) -> None:
        super().__init__()
        self.masks = masks
        self._cut = False
        self._left: list[tuple[int, int]] = []
        self._written: frozenset[Tensor] = frozenset()

    def attach(self, optimizer: Optimizer, broadcast: Callable[[Any], Any] | None = None) -> None:
        super().attach(optimizer, broadcast)
        self._weights = tuple(self.masks.weights().values())
        self._all = frozenset(self._weights)
        # a restored checkpoint or a move to a device has changed the buffers behind our back
        self.masks.refresh()
        self.masks.enforce()
        self._left = self._now()

    def _now(self) -> list[tuple[int, int]]:
        """Of each weight what changes when somebody writes into it, or puts other memory in its place."""
        return [(weight._version, weight.data_ptr()) for weight in self._weights]

    def before_step(self, optimizer: Optimizer) -> None:
        pairs = zip(self._weights, self._left, self._now(), strict=True)
        self._written = frozenset(weight for weight, left, now in pairs if left != now)
        # sparse_cpu's optimizer, which is none of these, has live gradients alone, but where dense ones are read
        self._cut = type(optimizer) in ELEMENTWISE and not StepHooks.of(optimizer).gradients_are_read()
        if self._cut:
            self.masks.cut_gradients()

    def after_step(self, optimizer: Optimizer) -> None:
        # sparse_cpu's optimizer has moved these at live positions alone
        moved_within: frozenset[Tensor] = getattr(optimizer, "stepped", frozenset())
        within = self._all if self._cut else moved_within
        self.masks.enforce(optimizer, but=within - self._written)
        self._left = self._now()


class MaskAlgorithm(Algorithm):
    """An algorithm on masks: as long as it hangs on an optimizer, they hold there.

    changed: told of each mask change, with the number of weights that it was to keep. seed: of what is left to chance.
    """

    def __init__(self, masks: Masks, seed: int, changed: Changed) -> None:
        super().__init__()
        self.masks = masks
        self.seed = seed
        self.changed = changed

    def generator(self, step: int) -> torch.Generator:
        """Return the chance of the mask change at this step: the same however the training came there."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)

    def attach(self, optimizer: Optimizer, broadcast: Callable[[Any], Any] | None = None) -> None:
        super().attach(optimizer, broadcast)
        if not _on(optimizer, EnforceMasks, self.masks):
            EnforceMasks(self.masks).attach(optimizer, broadcast)

    def detach(self) -> None:
        optimizer = self._optimizer
        super().detach()
        if optimizer is not None and not _on(optimizer, MaskAlgorithm, self.masks):
            for one in _on(optimizer, EnforceMasks, self.masks):
                one.detach()


def _on(optimizer: Optimizer, kind: type[Algorithm], masks: Masks) -> list[Algorithm]:
    """The algorithms of this kind on `optimizer` that have these masks."""
    return [one for one in StepHooks.of(optimizer).algorithms if isinstance(one, kind) and one.masks is masks]  # type: ignore[attr-defined]
