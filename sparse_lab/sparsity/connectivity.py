"""How sparse a network effectively is: weights on a path from input to logits, dead channels, connected or not.

At 99.99% most random masks fall apart: logits are constant and every gradient is zero. That has to be said aloud.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_lab.sparsity.masks import layers

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
    effective_by_layer: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a record, without the layers one by one."""
        return {key: value for key, value in asdict(self).items() if key != "effective_by_layer"}


def connectivity(model: nn.Module, image_size: int) -> Connectivity:
    """How much of what the masks of `model` keep has an effect. A channel (of a conv) is dead when none of its weights
    is on a path; a layer is dead when none of its weights is.
    """
    masks = {name: _kept(module) for name, module in layers(model).items()}
    crossed, logits = on_paths(model, image_size, masks)
    convs = [mask.flatten(1).any(1) for mask in crossed.values() if mask.dim() > 2]
    effective = {name: int(mask.sum()) for name, mask in crossed.items()}
    live = int(logits.sum())
    return Connectivity(
        kept=sum(int(mask.sum()) for mask in masks.values()),
        effective=sum(effective.values()),
        channels=sum(alive.numel() for alive in convs),
        dead_channels=sum(int((~alive).sum()) for alive in convs),
        dead_layers=[name for name, number in effective.items() if number == 0],
        logits=logits.numel(),
        live_logits=live,
        connected=live > 0,
        effective_by_layer=effective,
    )


def on_paths(model: nn.Module, image_size: int, masks: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Which weights of `masks` lie on a path from an input pixel to a logit, and which logits a path reaches.

    `masks` holds a bool tensor of the weight's shape for every counted layer; both answers are bool, on the CPU.

    All paths are followed at once. Every kept weight becomes 1 / fan-in, biases go, BatchNorm and activations pass
    through, a shared weight is used at its plain value, max-pooling becomes the mean; then on an image of ones in
    float64 a logit is positive exactly when a path reaches it, and the gradient of the summed logits is positive
    exactly at the weights that lie on one. Taps that only ever see padding are on none. The product of 50 fan-ins is
    far from float64's limits.
    """
    probe = copy.deepcopy(model).double().eval()
    _open_paths(probe)
    counted = layers(probe)
    for name, module in counted.items():
        module.weight.data = masks[name].to(module.weight) / module.weight[0].numel()
        module.weight.requires_grad_(True)
        if module.bias is not None:
            module.bias.data.zero_()
    image = torch.ones(1, 3, image_size, image_size, dtype=torch.float64, device=next(probe.parameters()).device)
    with torch.enable_grad():
        logits = probe(image).flatten()
        grads = torch.autograd.grad(logits.sum(), [module.weight for module in counted.values()], allow_unused=True)
    crossed = {
        name: (torch.zeros_like(module.weight) if grad is None else grad * module.weight).gt(0).cpu()
        for (name, module), grad in zip(counted.items(), grads, strict=True)
    }
    return crossed, (logits > 0).cpu()


def _kept(module: nn.Module) -> Tensor:
    mask = getattr(module, "mask", None)
    return torch.ones_like(module.get_parameter("weight"), dtype=torch.bool) if mask is None else mask


def _open_paths(module: nn.Module) -> None:
    """Turn a network into one whose every operation passes on what is positive, in place."""
    for name, child in module.named_children():
        if isinstance(child, PASSED) or not getattr(child, "counted", True):
            setattr(module, name, nn.Identity())
        elif isinstance(child, POOLED):
            # no padding is counted in: a window at the border holds real pixels too, so it stays positive
            mean = nn.AvgPool2d(child.kernel_size, child.stride, child.padding, ceil_mode=child.ceil_mode)
            setattr(module, name, mean)
        elif hasattr(child, "shares"):
            child.get_parameter("scale").data.fill_(1.0)
        else:
            _open_paths(child)
