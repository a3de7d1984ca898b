"""Weight sharing in residual stages (EAST, arXiv 2411.13545): later blocks reuse the second block's convolutions.

Surgery on a plain network. In every stage the blocks from the third on lose their convolution weights and use the
second block's (and its masks) times a learnable scalar each. BatchNorm and activations stay each block's own.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class SharedConv2d(nn.Module):
    """scale * conv(x) with another module's convolution: (N, inputs, H, W) -> (N, outputs, H/stride, W/stride).

    Only `scale` (a scalar, starting uniform in [0, 1)) is this module's own parameter: state dicts hold the shared
    weight once, where it lives, and its gradient is the sum over all uses.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand((), dtype=conv.weight.dtype, device=conv.weight.device))
        self._lender = (conv,)  # in a tuple, for torch must not take it as a part of this module

    @property
    def shares(self) -> nn.Conv2d:
        """The convolution whose weight is used here."""
        return self._lender[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.shares(x)

    def extra_repr(self) -> str:
        return f"shares {self.shares}"


def share(model: nn.Module) -> None:
    """Share weights within every stage of `model`, in place. Raises ValueError when no block repeats."""
    found = [pair for stage in _stages(model) for pair in _repeats(stage)]
    if not found:
        raise ValueError("no stage of it has blocks that repeat the second one")
    for block, name, conv in found:
        parent, _, last = name.rpartition(".")
        setattr(block.get_submodule(parent), last, SharedConv2d(conv).train(conv.training))


def unshared(model: nn.Module) -> nn.Module:
    """A copy of `model` as the plain network that it equals: every reuse becomes a convolution of its own, with its
    mask.

    A network without sharing comes back as a plain copy.
    """
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, SharedConv2d):
            own = copy.deepcopy(module.shares)
            for parameter in own.parameters():
                parameter.data.mul_(module.scale.detach())
            parent, _, last = name.rpartition(".")
            setattr(plain.get_submodule(parent), last, own)
    return plain


def _stages(model: nn.Module) -> list[nn.Sequential]:
    """Chains of at least three blocks of one kind."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Sequential) and len(module) > 2 and len({type(block) for block in module}) == 1
    ]


def _repeats(stage: nn.Sequential) -> list[tuple[nn.Module, str, nn.Conv2d]]:
    """(block, name in it, the second block's convolution) for all that the third and later blocks repeat."""
    second = _convolutions(stage[1])
    found = []
    for block in list(stage)[2:]:
        for name, conv in _convolutions(block).items():
            if name in second and _likeness(second[name]) == _likeness(conv):
                found.append((block, name, second[name]))
    return found


def _convolutions(block: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: module for name, module in block.named_modules() if name and isinstance(module, nn.Conv2d)}


def _likeness(conv: nn.Conv2d) -> tuple[object, ...]:
    counted = getattr(conv, "excluded", False), getattr(conv, "own_sparsity", None)  # one mask cannot be both
    return conv.weight.shape, conv.stride, conv.padding, conv.dilation, conv.groups, conv.bias is None, *counted
