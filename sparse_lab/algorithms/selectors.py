"""What stays when a mask changes while training: single weights, or whole filters. `Prune` says when."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from sparse_lab.config import FiltersConfig, PruneConfig
from sparse_lab.sparsity.mask_updates import prune_to
from sparse_lab.sparsity.masks import Masks, num_kept
from sparse_lab.sparsity.scores import Batches, Scores, View, find_score
from sparse_lab.sparsity.structured import channels
from sparse_lab.sparsity.structured.filter_scores import find_filter_score

# scores that look at weights alone, of weights and of filters: no network runs for them
WITHOUT_PASSES = frozenset({"magnitude", "lamp", "random", "l1", "l2", "random_filters"})

Reserve = Callable[[torch.Generator, Mapping[str, int]], Mapping[str, Tensor]]


class Selector(Protocol):
    @property
    def passes(self) -> bool:
        """Does scoring run the network, so that it may take long?"""
        ...

    def __call__(
        self, sparsity: float, model: nn.Module, generator: torch.Generator, round_: int, whole: bool
    ) -> tuple[int, Scores]:
        """(how many weights may stay, the new masks). `whole=False`: the mask is soft, it will be lifted again."""
        ...


@dataclass
class WeightSelector:
    """The best weights by `config.score`, split over layers by `config.distribution`.

    reserve: may name positions that come first, given the layers' counts.
    """

    config: PruneConfig
    masks: Masks
    batches: Callable[[], Batches]
    image_size: int
    reserve: Reserve | None = None

    @property
    def passes(self) -> bool:
        return self.config.score not in WITHOUT_PASSES

    def __call__(
        self, sparsity: float, model: nn.Module, generator: torch.Generator, round_: int, whole: bool
    ) -> tuple[int, Scores]:
        kept = num_kept(sparsity, self.masks.total())
        view = View(model, self.batches, generator, image_size=self.image_size)
        first = None if self.reserve is None else partial(self.reserve, generator)
        return kept, prune_to(self.masks, kept, find_score(self.config.score)(view), self.config.distribution, first)


@dataclass
class FilterSelector:
    """The best filters by `config.score`: as many as fit into the weights that may stay, or what `filters.rates` leave.

    A filter that goes takes its row with it and the columns of all that read it; while the mask is soft only the row.
    Channels that go together have the mean of their filters' scores. `uses`: how often each layer's weight multiplies.
    """

    config: PruneConfig
    filters: FiltersConfig
    masks: Masks
    groups: list[channels.Group]
    uses: Mapping[str, int]
    layerwise: bool
    batches: Callable[[], Batches]

    @property
    def passes(self) -> bool:
        return self.config.score not in WITHOUT_PASSES

    def __call__(
        self, sparsity: float, model: nn.Module, generator: torch.Generator, round_: int, whole: bool
    ) -> tuple[int, Scores]:
        scores = find_filter_score(self.config.score)(View(model, self.batches, generator))
        alive = self.best(scores, sparsity, round_)
        new = channels.masks_of(self.groups, alive, self._shapes(), columns=whole)
        kept = num_kept(sparsity, self.masks.total())
        return (sum(int(mask.sum()) for mask in new.values()) if self.filters.rates else kept), new

    def best(self, scores: Mapping[str, Tensor], sparsity: float, round_: int = 0) -> dict[str, Tensor]:
        """Which channels stay (bool, a tensor a group) by the scores of single layers, in round `round_`."""
        alive = channels.alive_of(self.groups, self.masks.masks())
        ranked = {
            group.name: torch.stack([scores[name] for name in group.producers if name in scores]).mean(0).cpu()
            for group in self.groups
        }
        # what went before goes first
        ranked = {name: score.masked_fill(~alive[name].cpu(), -torch.inf) for name, score in ranked.items()}
        kept = num_kept(sparsity, self.masks.total())
        if self.filters.rates:
            rates = self.filters.rates[: round_ + 1] if self.layerwise else self.filters.rates
            chosen = channels.by_rates(self.groups, ranked, rates)
        else:
            chosen = self._within_flops(ranked, kept) if self.filters.flops else self._choose(ranked, kept)
        return {name: stay.to(alive[name].device) & alive[name] for name, stay in chosen.items()}

    def _choose(self, ranked: Mapping[str, Tensor], kept: int) -> dict[str, Tensor]:
        return channels.choose_channels(self.groups, ranked, kept, self.config.distribution, self._shapes())

    def _within_flops(self, ranked: Mapping[str, Tensor], kept: int) -> dict[str, Tensor]:
        """As many channels as both the weights and the multiply-adds allow: fewer weights until these fit too."""
        shapes = self._shapes()
        dense = sum(self.uses[name] * shape.numel() for name, shape in shapes.items())
        most = (1.0 - (self.filters.flops or 0.0)) * dense

        def fits(weights: int) -> bool:
            masks = channels.masks_of(self.groups, self._choose(ranked, weights), shapes)
            return sum(self.uses[name] * int(mask.sum()) for name, mask in masks.items()) <= most

        least = channels.kept_weights(self.groups, {group.name: 1 for group in self.groups}, shapes)
        fitting = bisect.bisect_left(range(kept - least + 1), True, key=lambda fewer: fits(kept - fewer))
        return self._choose(ranked, kept - fitting)

    def _shapes(self) -> dict[str, torch.Size]:
        return {name: weight.shape for name, weight in self.masks.weights().items()}
