"""How sparse a network effectively is: weights on a path from input to logits, dead channels, connected or not.

At 99.99% most random masks fall apart: logits are constant and every gradient is zero. That has to be said aloud.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparse_lab.sparsity.following import NotFollowed, draw, follow
from sparse_lab.sparsity.images import Shape
from sparse_lab.sparsity.masks import COUNTED, Counted, count_kept, layers


@dataclass(frozen=True)
class Connectivity:
    """kept: counted weights in the masks; effective: those on a path from an input pixel to a logit. not_known: why the
    network could not be followed; then all but `kept` is None, and nothing is said to be cut or dead.
    """

    kept: int
    effective: int | None = None
    channels: int | None = None
    dead_channels: int | None = None
    dead_layers: list[str] = field(default_factory=list)
    logits: int | None = None
    live_logits: int | None = None
    connected: bool | None = None
    effective_by_layer: dict[str, int] = field(default_factory=dict)
    not_known: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a record, without the layers one by one, and without what is not the matter."""
        left_out = ("effective_by_layer", *(("not_known",) if self.not_known is None else ()))
        return {key: value for key, value in asdict(self).items() if key not in left_out}


def connectivity(model: nn.Module, shape: Shape) -> Connectivity:
    """How much of what the masks of `model` keep has an effect. A channel (of a conv) is dead when none of its weights
    is on a path; a layer is dead when none of its weights is. A path through a layer's dense offset keeps alive too.
    """
    masks = {name: _kept(module) for name, module in layers(model).items()}
    kept = sum(count_kept(masks).values())
    try:
        crossed, links, logits = _sweep(model, shape, masks)
    except NotFollowed as error:
        return Connectivity(kept, not_known=str(error))
    alive = {name: mask | links[name] if name in links else mask for name, mask in crossed.items()}
    convs = [mask.flatten(1).any(1) for mask in alive.values() if mask.dim() > 2]
    effective = count_kept(crossed)
    live = int(logits.sum())
    return Connectivity(
        kept=kept,
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
    may cross a layer through its dense `offset`, if it has one, wherever that is not zero. Weights are judged by the
    mask and not by value; taps that only ever see padding are on no path. Modules that say `counted = False` pass on
    what they get, and a shared weight is used at its plain value. Raise NotFollowed where the network cannot be
    followed.
    """
    crossed, _, logits = _sweep(model, shape, masks)
    return {name: mask.cpu() for name, mask in crossed.items()}, logits.cpu()


def _sweep(
    model: nn.Module, shape: Shape, masks: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """What `on_paths` returns, and between the two the places in which a path crosses a layer through its offset."""
    # parameters become others anyway: no number of them is copied
    shared: dict[int, Any] = {id(one): nn.Parameter(one.detach(), requires_grad=False) for one in model.parameters()}
    probe = copy.deepcopy(model, shared)
    _pass_on(probe)
    counted = layers(probe)
    links = {name: _link(module, masks[name]) for name, module in counted.items() if hasattr(module, "offset")}
    found = follow(probe, shape, counted, masks)
    crossed = {name: there & masks[name].to(there.device) for name, there in found.on_path.items()}
    return crossed, {name: found.on_path[name] & link for name, link in links.items()}, found.logits.flatten()


def _kept(module: nn.Module) -> Tensor:
    mask = getattr(module, "mask", None)
    return torch.ones_like(module.get_parameter("weight"), dtype=torch.bool) if mask is None else mask


def _link(module: Counted, mask: Tensor) -> Tensor:
    """Turn a layer with an offset into a plain one, and add one that links in every place where the offset is not zero
    under `mask`; returns those places.
    """
    if hasattr(module, "mask"):
        module.mask = mask.to(module.weight.device)  # what fills the pruned places moves with them
    links: Tensor = module.offset != 0  # type: ignore[assignment, operator]
    module.__class__ = next(kind for kind in COUNTED if isinstance(module, kind))  # type: ignore[assignment]
    for part in dict(module.named_buffers()):
        delattr(module, part)  # not looked at any more, and a fixed offset is as large as the weight
    beside = copy.deepcopy(module).requires_grad_(False)
    beside.bias = None
    beside.weight.data = draw(links, torch.Generator(links.device).manual_seed(1))
    module.register_forward_hook(lambda _, inputs, output: output + beside(*inputs))
    return links


def _pass_on(module: nn.Module) -> None:
    """Take out of a network, in place, what only bends what goes through it: paths are those of weights alone."""
    for name, child in module.named_children():
        if not getattr(child, "counted", True):
            setattr(module, name, nn.Identity())
        else:
            _pass_on(child)
