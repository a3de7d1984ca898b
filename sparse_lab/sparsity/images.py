"""What a network reads: the shape of one input, an image to send through it, and the network without its memory."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sparse_lab.errors import SparseLabError

# (C, H, W) of an image, or whatever one input has, without the batch; a number: H = W of an image of three colours
Shape = int | tuple[int, ...]


def full_shape(shape: Shape) -> tuple[int, ...]:
    """Return the shape of one input, written out."""
    return (3, shape, shape) if isinstance(shape, int) else tuple(shape)


def image_like(model: nn.Module, shape: Shape, value: float = 0.0) -> Tensor:
    """Return one input that holds `value` everywhere, [1, *shape], on the device and in the type of the network."""
    like = next(model.parameters())
    return torch.full((1, *full_shape(shape)), value, device=like.device, dtype=like.dtype)


def send(model: nn.Module, image: Tensor) -> Any:
    """Return the output of `model` for an input that it may never have been meant for. Raise SparseLabError where that
    does not go through.
    """
    try:
        return model(image)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        check_forward(model, error)
        line = str(error).strip().splitlines()[0]
        raise SparseLabError(
            f"an input of shape {tuple(image.shape[1:])} does not go through {type(model).__name__} ({line})"
        ) from None


def check_forward(model: nn.Module, error: Exception) -> None:
    """Raise SparseLabError where that is what came of a network that cannot be called (a LightningModule, say)."""
    if isinstance(error, NotImplementedError) and '"forward"' in str(error):
        raise SparseLabError(
            f"{type(model).__name__} has no forward(), and this method sends inputs through it: define one"
        ) from None


def hollow(model: nn.Module) -> nn.Module:
    """A copy of the structure on the device "meta": no weight is copied, and the original is not touched."""
    with torch.inference_mode(False):
        empty: dict[int, Any] = {
            id(parameter): nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))
            for parameter in model.parameters()
        }
        for buffer in model.buffers():
            empty[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
        return copy.deepcopy(model, empty)
