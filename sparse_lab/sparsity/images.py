"""The shape of what a network reads, and an image of that shape to send through it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# (C, H, W) of an image, or whatever one input has, without the batch; a number: H = W of an image of three colours
Shape = int | tuple[int, ...]


def full_shape(shape: Shape) -> tuple[int, ...]:
    """Return the shape of one input, written out."""
    return (3, shape, shape) if isinstance(shape, int) else tuple(shape)


def image_like(model: nn.Module, shape: Shape, value: float = 0.0) -> Tensor:
    """Return one input that holds `value` everywhere, [1, *shape], on the device and in the type of the network."""
    like = next(model.parameters())
    return torch.full((1, *full_shape(shape)), value, device=like.device, dtype=like.dtype)
