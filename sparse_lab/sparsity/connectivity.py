"""How sparse a network effectively is: weights on a path from input to logits, dead channels, connected or not.

At 99.99% most random masks fall apart: logits are constant and every gradient is zero. That has to be said aloud.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from sparse_lab.sparsity.masks import COUNTED, layers

# replaced for the sweep: on non-negative numbers, only these could stop or redirect a path
PASSED = (nn.modules.batchnorm._BatchNorm, nn.ReLU, nn.ReLU6, nn.Dropout, nn.Identity)
POOLED = (nn.MaxPool2d,)


@dataclass(frozen=True)
class Connectivity:
    """kept: counted weights in the masks; effective: those on a path from an input pixel to a logit."""

    kept: int
    effective: int
    channels: int
    dead_channels: int
    dead_layers: list[str]
    logits: int
    live_logits: int
    connected: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def connectivity(model: nn.Module, image_size: int) -> Connectivity:
    """Follow all paths through the masks of `model` at once.

    Every kept weight becomes 1 / fan-in, biases go, BatchNorm and activations pass through, max-pooling becomes the
    mean; then on an image of ones in float64 a logit is positive exactly when a path reaches it, and the gradient of
    the summed logits is positive exactly at the weights that lie on one. Taps that only ever see padding are on
    none. The product of 50 fan-ins is far from float64's limits. A channel (of a conv) is dead when none of its
    weights is on a path.
    """
    probe = copy.deepcopy(model).cpu().double().eval()
    _open_paths(probe)
    counted = layers(probe)
    image = torch.ones(1, 3, image_size, image_size, dtype=torch.float64)
    with torch.enable_grad():
        logits = probe(image).flatten()
        grads = torch.autograd.grad(logits.sum(), [module.weight for module in counted.values()], allow_unused=True)
    on_path = {
        name: (torch.zeros_like(module.weight) if grad is None else grad) * module.weight > 0
        for (name, module), grad in zip(counted.items(), grads, strict=True)
    }
    convs = [mask.flatten(1).any(1) for name, mask in on_path.items() if mask.dim() > 2]
    effective = {name: int(mask.sum()) for name, mask in on_path.items()}
    live = int((logits > 0).sum())
    return Connectivity(
        kept=sum(int((module.weight > 0).sum()) for module in counted.values()),
        effective=sum(effective.values()),
        channels=sum(alive.numel() for alive in convs),
        dead_channels=sum(int((~alive).sum()) for alive in convs),
        dead_layers=[name for name, number in effective.items() if number == 0],
        logits=logits.numel(),
        live_logits=live,
        connected=live > 0,
    )


@torch.no_grad()
def _open_paths(module: nn.Module) -> None:
    """Turn a network into a counter of paths, in place."""
    for name, child in module.named_children():
        if isinstance(child, PASSED):
            setattr(module, name, nn.Identity())
        elif isinstance(child, POOLED):
            # no padding is counted in: a window at the border holds real pixels too, so it stays positive
            mean = nn.AvgPool2d(child.kernel_size, child.stride, child.padding, ceil_mode=child.ceil_mode)
            setattr(module, name, mean)
        else:
            _open_paths(child)
        if isinstance(child, COUNTED):
            mask = getattr(child, "mask", None)
            kept = torch.ones_like(child.weight) if mask is None else mask.to(child.weight)
            child.weight.copy_(kept / child.weight[0].numel())
            if child.bias is not None:
                child.bias.zero_()
            child.weight.requires_grad_(True)
