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

from sparse_lab.sparse_cpu import norm_kernels
from sparse_lab.sparse_cpu.layout import Buffer, Pool, Shape, fill, pack, unpack
from sparse_lab.sparse_cpu.sparse_weights import SparseWeight
from sparse_lab.sparse_cpu.timers import timed


class Node(Protocol):
    """One step of a forward pass."""

    def backward(self) -> None:
        """Take the gradient of what came out, give the gradients of what went in."""
        ...


class Gradient:
    """Of a map: a buffer, and the channels of it that are written; all others are zero, their memory holds anything."""

    def __init__(self, shape: Shape, buffer: Buffer, written: NDArray[np.bool_]) -> None:
        self.shape = shape
        self.buffer = buffer
        self.written = written

    @property
    def array(self) -> NDArray:
        return self.buffer.array

    @property
    def channels(self) -> NDArray[np.int64]:
        """The written ones."""
        return np.flatnonzero(self.written)

    def write(self, channels: NDArray[np.int64]) -> None:
        """Make these channels memory that can be read: zeros where nothing is written yet."""
        missing = channels[~self.written[channels]]
        if missing.size:
            fill(self.array, self.shape, missing, np.zeros(missing.size, self.array.dtype))
            self.written[missing] = True

    def whole(self) -> NDArray:
        """Every channel, zeros too."""
        self.write(np.arange(self.shape.channels))
        return self.array


class Value:
    """A map in the blocked layout, and while going back its gradient.

    A channel that does not vary is one number everywhere, `constant`, for nothing feeds it; it is written only when
    somebody reads it. At extreme sparsity most channels are so.
    """

    def __init__(self, shape: Shape, buffer: Buffer, needs_gradient: bool) -> None:
        self.shape = shape
        self.buffer = buffer
        self.needs_gradient = needs_gradient
        self.gradient: Gradient | None = None
        self.readers = 0  # steps that will look at the map itself on the way back
        self.varying = np.ones(shape.channels, np.bool_)
        self.constant = np.zeros(shape.channels)
        self._written = self.varying

    def hold(self, varying: NDArray[np.bool_], constant: NDArray) -> None:
        """Say which channels vary, and what the others are, before anything is written."""
        self.varying, self.constant, self._written = varying, constant, varying.copy()

    def read(self, channels: NDArray[np.int64]) -> NDArray:
        """The map, with these channels written."""
        missing = channels[~self._written[channels]]
        if missing.size:
            array = self.buffer.array
            fill(array, self.shape, missing, self.constant[missing].astype(array.dtype))
            self._written[missing] = True
        return self.buffer.array

    def whole(self) -> NDArray:
        """The map with every channel written."""
        return self.read(np.arange(self.shape.channels))

    def tensor(self) -> torch.Tensor:
        """(N, C, H, W), a copy."""
        return unpack(self.whole(), self.shape)

    def give(self, buffer: Buffer, written: NDArray[np.bool_] | None = None) -> None:
        """Add a gradient, of which these channels are written (all by default); its buffer is this value's then."""
        number = self.shape.channels
        new = Gradient(self.shape, buffer, np.ones(number, np.bool_) if written is None else written.copy())
        if self.gradient is None:
            self.gradient = new
            return
        with timed("other"):
            norm_kernels.add(self.gradient.whole(), new.whole())

    def receiving(self, tape: Tape, channels: NDArray[np.int64]) -> tuple[NDArray, bool]:
        """Where to put the gradient of these channels, and whether it is to be added to what is there."""
        if self.gradient is None:
            buffer = tape.take(self.shape)
            self.gradient = Gradient(self.shape, buffer, np.zeros(self.shape.channels, np.bool_))
        adds = bool(self.gradient.written[channels].any())
        if adds:
            self.gradient.write(channels)
        self.gradient.written[channels] = True
        return self.gradient.array, adds

    def taken(self, tape: Tape) -> Gradient:
        """The gradient, which nobody adds to any more."""
        gradient, self.gradient = self.gradient, None
        if gradient is None:  # nothing that reaches the loss reads this map
            return Gradient(self.shape, tape.take(self.shape), np.zeros(self.shape.channels, np.bool_))
        return gradient


class Tape:
    """One forward pass. `recording`: gradients will be asked for. `wants_dense`: those of pruned weights too."""

    def __init__(
        self,
        pool: Pool,
        live: dict[torch.nn.Parameter, SparseWeight],
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
