"""Compactors: channels that can be trained away without harming what the rest has learnt (ResRep, Ding et al. 2021,
arXiv 2007.03260).

Surgery on a plain network: `install` puts a 1x1 convolution that starts as the identity behind the BatchNorm of each
named convolution, `add_penalty` pulls its rows to zero while training, `fuse` drops rows and folds what is left into
the convolution and its BatchNorm, so that the network is plain again. Its parameters are never masked or counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

SMALLEST_NORM = 1e-12  # a shorter row is pulled by less than the full strength, and a row of zeros not at all


class Compactor(nn.Conv2d):
    """(N, C, H, W) -> the same shape: every output channel a mixture of all channels, at first of itself alone.

    `alive` (bool, [C]) says of which rows the task's gradient counts.
    """

    counted = False  # not one of the network's weights: it is folded into them
    recipe: ClassVar[dict[str, float]] = {"momentum": 0.99, "weight_decay": 0.0}

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 1, bias=False)
        nn.init.dirac_(self.weight)
        self.alive: Tensor
        self.register_buffer("alive", torch.ones(channels, dtype=torch.bool))


class CompactedBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm with a compactor behind it. A part of the BatchNorm, so that no name of the plain network changes."""

    def __init__(self, channels: int, eps: float, momentum: float | None) -> None:
        super().__init__(channels, eps, momentum)
        self.compactor = Compactor(channels)

    def forward(self, input: Tensor) -> Tensor:
        return self.compactor(super().forward(input))


def install(model: nn.Module, convs: Sequence[str]) -> None:
    """A compactor behind the BatchNorm that follows each named convolution. In float32 no answer changes.

    Raises ValueError, before anything is changed, for a convolution that no BatchNorm of its channels follows, whose
    filters see different inputs (groups) or whose weight other places share, and where a compactor is already.
    """
    following = _batch_norms(model)
    for name in convs:
        _check(model, name, following)
    for name in dict.fromkeys(convs):
        norm = model.get_submodule(following[name])
        assert isinstance(norm, nn.BatchNorm2d)
        new = CompactedBatchNorm2d(norm.num_features, norm.eps, norm.momentum)
        new.compactor.to(norm.weight.device, norm.weight.dtype)
        _replace(model, following[name], norm, new)


def compactors(model: nn.Module) -> dict[str, Compactor]:
    """The compactors of `model` by the name of their convolution; empty once they are gone."""
    return {conv: norm.compactor for conv, _, norm in _compacted(model)}


def norms(model: nn.Module) -> dict[str, Tensor]:
    """Euclidean norm of every compactor's rows, [C], by the name of its convolution."""
    return {name: _row_norms(compactor.weight.detach()) for name, compactor in compactors(model).items()}


@torch.no_grad()
def add_penalty(model: nn.Module, strength: float) -> None:
    """gradient = alive * gradient + strength * Q / ||row of Q||, between backward and the optimizer's step.

    The paper's group lasso on rows. Gradients must be the true ones: unscale those of mixed precision first. Raises
    ValueError when a compactor has no gradient.
    """
    for name, compactor in compactors(model).items():
        if compactor.weight.grad is None:
            raise ValueError(f"the compactor of {name} has no gradient: run backward first")
        lengths = _row_norms(compactor.weight).clamp_min(SMALLEST_NORM)
        compactor.weight.grad.masked_fill_(~compactor.alive[:, None, None, None], 0.0)
        compactor.weight.grad.add_(compactor.weight / lengths[:, None, None, None], alpha=strength)


@torch.no_grad()
def fuse(model: nn.Module, keep: Mapping[str, Tensor]) -> list[nn.Parameter]:
    """Fold every compactor Q into its convolution and BatchNorm; returns the parameters that are gone, for the
    optimizer to forget.

    `keep`: for every compacted convolution a bool [C]; rows of Q that are not kept count as zero, and those channels
    come out of the BatchNorm as exact zeros. In evaluation mode no answer changes but for rounding. All other
    parameters stay the same objects, with the plain network's names and shapes; the optimizer's state for them is that
    of other weights.
    """
    found = list(_compacted(model))
    missing = [conv for conv, _, _ in found if conv not in keep]
    if missing:
        raise ValueError(f"keep says nothing of {missing[0]}")
    for conv, _, norm in found:
        module = model.get_submodule(conv)
        assert isinstance(module, nn.Conv2d)
        _fold(module, norm, keep[conv].to(norm.weight.device))
    return _take_out(model)


def rebuild_structure(model: nn.Module, names: Iterable[str]) -> None:
    """Take the compactors out if a state dict with these names was written after they were gone.

    Nothing is folded: the weights are to be loaded from there.
    """
    if not any(name.endswith(".compactor.weight") for name in names):
        _take_out(model)


def _fold(conv: nn.Conv2d, norm: CompactedBatchNorm2d, keep: Tensor) -> None:
    """Conv, BatchNorm and compactor as conv and BatchNorm alone, in place; float64, for these are products of three.

    The new BatchNorm gets the statistics that the new convolution's channels have (taking the old channels as
    uncorrelated, which is exact where Q is diagonal) and a weight that undoes them. Any others would do in evaluation
    mode; but with 0 and 1 a network that trains on would find every channel scaled anew at its first step.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    rows = norm.compactor.weight.double().flatten(1) * keep[:, None]
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    if conv.bias is not None:
        mean = mean - conv.bias.double()
        conv.bias.zero_()
    mixed = rows * norm.weight.double() / (variance + norm.eps).sqrt()
    conv.weight.copy_((mixed @ conv.weight.double().flatten(1)).view_as(conv.weight))
    # torch's own start where nothing is left to have statistics of
    norm.running_mean.copy_(mixed @ mean)
    norm.running_var.copy_(torch.where(keep, mixed.square() @ variance, 1.0))
    norm.bias.copy_(rows @ norm.bias.double())
    # from the rounded variance, which is the one that will be divided by
    norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt() * keep)


def _take_out(model: nn.Module) -> list[nn.Parameter]:
    gone: list[nn.Parameter] = []
    for _, name, norm in list(_compacted(model)):
        gone += norm.compactor.parameters()
        _replace(model, name, norm, nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum))
    return gone


def _replace(model: nn.Module, name: str, old: nn.BatchNorm2d, new: nn.BatchNorm2d) -> None:
    """Put `new` where `old` is, with its parameters and buffers (the very objects) and its mode."""
    for key, parameter in old.named_parameters(recurse=False):
        new.register_parameter(key, parameter)
    for key, buffer in old.named_buffers(recurse=False):
        new.register_buffer(key, buffer)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new.train(old.training))


def _batch_norms(model: nn.Module) -> dict[str, str]:
    """Names of the convolutions and their BatchNorms: the next layer in the model's order, with as many channels."""
    result: dict[str, str] = {}
    conv: tuple[str, nn.Module] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            if conv is not None and isinstance(conv[1], nn.Conv2d) and conv[1].out_channels == module.num_features:
                result[conv[0]] = name
            conv = None
        elif hasattr(module, "weight") and not isinstance(module, Compactor):
            conv = name, module
    return result


def _compacted(model: nn.Module) -> Iterator[tuple[str, str, CompactedBatchNorm2d]]:
    """Name of the convolution, name of its BatchNorm, and that BatchNorm, in the model's order."""
    for conv, name in _batch_norms(model).items():
        norm = model.get_submodule(name)
        if isinstance(norm, CompactedBatchNorm2d):
            yield conv, name, norm


def _check(model: nn.Module, name: str, following: Mapping[str, str]) -> None:
    if name not in following:
        raise ValueError(f"{name} is not followed by a BatchNorm")
    conv = model.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    if conv.groups > 1:
        raise ValueError(f"the filters of {name} see different inputs, so they cannot be mixed")
    if any(getattr(module, "shares", None) is conv for module in model.modules()):
        raise ValueError(f"other places share the weight of {name}")
    if isinstance(model.get_submodule(following[name]), CompactedBatchNorm2d):
        raise ValueError(f"{name} has a compactor already")


def _row_norms(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight.flatten(1), dim=1)
