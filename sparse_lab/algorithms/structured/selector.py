"""Which whole filters stay when a network is pruned."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sparse_lab.sparsity.masks import Masks, num_kept
from sparse_lab.sparsity.scores import Batches, Scores, View
from sparse_lab.sparsity.structured import channels
from sparse_lab.sparsity.structured.filter_scores import FILTER_SCORES_WITHOUT_PASSES, find_filter_score


class FilterSelector:
    """The best filters by `score`: as many as fit into the weights that may stay, or what `rates` leave.

    A filter that goes takes its row with it and the columns of all that read it; while the mask is soft only the row.
    Channels that go together have the mean of their filters' scores. `uses`: how often each layer's weight multiplies.

    rates: share of each group's channels that goes, in the order of the network. layerwise: one group more at each mask
    change. flops: go on until this share of the multiply-adds has gone too. whole: the multiply-adds of layers that
    were left out, which count among all.
    """

    def __init__(
        self,
        masks: Masks,
        groups: Sequence[channels.Group],
        uses: Mapping[str, int],
        score: str = "l2",
        distribution: str = "uniform",
        *,
        rates: Sequence[float] = (),
        layerwise: bool = False,
        flops: float | None = None,
        whole: int = 0,
        batches: Batches | Callable[[], Batches] = (),
    ) -> None:
        self.masks = masks
        self.groups = groups
        self.uses = uses
        self.score = score
        self.passes = score not in FILTER_SCORES_WITHOUT_PASSES
        self.distribution = distribution
        self.rates = list(rates)
        self.layerwise = layerwise
        self.flops = flops
        self.whole = whole
        self.batches = batches

    def __call__(
        self, sparsity: float, model: nn.Module, generator: torch.Generator, change: int, soft: bool
    ) -> tuple[int, Scores]:
        scores = find_filter_score(self.score)(View(model, self.batches, generator))
        alive = self.best(scores, sparsity, change)
        new = channels.masks_of(self.groups, alive, self._shapes(), columns=not soft)
        kept = num_kept(sparsity, self.masks.total())
        return (sum(int(mask.sum()) for mask in new.values()) if self.rates else kept), new

    def best(self, scores: Mapping[str, Tensor], sparsity: float, change: int = 0) -> dict[str, Tensor]:
        """Return which channels stay (bool, a tensor a group) by the scores of single layers."""
        alive = channels.alive_of(self.groups, self.masks.masks())
        ranked = {
            group.name: torch.stack([scores[name] for name in group.producers if name in scores]).mean(0).cpu()
            for group in self.groups
        }
        # what went before goes first
        ranked = {name: score.masked_fill(~alive[name].cpu(), -torch.inf) for name, score in ranked.items()}
        kept = num_kept(sparsity, self.masks.total())
        if self.rates:
            rates = self.rates[: change + 1] if self.layerwise else self.rates
            chosen = channels.by_rates(self.groups, ranked, rates)
        else:
            chosen = self._choose(ranked, kept) if self.flops is None else self._within_flops(ranked, kept, self.flops)
        return {name: stay.to(alive[name].device) & alive[name] for name, stay in chosen.items()}

    def _choose(self, ranked: Mapping[str, Tensor], kept: int) -> dict[str, Tensor]:
        return channels.choose_channels(self.groups, ranked, kept, self.distribution, self._shapes())

    def _within_flops(self, ranked: Mapping[str, Tensor], kept: int, flops: float) -> dict[str, Tensor]:
        """As many channels as both the weights and the multiply-adds allow: fewer weights until these fit too."""
        shapes = self._shapes()
        all_of_them = self.whole + sum(self.uses[name] * shape.numel() for name, shape in shapes.items())
        most = (1.0 - flops) * all_of_them - self.whole

        def fits(weights: int) -> bool:
            masks = channels.masks_of(self.groups, self._choose(ranked, weights), shapes)
            return sum(self.uses[name] * int(mask.sum()) for name, mask in masks.items()) <= most

        least = channels.kept_weights(self.groups, {group.name: 1 for group in self.groups}, shapes)
        fitting = bisect.bisect_left(range(kept - least + 1), True, key=lambda fewer: fits(kept - fewer))
        return self._choose(ranked, kept - fitting)

    def _shapes(self) -> dict[str, torch.Size]:
        return {name: weight.shape for name, weight in self.masks.weights().items()}
