"""Masks of a network at each sparsity, of the kinds that methods end with; each has exactly the number of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sparse_lab import models
from sparse_lab.bench.cells import IMAGE_SIZE
from sparse_lab.sparsity.mask_updates import prune_to
from sparse_lab.sparsity.masks import Masks, num_kept
from sparse_lab.sparsity.scores import Probe, View, find_score

SEED = 0
STEP = 0.5  # SynFlow keeps at least this share of the weights from one scoring to the next: over 90% then lie on paths

Pattern = Mapping[str, Tensor]


class Patterns:
    """Masks of one network by kind and sparsity, each kind made when it is first asked for."""

    def __init__(self, model: str, width: float, sparsities: Sequence[float]) -> None:
        self.sparsities = tuple(sorted(sparsities))
        self._network = model, width
        self._made: dict[str, dict[float, Pattern]] = {}

    def __call__(self, kind: str, sparsity: float) -> Pattern:
        """Bool masks by layer name. kind: 'erk', 'global' or 'synflow'; sparsity in percent."""
        if kind not in self._made:
            make: dict[str, Callable[[nn.Module, Sequence[float]], dict[float, Pattern]]] = {
                "erk": erk,
                "global": global_threshold,
                "synflow": synflow,
            }
            self._made[kind] = make[kind](build(*self._network), self.sparsities)
        return self._made[kind][sparsity]


def build(model: str, width: float) -> nn.Module:
    """The network that all candidates are given."""
    torch.manual_seed(SEED)
    return models.build(model, width=width, image_size=IMAGE_SIZE)


def erk(model: nn.Module, sparsities: Sequence[float]) -> dict[float, Pattern]:
    """Random positions, split over layers by Erdos-Renyi-kernel: static sparse training, SET and RigL."""
    scores = find_score("random")(View(model, generator=torch.Generator().manual_seed(SEED)))
    return _each(model, sparsities, scores, "erk")


def global_threshold(model: nn.Module, sparsities: Sequence[float]) -> dict[float, Pattern]:
    """One threshold over |w| of all layers: like global magnitude pruning of a trained network.

    The weights are drawn, not trained: |w| of a layer is exponential (trained weights have heavier tails than normal
    ones) with the variance 4 / (inputs + outputs) a weight that He's rule has between its two modes. So early and
    narrow layers stay denser, as in trained networks: on VGG16 at 96.85% and 98.85% every layer but the first and the
    last is within a factor 1.8 of what LAMP kept of networks that were trained on CIFAR-10 (`results/`).
    """
    generator = torch.Generator().manual_seed(SEED)
    scores = {}
    for name, layer in Masks(model).layers.items():
        weight = layer.weight
        window = math.prod(weight.shape[2:])
        outputs = weight.shape[0] // getattr(layer, "groups", 1)
        deviation = math.sqrt(4.0 / (window * (weight.shape[1] + outputs)))
        scores[name] = torch.empty(weight.shape).exponential_(math.sqrt(2.0) / deviation, generator=generator)
    return _each(model, sparsities, scores, "global")


def synflow(model: nn.Module, sparsities: Sequence[float]) -> dict[float, Pattern]:
    """SynFlow (Tanaka et al. 2020) on the network as it is initialised: connected however sparse it is.

    Scored anew at every sparsity on the way and between them, in fewer steps than the paper's 100.
    """
    masks = Masks(model)
    found: dict[float, Pattern] = {}
    for sparsity in _way(sparsities):
        kept = num_kept(sparsity / 100.0, masks.total())
        masks.set(prune_to(masks, kept, find_score("synflow")(View(model, probe=Probe(lambda: IMAGE_SIZE))), "global"))
        if sparsity in sparsities:
            found[sparsity] = {name: mask.clone() for name, mask in masks.masks().items()}
    return found


def _way(sparsities: Sequence[float]) -> list[float]:
    """The sparsities, and others between where a step would leave less than STEP of the weights."""
    way, density = [], 1.0
    for sparsity in sorted(sparsities):
        target = 1.0 - sparsity / 100.0
        steps = max(1, math.ceil(math.log(density / target) / -math.log(STEP)))
        way += [100.0 * (1.0 - density * (target / density) ** (step / steps)) for step in range(1, steps)]
        way.append(sparsity)
        density = target
    return way


def _each(
    model: nn.Module, sparsities: Sequence[float], scores: Mapping[str, Tensor], distribution: str
) -> dict[float, Pattern]:
    masks = Masks(model)
    total = masks.total()
    return {
        sparsity: prune_to(masks, num_kept(sparsity / 100.0, total), scores, distribution) for sparsity in sparsities
    }
