"""Regrowth of pruned connections, step by step (arXiv 2511.11675)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_lab.algorithms.enforce import Changed, MaskAlgorithm, nobody
from sparse_lab.errors import SparseLabError, nearest
from sparse_lab.sparsity.mask_updates import grow_to
from sparse_lab.sparsity.masks import Masks, layers, num_kept
from sparse_lab.sparsity.schedules import Schedule
from sparse_lab.sparsity.scores import USUAL, WITHOUT_PASSES, Batches, Probe, Scores, View, find_score
from sparse_lab.sparsity.similarity import attention_maps, least_similar

SCORE_ON = ("dense", "sparse")
VALUES = ("zero", "dense", "kaiming")


class Regrow(MaskAlgorithm):
    """Before a step on which `schedule` is due, bring back the best pruned weights of the layers chosen.

    dense: the trained dense network: what scores look at (score_on='dense'), what attention maps are compared with, and
    where start values come from (value='dense'). reference: the weights of a less sparse network, for that score.
    distribution: 'all' layers in proportion to what they lost, the `ssim_layers` whose attention maps have the lowest
    'ssim' first, or the names of the layers that regrow. batches: made only where something asks for them. value: what
    a regrown weight starts from, see `start`. changed: told of each change, with the number of weights to be kept.
    """

    order = 20

    def __init__(
        self,
        model: nn.Module,
        masks: Masks,
        schedule: Schedule,
        dense: nn.Module,
        *,
        score: str = "taylor",
        score_on: str = "dense",
        distribution: str | Sequence[str] = "all",
        ssim_layers: int = 4,
        value: str = "zero",
        reference: Scores | None = None,
        batches: Batches | Callable[[], Batches] = (),
        probe: Probe = USUAL,
        seed: int = 0,
        changed: Changed = nobody,
    ) -> None:
        super().__init__(masks, seed, changed)
        if isinstance(distribution, str) and distribution not in ("all", "ssim"):
            distribution = [distribution]
        _check(masks, dense, score_on, distribution, value)
        self.model = model
        self.schedule = schedule
        self.dense = dense
        self.score = find_score(score)
        self.score_on = score_on
        self.distribution = distribution
        self.ssim_layers = ssim_layers
        self.value = value
        self.reference = reference
        self.batches = batches
        self.probe = probe
        self._passes = score not in WITHOUT_PASSES or distribution == "ssim"
        self._anew = score == "random"  # each time
        self._dense_scores: Scores | None = None

    def begin_step(self, optimizer: Optimizer) -> None:
        if self.schedule.due(self.step):
            self.dense.to(next(iter(self.masks.weights().values())).device)
            self.to(self.schedule.sparsity(self.step))

    def scores_next(self) -> bool:
        return self._passes and self.schedule.due(self.step)

    def to(self, sparsity: float) -> None:
        """Regrow to `sparsity` now; the step seeds chance."""
        generator = self.generator(self.step)
        kept = num_kept(sparsity, self.masks.total())
        before = {name: mask.clone() for name, mask in self.masks.masks().items()}
        after = self.broadcast(grow_to(self.masks, kept, self._scores(generator), self._order()))
        self.masks.set(after)
        grown = {name: after[name] & ~before[name] for name in after}
        start(self.masks.weights(), grown, self.value, self.dense, generator)
        self.changed("regrow", kept)

    def _scores(self, generator: torch.Generator) -> Scores:
        if self.score_on == "sparse":
            return self.score(self._view(self.model, generator))
        if self._dense_scores is None or self._anew:
            self._dense_scores = self.score(self._view(self.dense, generator))
        return self._dense_scores

    def _view(self, model: nn.Module, generator: torch.Generator) -> View:
        return View(model, self.batches, generator, self.reference, probe=self.probe)

    def _order(self) -> list[list[str]]:
        """Groups of layers, the first to grow first."""
        names = list(self.masks.layers)
        if self.distribution == "all":
            return [names]
        if self.distribution != "ssim":
            return [list(self.distribution)]
        batches = self.batches() if callable(self.batches) else self.batches
        maps = attention_maps(self.dense, batches), attention_maps(self.model, batches)
        ranked = [name for name, _ in least_similar(*maps)]
        others = [name for name in names if name not in ranked]
        # what the chosen layers cannot take goes to the next least similar, last to those that cannot be compared
        return [ranked[: self.ssim_layers], *([name] for name in ranked[self.ssim_layers :]), others]


def _check(masks: Masks, dense: nn.Module, score_on: str, distribution: str | Sequence[str], value: str) -> None:
    for name, given, known in (("score_on", score_on, SCORE_ON), ("value", value, VALUES)):
        if given not in known:
            raise SparseLabError(f"{name}={given!r}: {nearest(given, known)}")
    for name in () if isinstance(distribution, str) else distribution:
        if name not in masks.layers:
            raise SparseLabError(f"distribution={name!r}: {nearest(name, ('all', 'ssim', *masks.layers))}")
    source = layers(dense)
    for name, layer in masks.layers.items():
        if name not in source or source[name].weight.shape != layer.weight.shape:
            raise SparseLabError(
                f"the dense network has no layer {name!r} of shape {tuple(layer.weight.shape)}: give one that was made "
                "in the same way as the network that trains, its layers under the same names"
            )


@torch.no_grad()
def start(
    weights: Mapping[str, Tensor], grown: Mapping[str, Tensor], value: str, dense: nn.Module, generator: torch.Generator
) -> None:
    """Give the weights just grown (bool masks) their start: 'zero', the 'dense' network's value, or 'kaiming' uniform.

    Kaiming's bound is sqrt(6 / fan-in) with the layer's whole fan-in (He et al. 2015, for ReLU).
    """
    source = layers(dense)
    for name, weight in weights.items():
        if value == "dense":
            fresh = source[name].weight.to(weight)
        elif value == "kaiming":
            bound = math.sqrt(6.0 / weight[0].numel())
            fresh = ((torch.rand(weight.shape, generator=generator) * 2.0 - 1.0) * bound).to(weight)
        else:
            fresh = torch.zeros_like(weight)
        weight.copy_(torch.where(grown[name], fresh, weight))
