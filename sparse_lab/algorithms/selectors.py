"""What stays when a network is pruned: single weights; whole filters: `structured/selector.py`. `Prune` says when."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from sparse_lab.sparsity.mask_updates import prune_to
from sparse_lab.sparsity.masks import Masks, num_kept
from sparse_lab.sparsity.scores import USUAL, WITHOUT_PASSES, Batches, Probe, Scores, View, find_score

Reserve = Callable[[torch.Generator, Mapping[str, int]], Mapping[str, Tensor]]


class Selector(Protocol):
    @property
    def masks(self) -> Masks: ...

    @property
    def passes(self) -> bool:
        """Does scoring run the network, so that it may take long?"""
        ...

    def __call__(
        self, sparsity: float, model: nn.Module, generator: torch.Generator, change: int, soft: bool
    ) -> tuple[int, Scores]:
        """Return how many weights may stay, and the new masks, at the mask change of this number (from 0). soft: the
        masks will be lifted again.
        """
        ...


class WeightSelector:
    """The best weights by `score`, split over layers by `distribution`.

    batches: made only for a score that asks. reserve: may name positions that come first, given the layers' counts.
    probe: how scores run the network.
    """

    def __init__(
        self,
        masks: Masks,
        score: str = "magnitude",
        distribution: str = "global",
        *,
        batches: Batches | Callable[[], Batches] = (),
        probe: Probe = USUAL,
        reserve: Reserve | None = None,
    ) -> None:
        self.masks = masks
        self.score = find_score(score)
        self.passes = score not in WITHOUT_PASSES
        self.distribution = distribution
        self.batches = batches
        self.probe = probe
        self.reserve = reserve

    def __call__(
        self, sparsity: float, model: nn.Module, generator: torch.Generator, change: int, soft: bool
    ) -> tuple[int, Scores]:
        kept = num_kept(sparsity, self.masks.total())
        view = View(model, self.batches, generator, probe=self.probe)
        first = None if self.reserve is None else partial(self.reserve, generator)
        return kept, prune_to(self.masks, kept, self.score(view), self.distribution, first)


class GivenMasks:
    """Masks that are there already (by layer name), whatever the weights are."""

    passes = False

    def __init__(self, masks: Masks, given: Mapping[str, Tensor]) -> None:
        self.masks = masks
        self.given = given

    def __call__(
        self, sparsity: float, model: nn.Module, generator: torch.Generator, change: int, soft: bool
    ) -> tuple[int, Scores]:
        return num_kept(sparsity, self.masks.total()), dict(self.given)
