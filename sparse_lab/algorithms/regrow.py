"""Regrowth of pruned connections, step by step (arXiv 2511.11675)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from sparse_lab.algorithms.selectors import WITHOUT_PASSES
from sparse_lab.config import RegrowConfig
from sparse_lab.errors import UserError, nearest
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.mask_updates import grow_to
from sparse_lab.sparsity.masks import Masks, layers, num_kept
from sparse_lab.sparsity.schedules import Schedule
from sparse_lab.sparsity.scores import Batches, Scores, View, find_score
from sparse_lab.sparsity.similarity import attention_maps, least_similar


class Regrow(pl.Callback):
    """Before a batch on which `schedule` is due, bring back the best pruned weights of the layers chosen.

    `dense` is the trained dense network: what scores look at (config.score_on), what attention maps are compared
    with, and where start values come from (config.value). `reference` holds the weights of a less sparse network,
    for that score.
    """

    def __init__(
        self,
        config: RegrowConfig,
        schedule: Schedule,
        masks: Masks,
        clock: Clock,
        dense: nn.Module,
        reference: Scores | None,
        batches: Callable[[int], Batches],
        seed: int,
        changed: Callable[[str, int], None],
        image_size: int,
    ) -> None:
        self.score = find_score(config.score)
        self.config = config
        self.schedule = schedule
        self.masks = masks
        self.clock = clock
        self.dense = dense
        self.reference = reference
        self.batches = batches
        self.seed = seed
        self.changed = changed
        self.image_size = image_size
        self._dense_scores: Scores | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = self.clock.step
        if self.schedule.due(step):
            self.dense.to(pl_module.device)
            self.to(self.schedule.sparsity(step), pl_module.model, step, trainer.strategy.broadcast)  # type: ignore[arg-type]

    def scores_next(self) -> bool:
        """Is a regrowth due before the next step that runs a network to score it or to choose layers?"""
        passes = self.config.score not in WITHOUT_PASSES or self.config.distribution not in ("all", "given")
        return passes and self.schedule.due(self.clock.step)

    def to(self, sparsity: float, model: nn.Module, step: int, broadcast: Callable[[Any], Any] = lambda x: x) -> None:
        """Regrow `model` to `sparsity` now; `step` seeds chance, `broadcast` makes rank 0's masks everyone's."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        kept = num_kept(sparsity, self.masks.total())
        before = {name: mask.clone() for name, mask in self.masks.masks().items()}
        after = broadcast(grow_to(self.masks, kept, self._scores(model, generator), self._order(model)))
        self.masks.set(after)
        grown = {name: after[name] & ~before[name] for name in after}
        start(self.masks.weights(), grown, self.config.value, self.dense, generator)
        self.changed("regrow", kept)

    def _scores(self, model: nn.Module, generator: torch.Generator) -> Scores:
        batches = partial(self.batches, self.config.batches)  # made only by a score that asks
        if self.config.score_on == "sparse":
            return self.score(View(model, batches, generator, self.reference, image_size=self.image_size))
        if self._dense_scores is None or self.config.score == "random":
            self._dense_scores = self.score(
                View(self.dense, batches, generator, self.reference, image_size=self.image_size)
            )
        return self._dense_scores

    def _order(self, model: nn.Module) -> list[list[str]]:
        """Groups of layers, the first to grow first."""
        names = list(self.masks.layers)
        if self.config.distribution == "all":
            return [names]
        if self.config.distribution == "given":
            return [list(self.config.given)]
        batches = self.batches(self.config.batches)
        ranked = [
            name for name, _ in least_similar(attention_maps(self.dense, batches), attention_maps(model, batches))
        ]
        chosen = self.config.ssim_layers
        others = [name for name in names if name not in ranked]
        # what the chosen layers cannot take goes to the next least similar, last to those that cannot be compared
        return [ranked[:chosen], *([name] for name in ranked[chosen:]), others]


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


def check_layers(config: RegrowConfig, model: nn.Module) -> None:
    """Raises UserError when a given layer is not one of the model's counted layers."""
    known = list(layers(model))
    if config.distribution == "given" and not config.given:
        raise UserError("method.regrow.distribution=given needs method.regrow.given=[LAYER, ...]")
    for name in config.given:
        if name not in known:
            raise UserError(f"method.regrow.given: unknown layer {name!r}; {nearest(name, known)}")
