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

from sparse_lab.sparsity.images import Shape, image_like
from sparse_lab.sparsity.masks import COUNTED, Counted, count_kept, excluded_layers, layers, maskable

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


def connectivity(model: nn.Module, shape: Shape) -> Connectivity:
    """How much of what the masks of `model` keep has an effect. A channel (of a conv) is dead when none of its weights
    is on a path; a layer is dead when none of its weights is. A path through a layer's dense offset keeps alive too.
    """
    masks = {name: _kept(module) for name, module in layers(model).items()}
    crossed, links, logits = _sweep(model, shape, masks)
    alive = {name: mask | links[name] if name in links else mask for name, mask in crossed.items()}
    convs = [mask.flatten(1).any(1) for mask in alive.values() if mask.dim() > 2]
    effective = count_kept(crossed)
    live = int(logits.sum())
    return Connectivity(
        kept=sum(count_kept(masks).values()),
        effective=sum(effective.values()),
        channels=sum(channels.numel() for channels in convs),
        dead_channels=sum(channels.numel() for channels in convs) - int(sum(channels.sum() for channels in convs)),
        dead_layers=[name for name, number in count_kept(alive).items() if not number],
        logits=logits.numel(),
        live_logits=live,
        connected=live > 0,
        effective_by_layer=effective,
    )


def on_paths(model: nn.Module, shape: Shape, masks: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Which weights of `masks` lie on a path from an input pixel to a logit, and which logits a path reaches.

    `masks` holds a bool tensor of the weight's shape for every counted layer; both answers are bool, on the CPU. A path
    may cross a layer through its dense `offset`, if it has one, wherever that is not zero.

    All paths are followed at once. Every kept weight becomes 1 / fan-in, and so does every offset beside it; biases go,
    BatchNorm and activations pass through, a shared weight is used at its plain value, max-pooling becomes the mean;
    then on an image of ones in float64 a logit is positive exactly when a path reaches it, and the gradient of the
    summed logits is positive exactly at the weights that lie on one. Taps that only ever see padding are on none. The
    product of 50 fan-ins is far from float64's limits.
    """
    crossed, _, logits = _sweep(model, shape, masks)
    return {name: mask.cpu() for name, mask in crossed.items()}, logits.cpu()


def _sweep(
    model: nn.Module, shape: Shape, masks: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """What `on_paths` returns, and between the two the places in which a path crosses a layer through its offset."""
    probe = copy.deepcopy(model).double().eval()
    _open_paths(probe)
    counted = layers(probe)
    links = {name: _link(module, masks[name]) for name, module in counted.items() if hasattr(module, "offset")}
    for name, module in counted.items():
        module.weight.data = masks[name].to(module.weight) / module.weight[0].numel()
        module.weight.requires_grad_(True)
    for module in (one for tied in excluded_layers(probe).values() for one in tied):  # dense: every path may go on
        module.weight.data = torch.full_like(module.weight, 1.0 / module.weight[0].numel())
    for module in (one for tied in maskable(probe).values() for one in tied.layers):
        if module.bias is not None:
            module.bias.data.zero_()
    with torch.enable_grad():
        logits = probe(image_like(probe, shape, 1.0)).flatten()
        grads = torch.autograd.grad(logits.sum(), [module.weight for module in counted.values()], allow_unused=True)
    # an offset has the gradient of the weight in its place
    on_path = {
        name: torch.zeros_like(module.weight, dtype=torch.bool) if grad is None else grad > 0
        for (name, module), grad in zip(counted.items(), grads, strict=True)
    }
    crossed = {name: here & (counted[name].weight > 0) for name, here in on_path.items()}
    return crossed, {name: on_path[name] & link for name, link in links.items()}, logits > 0


def _kept(module: nn.Module) -> Tensor:
    mask = getattr(module, "mask", None)
    return torch.ones_like(module.get_parameter("weight"), dtype=torch.bool) if mask is None else mask


def _link(module: Counted, mask: Tensor) -> Tensor:
    """Turn a layer with an offset into a plain one with 1 / fan-in beside it, in every place where the offset is not
    zero under `mask`; returns those places.
    """
    if hasattr(module, "mask"):
        module.mask = mask.to(module.weight.device)  # what fills the pruned places moves with them
    links: Tensor = module.offset != 0  # type: ignore[assignment, operator]
    module.__class__ = next(kind for kind in COUNTED if isinstance(module, kind))  # type: ignore[assignment]
    for part in dict(module.named_buffers()):
        delattr(module, part)  # not looked at any more, and a fixed offset is as large as the weight
    beside = copy.deepcopy(module).requires_grad_(False)
    beside.bias = None
    beside.weight.data = links.to(module.weight) / module.weight[0].numel()
    module.register_forward_hook(lambda _, inputs, output: output + beside(*inputs))
    return links


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
