"""What happened in a forward pass, so that it can be walked back.

One autograd function stands for the whole network; behind it is this tape, for the gradients of maps have to stay in
the layout of the kernels, in buffers that are used again, and are added up in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from sparse_lab.compute import norm_kernels
from sparse_lab.compute.layout import Buffer, Pool, Shape, pack, unpack
from sparse_lab.compute.live import Live
from sparse_lab.compute.profile import timed


class Node(Protocol):
    """One step of a forward pass."""

    def backward(self) -> None:
        """Take the gradient of what came out, give the gradients of what went in."""
        ...


class Value:
    """A map in the blocked layout, and while going back its gradient."""

    def __init__(self, shape: Shape, buffer: Buffer, needs_gradient: bool) -> None:
        self.shape = shape
        self.buffer = buffer
        self.needs_gradient = needs_gradient
        self.gradient: Buffer | None = None
        self.readers = 0  # steps that will look at the map itself on the way back

    def tensor(self) -> torch.Tensor:
        """(N, C, H, W), a copy."""
        return unpack(self.buffer.array, self.shape)

    def give(self, gradient: Buffer) -> None:
        """Add a gradient; the buffer is this value's from now on."""
        if self.gradient is None:
            self.gradient = gradient
        else:
            with timed("other"):
                norm_kernels.add(self.gradient.array, gradient.array)

    def taken(self) -> Buffer:
        """The gradient, which nobody adds to any more."""
        gradient, self.gradient = self.gradient, None
        assert gradient is not None
        return gradient


class Tape:
    """One forward pass. `recording`: gradients will be asked for. `wants_dense`: those of pruned weights too."""

    def __init__(
        self,
        pool: Pool,
        live: dict[torch.nn.Parameter, Live],
        dtype: np.dtype,
        recording: bool,
        wants_dense: bool,
        say_once: Callable[[str], None],
    ) -> None:
        self.pool = pool
        self.live = live
        self.dtype = dtype
        self.recording = recording
        self.wants_dense = wants_dense
        self.say_once = say_once
        self._nodes: list[Node] = []

    def new(self, shape: Shape) -> Value:
        return Value(shape, self.take(shape), self.recording)

    def take(self, shape: Shape) -> Buffer:
        return self.pool.take(shape, self.dtype)

    def packed(self, tensor: torch.Tensor, shape: Shape) -> Buffer:
        buffer = self.take(shape)
        with timed("pack"):
            pack(tensor, shape, buffer.array)
        return buffer

    def record(self, node: Node) -> None:
        if self.recording:
            self._nodes.append(node)

    def numbers(self, values: NDArray | torch.Tensor) -> NDArray:
        """One number a channel in the dtype of the maps."""
        array = values.detach().numpy() if isinstance(values, torch.Tensor) else values
        return np.ascontiguousarray(array, self.dtype)

    def backward(self) -> None:
        while self._nodes:  # what a node held goes back to the pool as soon as it is done
            self._nodes.pop().backward()


def accumulate(parameter: torch.nn.Parameter | None, gradient: NDArray) -> None:
    """Add to the `.grad` of a dense parameter."""
    if parameter is None or not parameter.requires_grad:
        return
    new = torch.from_numpy(np.ascontiguousarray(gradient)).to(parameter.dtype).view_as(parameter)
    parameter.grad = new if parameter.grad is None else parameter.grad + new
