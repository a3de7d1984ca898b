"""What a kernel did, as torch's autograd sees it.

The gradients of maps stay in the layout of the kernels, in buffers that are used again: they lie in `Value.gradient`.
What torch's graph is told is who read whom. Every step is one autograd function whose output is an empty tensor, the
`edge` of the map that it made; a step that reads the map takes that edge, and what torch computes itself hangs on the
same graph. Going back, torch walks through steps and its own functions in the reverse order of their making, which is
always the same: so are the sums.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_lab.sparse_cpu import image_kernels, norm_kernels, statistics_kernels
from sparse_lab.sparse_cpu.layout import BFLOAT16, Buffer, Pool, Shape, fill, number_dtype, pack, spread, unpack
from sparse_lab.sparse_cpu.reading import MAP, Reading, reread
from sparse_lab.sparse_cpu.sparse_weights import SparseWeight
from sparse_lab.sparse_cpu.timers import timed

DONE = torch.empty(0)  # the gradient of an edge: the map's own lies in its `Value`


class Node(Protocol):
    """One step of a forward pass."""

    def backward(self) -> tuple[Tensor | None, ...]:
        """Take the gradient of what came out, give those of the maps that went in, and return one for each edge that
        the step was recorded with: `DONE` for a map, a tensor for a tensor, or None.
        """
        ...


class Gradient:
    """Of a map: a part that differs from position to position, and one that is even over the positions of an image.

    buffer: of the first part; the channels of it that are written, all others are zero, their memory holds anything.
    totals: [blocks, C, block] float64, the second part added up over positions; `even` are the channels that have one.
    A channel that is one number an image has no other gradient than such a total. sums: what is known of the first
    part, by whoever wrote it and for whoever goes on with it.
    """

    def __init__(self, shape: Shape, buffer: Buffer, written: NDArray[np.bool_]) -> None:
        self.shape = shape
        self.buffer = buffer
        self.written = written
        self.even = np.zeros(shape.channels, np.bool_)
        self.totals: NDArray[np.float64] | None = None
        self.sums: Any = None

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
            fill(self.array, self.shape, missing, np.zeros(missing.size, number_dtype(self.array)))
            self.written[missing] = True

    def whole(self) -> NDArray:
        """Every channel, zeros too."""
        self.write(np.arange(self.shape.channels))
        return self.array

    def add_totals(self, channels: NDArray[np.bool_], totals: NDArray[np.float64]) -> None:
        """totals: [blocks, C, block], read where `channels` are."""
        if self.totals is None:
            self.totals = np.zeros((self.shape.blocks, self.shape.channels, self.shape.block))
        statistics_kernels.add_where(self.totals, channels, np.ascontiguousarray(totals))
        self.even |= channels

    def part(self, varying: NDArray[np.bool_]) -> None:
        """Of channels that vary, make all of it the part that differs; of all others, the even one."""
        if self.totals is not None:
            self.spread(varying)
        if statistics_kernels.beyond(self.written, varying):
            self.collect(~varying)

    def spread(self, among: NDArray[np.bool_]) -> None:
        """Of these channels, make the even part one of the other."""
        channels = np.flatnonzero(self.even & among)
        if not channels.size or self.totals is None:
            return
        shape = self.shape
        numbers = (self.totals / (shape.height * shape.width)).astype(number_dtype(self.array))
        for some, adds in ((channels[self.written[channels]], True), (channels[~self.written[channels]], False)):
            spread(self.array, shape, some, numbers, adds)
        self.written[channels] = True
        self.even[channels] = False
        self.totals[:, channels] = 0.0
        self.sums = None

    def collect(self, among: NDArray[np.bool_]) -> None:
        """Of these channels, make the part that differs an even one: nobody asks where it was."""
        found = self.written & among
        channels = np.flatnonzero(found)
        if channels.size:
            totals = np.zeros((self.shape.blocks, self.shape.channels, self.shape.block))
            image_kernels.totals(self.array, self.shape.map_sizes, channels, totals)
            self.add_totals(found, totals)
            self.written[channels] = False


class Value:
    """A map in the blocked layout, and while going back its gradient.

    A channel is of one of three kinds, by the masks and the network alone: `varying`, a map; one number everywhere,
    `constant`, for nothing feeds it; or, where it is `per_image`, one number for each image, `images`. The latter two
    are written only when somebody reads them, and so is a map that has a `writer`. At extreme sparsity most channels
    are no maps.

    edge: where the map stands in torch's graph; None where no gradient is asked for, and for the step that made the
    map: torch's graph holds the step, and nobody would ever let go of a ring.
    """

    __slots__ = ("__dict__", "edge")

    def __init__(self, shape: Shape, take: Callable[[], Buffer]) -> None:
        self.shape = shape
        self._take = take
        self._buffer: Buffer | None = None
        self.edge: Tensor | None = None
        self.gradient: Gradient | None = None
        self.readers = 0  # steps that will look at the map itself on the way back
        self.varying = np.ones(shape.channels, np.bool_)
        self.constant = np.zeros(shape.channels)
        self.per_image = np.zeros(shape.channels, np.bool_)
        self.images: NDArray | None = None  # [blocks, C, block], in the tape's dtype
        # [C] constants that are zero, and to which no gradient is passed: what reads them may leave them out
        self.silent: NDArray[np.bool_] | None = None
        self.means: NDArray[np.float64] | None = None  # [blocks, C, block] over positions, where somebody knows them
        self.sum: Any = None  # the `AffineSum` that it is, which may be read in its place
        self.writer: Callable[[NDArray[np.int64], NDArray], None] | None = None  # of channels that vary, into an array
        self._written = self.varying

    @property
    def buffer(self) -> Buffer:
        if self._buffer is None:
            self._buffer = self._take()
        return self._buffer

    def at(self, edge: Tensor | None) -> Value:
        """The same map, which stands there in torch's graph."""
        other = Value.__new__(Value)
        other.__dict__, other.edge = self.__dict__, edge
        return other

    @property
    def needs_gradient(self) -> bool:
        return self.edge is not None

    def hold(
        self,
        varying: NDArray[np.bool_],
        constant: NDArray,
        per_image: NDArray[np.bool_] | None = None,
        images: NDArray | None = None,
    ) -> None:
        """Say of which kind channels are, and what those that do not vary hold, before anything is written."""
        self.varying, self.constant, self._written = varying, constant, varying.copy()
        if per_image is not None and per_image.any():
            self.per_image, self.images = per_image, images

    def write_by(self, writer: Callable[[NDArray[np.int64], NDArray], None]) -> None:
        """Of channels that vary, nothing is written before somebody reads them."""
        self.writer, self._written = writer, np.zeros_like(self.varying)

    def read(self, channels: NDArray[np.int64]) -> NDArray:
        """The map, with these channels written."""
        missing = channels[~self._written[channels]]
        if missing.size:
            array = self.buffer.array
            varying, per_image = self.varying[missing], self.per_image[missing]
            constant = missing[~varying & ~per_image]
            if constant.size:
                fill(array, self.shape, constant, self.constant[constant].astype(number_dtype(array)))
            if per_image.any() and self.images is not None:
                spread(array, self.shape, missing[per_image], self.images, adds=False)
            if varying.any():
                if self.writer is None:
                    raise RuntimeError("compute=sparse has used this map's memory again: read it before going backward")
                self.writer(missing[varying], array)
            self._written[missing] = True
        return self.buffer.array

    def numbers(self, dtype: np.dtype) -> NDArray:
        """[blocks, C, block] what channels hold that do not vary; zero where they do."""
        shape = self.shape
        numbers = np.empty((shape.blocks, shape.channels, shape.block), dtype)
        numbers[:] = np.where(self.varying, 0.0, self.constant)[:, None]
        if self.images is not None:
            np.copyto(numbers, self.images, where=self.per_image[:, None])
        return numbers

    def numbers_of(self, channels: NDArray[np.int64], dtype: np.dtype) -> NDArray:
        """As `numbers`, of these channels, which do not vary; all others hold anything."""
        shape = self.shape
        numbers = np.empty((shape.blocks, shape.channels, shape.block), dtype)
        images = numbers[:, :0] if self.images is None else np.ascontiguousarray(self.images)
        constant = self.constant.astype(dtype, copy=False)
        statistics_kernels.numbers(channels, constant, self.per_image, images, numbers)
        return numbers

    def whole(self) -> NDArray:
        """The map with every channel written."""
        return self.read(np.arange(self.shape.channels))

    def widen(self) -> None:
        """Make every channel one that varies."""
        self.whole()
        self.hold(np.ones_like(self.varying), self.constant)
        self.per_image, self.images, self.silent = np.zeros_like(self.varying), None, None

    def maps(self) -> NDArray:
        """The map with every channel written that varies."""
        return self.read(np.flatnonzero(self.varying))

    def tensor(self) -> torch.Tensor:
        """(N, C, H, W), a copy."""
        with timed("pack"):
            return unpack(self.whole(), self.shape)

    def give(self, buffer: Buffer, written: NDArray[np.bool_] | None = None, sums: Any = None) -> None:
        """Add a gradient, of which these channels are written (all by default); its buffer is this value's then."""
        number = self.shape.channels
        new = Gradient(self.shape, buffer, np.ones(number, np.bool_) if written is None else written.copy())
        if self.gradient is None:
            self.gradient = new
        elif not self.gradient.written.any():
            self.gradient.buffer, self.gradient.written = new.buffer, new.written
        else:
            with timed("other"):
                norm_kernels.add(self.gradient.whole(), new.whole())
            sums = None
        self.gradient.sums = sums

    def give_totals(self, tape: Tape, channels: NDArray[np.bool_], totals: NDArray[np.float64]) -> None:
        """Add a gradient that is even over positions: [blocks, C, block], added up over them."""
        if channels.any():
            self._receives(tape).add_totals(channels, totals)

    def _receives(self, tape: Tape) -> Gradient:
        if self.gradient is None:
            self.gradient = Gradient(self.shape, tape.take(self.shape), np.zeros(self.shape.channels, np.bool_))
        return self.gradient

    def receiving(self, tape: Tape, channels: NDArray[np.int64]) -> tuple[NDArray, bool]:
        """Where to put the gradient of these channels, and whether it is to be added to what is there."""
        gradient = self._receives(tape)
        adds = bool(gradient.written[channels].any())
        if adds:
            gradient.write(channels)
        gradient.written[channels] = True
        gradient.sums = None
        return gradient.array, adds

    def taken(self, tape: Tape) -> Gradient:
        """The gradient, which nobody adds to any more, as a map."""
        gradient = self.parted(tape)
        if gradient.totals is not None:
            gradient.spread(gradient.even)
        return gradient

    def parted(self, tape: Tape) -> Gradient:
        """The gradient, which nobody adds to any more, with its even part beside it."""
        gradient = self._receives(tape)  # of zeros where nothing that reaches the loss reads this map
        self.gradient = None
        return gradient


class Tape:
    """What the steps of one forward pass share. `recording`: gradients will be asked for. `wants_dense`: those of
    pruned weights too. `dtype`: what kernels compute with, `stored`: how maps lie in memory. `answer`: what does a
    function of torch where a map is among its arguments.
    """

    def __init__(
        self,
        pool: Pool,
        live: Mapping[torch.nn.Parameter, SparseWeight],
        dtype: torch.dtype,
        wants_dense: bool,
        say_once: Callable[[str], None],
        answer: Callable[..., Any],
        bfloat16: bool = False,
    ) -> None:
        self.pool = pool
        self.live = live
        self.kind = dtype
        self.dtype = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
        self.stored = BFLOAT16 if bfloat16 and dtype == torch.float32 else self.dtype
        self.recording = torch.is_grad_enabled()
        self.wants_dense = wants_dense
        self.threads = numba.get_num_threads()
        self.say_once = say_once
        self.answer = answer
        self.entered: list[tuple[Any, ...]] | None = []  # the tensor that became a map last, and the map
        self._of_maps: dict[int, weakref.ref[Tensor]] = {}

    def note(self, tensors: Iterable[Tensor]) -> None:
        """These are torch's, and come of maps."""
        self._of_maps.update((id(one), weakref.ref(one)) for one in tensors)

    def comes_of_maps(self, tensor: Tensor) -> bool:
        known = self._of_maps.get(id(tensor))
        return known is not None and known() is tensor

    def new(self, shape: Shape) -> Value:
        return Value(shape, lambda: self.take(shape))

    def take(self, shape: Shape) -> Buffer:
        return self.pool.take(shape, self.stored)

    def packed(self, tensor: Tensor, shape: Shape) -> Buffer:
        buffer = self.take(shape)
        with timed("pack"):
            pack(tensor, shape, buffer.array)
        return buffer

    def made(self, node: Node, out: Value, *edges: Tensor | None) -> Value:
        """What `node` made out of maps, of which these are the edges, and of tensors."""
        if not self.recording:
            return out
        if torch.is_grad_enabled():
            edge = _Step.apply(node, *edges)
        else:
            with torch.enable_grad():
                edge = _Step.apply(node, *edges)
        return out.at(edge if edge.requires_grad else None)

    def numbers(self, values: NDArray | Tensor) -> NDArray:
        """One number a channel in the dtype that kernels compute with."""
        array = values.detach().numpy() if isinstance(values, Tensor) else values
        return np.ascontiguousarray(array, self.dtype)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, node: Node, *edges: Tensor | None) -> Tensor:
        ctx.node = node
        return torch.empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        found = _spent(ctx).backward()
        return None, *(one if asked else None for one, asked in zip(found, ctx.needs_input_grad[1:], strict=True))


class Entry:
    """A tensor of torch's that becomes a map: `reading` is how the tensor sees it."""

    def __init__(self, tape: Tape, tensor: Tensor, reading: Reading, shape: Shape) -> None:
        buffer = tape.packed(reread(tensor.detach(), reading, MAP, shape.sizes), shape)
        self.out = Value(shape, lambda: buffer)
        self._tape, self._reading = tape, reading
        self._tensor: Tensor | None = tensor

    def value(self) -> Value:
        tensor, self._tensor = self._tensor, None
        return self._tape.made(self, self.out, tensor)

    def backward(self) -> tuple[Tensor | None]:
        gradient, shape = self.out.taken(self._tape), self.out.shape
        with timed("pack"):
            return (reread(unpack(gradient.whole(), shape), MAP, self._reading, shape.sizes),)


class Exit(torch.autograd.Function):
    """A map that becomes a tensor of torch's, a contiguous copy, which sees it by `reading`."""

    @staticmethod
    def forward(ctx: Any, edge: Tensor, tape: Tape, value: Value, reading: Reading) -> Tensor:
        ctx.node = tape, value, reading
        return as_tensor(value, reading)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        tape, value, reading = _spent(ctx)
        shape = value.shape
        value.give(tape.packed(reread(gradient, reading, MAP, shape.sizes), shape))
        return DONE, None, None, None


def as_tensor(value: Value, reading: Reading) -> Tensor:
    """A copy, contiguous as it is read."""
    whole = value.tensor()
    if reading == MAP:
        return whole
    with timed("pack"):
        return reread(whole, MAP, reading, value.shape.sizes).clone(memory_format=torch.contiguous_format)


class Kept(torch.autograd.Function):
    """A masked weight where torch uses it: the gradient of what is kept goes to `live`, as after a kernel."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, live: SparseWeight, wants_dense: bool) -> Tensor:
        ctx.live, ctx.wants_dense = live, wants_dense
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        flat = gradient.detach().reshape(-1).numpy()
        ctx.live.add(flat[ctx.live.positions])
        return gradient if ctx.wants_dense else None, None, None


def _spent(ctx: Any) -> Any:
    """What goes back, once: its memory is somebody else's as soon as it has."""
    if ctx.node is None:
        raise RuntimeError("compute=sparse cannot go backward a second time through one forward pass")
    node, ctx.node = ctx.node, None
    return node


def gradient_of(tensor: Tensor | None, gradient: NDArray) -> Tensor | None:
    """In the shape and dtype of the tensor that it is the gradient of; None where none is wanted."""
    if tensor is None or not tensor.requires_grad:
        return None
    found = torch.from_numpy(np.ascontiguousarray(gradient))
    if found.dtype != tensor.dtype:
        found = found.to(tensor.dtype)
    return found if found.shape == tensor.shape else found.reshape(tensor.shape)
