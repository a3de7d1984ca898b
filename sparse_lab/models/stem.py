"""Surgery on the first convolution of another library's network: other channels of an image, or small images."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparse_lab.errors import SparseLabError, UserError
from sparse_lab.sparsity.images import hollow, image_like, send

POOLS = (nn.MaxPool2d, nn.AvgPool2d)


def read_channels(network: nn.Module, name: str, shape: tuple[int, int, int]) -> None:
    """Let the first convolution read images of so many channels, in place, with new random weights."""
    first = _called(network, name, (3, *shape[1:]))[0]
    conv = network.get_submodule(first)
    assert isinstance(conv, nn.Conv2d)
    _replace(network, first, _conv(conv, shape[0], conv.kernel_size, conv.stride, conv.padding))


def adapt(network: nn.Module, name: str, shape: tuple[int, int, int]) -> None:
    """Begin with a 3x3 convolution of stride 1 and no pooling, in place: the stem for small images. Its weights are
    new.

    Raise UserError where the network begins otherwise than ImageNet's convolutional networks do.
    """
    first, *rest = _called(network, name, shape)
    conv = network.get_submodule(first)
    if not isinstance(conv, nn.Conv2d) or max(conv.stride) == 1:
        raise UserError(f"model.adapt_stem: {name} begins with no convolution of stride 2 or more; leave it out")
    _replace(network, first, _conv(conv, conv.in_channels, (3, 3), (1, 1), (1, 1)))
    for part in rest:
        module = network.get_submodule(part)
        if isinstance(module, POOLS):
            _replace(network, part, nn.Identity())
        if not isinstance(module, nn.Conv2d) or max(module.stride) > 1:
            break
    try:
        _called(network, name, shape)
    except SparseLabError:
        raise UserError(
            f"model.adapt_stem: {name} cuts images into patches, and has as many as its own stem makes: leave it out, "
            "and set the size of a patch where it has an option for it (model.options.patch_size=4)"
        ) from None


def _called(network: nn.Module, name: str, shape: tuple[int, int, int]) -> list[str]:
    """The convolutions and pools in the order in which an image meets them."""
    seen: list[str] = []
    empty = hollow(network).eval()

    def note(part: str) -> Any:
        return lambda module, inputs, output: seen.append(part)

    for part, module in empty.named_modules():
        if isinstance(module, (nn.Conv2d, *POOLS)):
            module.register_forward_hook(note(part))
    with torch.no_grad():
        send(empty, image_like(empty, shape))
    if not seen or not isinstance(network.get_submodule(seen[0]), nn.Conv2d):
        raise UserError(f"{name} does not begin with a convolution: model.adapt_stem and dataset.channels need one")
    return seen


def _conv(like: nn.Conv2d, channels: int, kernel: Any, stride: Any, padding: Any) -> nn.Conv2d:
    new = nn.Conv2d(channels, like.out_channels, kernel, stride, padding, bias=like.bias is not None)
    if not new.weight.is_meta:
        nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
        if new.bias is not None:
            nn.init.zeros_(new.bias)
    return new


def _replace(network: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, new.train(network.training))
