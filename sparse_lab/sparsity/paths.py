"""A sparse start that is connected: paths from the image to the logits are laid first, within each layer's budget.

At 99.99% random positions cut a network through, and gradient growth has nothing to follow. Here as many paths as the
layers' budgets carry are reserved, so that every layer lies on at least one; the other positions stay to chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparse_lab.errors import SparseLabError
from sparse_lab.sparsity.connectivity import on_paths
from sparse_lab.sparsity.images import Shape, full_shape
from sparse_lab.sparsity.masks import Counted, excluded_layers, layers, maskable


def connected_init(
    model: nn.Module, shape: Shape, generator: torch.Generator, counts: Mapping[str, int]
) -> dict[str, Tensor]:
    """Bool masks (shape of each counted weight) of positions to keep first: at most `counts` in a layer, at least one,
    every one on a path from an input pixel to a logit. Raises SparseLabError where none can be laid.

    Channels are drawn once for every number of channels, so what a residual branch adds to, its shortcut carries too.
    Path t in [0, 1) takes channel order[floor(t * k)] of a tensor of which k channels are used; a layer between tensors
    with k and m used channels then needs k + m - gcd(k, m) weights for all paths together. Kernel taps are random where
    that leaves the weight on a path (near the border of a small map it may not), else central. For networks whose
    convolutions are plain or depthwise; a layer that was left out is dense, and carries all.
    """
    found = layers(model)
    ends = _ends({name: tied.layers[0] for name, tied in maskable(model).items()}, full_shape(shape)[0])
    dense = {name: tied[0].weight.numel() for name, tied in excluded_layers(model).items()}
    used = _used_channels(ends, {**counts, **dense})
    order = {size: torch.randperm(size, generator=generator) for size in used}
    places = {name: _places(module, ends[name], used, order) for name, module in found.items()}
    taps = {
        name: torch.randint(place.shape[2], place.rows.shape, generator=generator) for name, place in places.items()
    }
    centre = {name: place.shape[2] // 2 for name, place in places.items()}
    while True:
        laid = {name: place.mask(taps[name]).reshape(found[name].weight.shape) for name, place in places.items()}
        crossed, _ = on_paths(model, shape, laid)
        missed = {name: ~place.at(crossed[name], taps[name]) for name, place in places.items()}
        if not any(bool(one.any()) for one in missed.values()):
            return {name: mask.to(found[name].weight.device) for name, mask in laid.items()}
        if all(bool((taps[name] == centre[name]).all()) for name in taps):
            raise SparseLabError("no paths can be laid through this network: its convolutions are grouped")
        # a central tap may be cut off by others that look away: then all of them go to the centre, where none is
        stuck = all(bool((taps[name][one] == centre[name]).all()) for name, one in missed.items())
        for name, one in missed.items():
            taps[name][one | stuck] = centre[name]


class Places(NamedTuple):
    """Where a layer's weights on paths lie: output and input channels, in a weight of `shape` (outputs, inputs,
    taps).
    """

    rows: Tensor
    columns: Tensor
    shape: tuple[int, int, int]

    def mask(self, taps: Tensor) -> Tensor:
        mask = torch.zeros(self.shape, dtype=torch.bool)
        mask[self.rows, self.columns, taps] = True
        return mask

    def at(self, mask: Tensor, taps: Tensor) -> Tensor:
        return mask.reshape(self.shape)[self.rows, self.columns, taps]


def _ends(found: Mapping[str, Counted], channels: int) -> dict[str, tuple[int, int]]:
    """(channels in, channels out) of every layer; a linear layer on a flattened map counts that map's channels, and the
    image has `channels`.
    """
    ends, before = {}, channels
    for name, module in found.items():
        if isinstance(module, nn.Linear):
            flattened = module.in_features % before == 0
            ends[name] = (before if flattened else module.in_features, module.out_features)
        else:
            ends[name] = (module.in_channels, module.out_channels)
        before = ends[name][1]
    return ends


def _used_channels(ends: Mapping[str, tuple[int, int]], counts: Mapping[str, int]) -> dict[int, int]:
    """How many channels of the tensors of each size the paths use: the most that every layer's budget allows."""
    used = {size: size for pair in ends.values() for size in pair}
    short = True
    while short:
        short = False
        for name, (inputs, outputs) in ends.items():
            while _cost(used[inputs], used[outputs]) > counts[name]:
                used[inputs if used[inputs] > used[outputs] else outputs] -= 1
                short = True
    return used


def _cost(k: int, m: int) -> int:
    """Weights of a layer that all paths need between k and m used channels."""
    return k + m - math.gcd(k, m)


def _places(module: Counted, ends: tuple[int, int], used: Mapping[int, int], order: Mapping[int, Tensor]) -> Places:
    """Output and input channel of every weight that the paths need in one layer."""
    k, m = used[ends[0]], used[ends[1]]
    whole = math.lcm(k, m)
    # a new pair begins wherever one of the two moves on to its next channel
    begins = torch.tensor(sorted({*range(0, whole, whole // k), *range(0, whole, whole // m)}))
    rows, columns = order[ends[1]][begins * m // whole], order[ends[0]][begins * k // whole]
    # the taps of a linear layer are the positions of the map before it; a depthwise channel has one input
    inputs = ends[0] if isinstance(module, nn.Linear) else module.weight.shape[1]
    shape = (module.weight.shape[0], inputs, module.weight[0].numel() // inputs)
    return Places(rows, columns if inputs == ends[0] else torch.zeros_like(columns), shape)
