"""A convolution (or a linear layer) of live weights as one step of a forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparse_lab.sparse_cpu import border_kernels, conv_kernels, statistics_kernels
from sparse_lab.sparse_cpu.autograd import DONE, Gradient, Tape, Value, gradient_of
from sparse_lab.sparse_cpu.border import Borders, classes
from sparse_lab.sparse_cpu.layout import BFLOAT16, SPARE, Shape, pixels, unpack
from sparse_lab.sparse_cpu.sparse_weights import Order, Record, SparseWeight
from sparse_lab.sparse_cpu.timers import timed

RowsWork = tuple[tuple[int, ...], int, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
BordersWork = tuple[tuple[NDArray[np.int64], ...], NDArray[np.int64], Borders, NDArray[np.int64], NDArray[np.int64]]

NOTHING = np.empty(0)
AT_A_TIME = 256  # bytes of a row that are summed
NEAREST = 8 * 1024  # bytes of maps that stay in the nearest cache while all channels read them
ENTRIES = 20  # of a channel in a slice, at least: less do not make up for adding slices up


@dataclass(frozen=True)
class Filter:
    """What F.conv2d is told besides its tensors. shape: (outputs, inputs / groups, rows, columns)."""

    shape: tuple[int, int, int, int]
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output(self, x: Shape) -> Shape:
        size = [
            (inside + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for inside, pad, dilation, kernel, stride in zip(
                (x.height, x.width), self.pad, self.dilation, self.shape[2:], self.stride, strict=True
            )
        ]
        return x.like(self.shape[0], *size)

    def by_rows(self, x: Shape) -> bool:
        """Can whole rows be added up: one output for each position, and no tap beyond the spare pixel?"""
        z = self.output(x)
        reach = max(self.pad[1], self.shape[3] - 1 - self.pad[1])
        plain = self.stride == (1, 1) and self.dilation == (1, 1)
        return plain and (z.height, z.width) == (x.height, x.width) and reach <= SPARE


@dataclass(frozen=True)
class Moments:
    """Of a convolution's outputs, over the batch: mean and biased variance a channel, float64 [C]."""

    mean: NDArray[np.float64]
    variance: NDArray[np.float64]


class Conv:
    """z = bias + conv(x, factor * weight), computed when it is first asked for.

    factor: one number (a shared weight's scale) or None.
    """

    def __init__(
        self,
        tape: Tape,
        x: Value,
        live: SparseWeight,
        filter: Filter,
        bias: Tensor | None,
        factor: Tensor | None = None,
    ) -> None:
        self.tape = tape
        self.x = x
        self.live = live
        self.filter = filter
        self.bias = bias
        self.factor = factor
        self.shape = filter.output(x.shape)
        self._step: _ConvStep | None = None
        self._z: Value | None = None

    def value(self) -> Value:
        z, step = self._computed(with_moments=False)
        step.centred = False  # not everybody takes the mean away
        return z

    def with_moments(self) -> tuple[Value, Moments]:
        """The outputs, for a BatchNorm, and their moments, which cost next to nothing while a plane is in the cache."""
        z, step = self._computed(with_moments=True)
        return z, step.moments or moments_of(z)

    def _computed(self, with_moments: bool) -> tuple[Value, _ConvStep]:
        if self._z is None or self._step is None:
            self._step = _ConvStep(self, with_moments)
            edges = (self.x.edge, self.live.weight, self.bias, self.factor)
            self._z = self.tape.made(self._step, self._step.z, *edges)
        return self._z, self._step


class _ConvStep:
    """What reads maps, and what reads channels that are one number an image, are apart: `_maps` are the
    inputs that are maps (None: all), `_dead` the entries that read others.
    """

    def __init__(self, conv: Conv, with_moments: bool) -> None:
        self.tape, self.x, self.live, self.filter = conv.tape, conv.x, conv.live, conv.filter
        self.bias, self.factor, self.shape = conv.bias, conv.factor, conv.shape
        self.centred = True  # a BatchNorm takes the mean away again, so that the bias has no gradient
        self.moments: Moments | None = None
        self.z = self.tape.new(self.shape)
        self._recall(self._recorded())
        self._forward(self.z, with_moments)

    def _recorded(self) -> Record:
        """What a pass does that the mask, the kinds of channels and the shapes decide. It is worked out once."""
        x, tape = self.x, self.tape
        kind = tape.stored.char, tape.wants_dense, tape.threads
        return self.live.record(self.filter, x.shape, kind, x.varying.tobytes())

    def _recall(self, record: Record) -> None:
        self._record, self._kept = record, self.live.values
        self._maps, self._dead = record.once("read", self._read)

    def _read(self) -> tuple[NDArray[np.bool_] | None, Order | None]:
        """Input channels that are maps (None: all), and the entries that read others (None: no such)."""
        if self.tape.wants_dense or self.x.varying.all():
            return None, None
        maps = self.x.varying.copy()
        dead = self._order("output", ~maps)
        return maps, dead if dead.channels.size else None

    def _forward(self, z: Value, with_moments: bool) -> None:
        self.x.readers += 1
        bias = self.tape.numbers(NOTHING if self.bias is None else self.bias)
        varying, per_image, alone, mixed, adds = self._record.once("kinds", self._kinds)
        constant = bias if bias.size else np.zeros(z.shape.channels, self.tape.dtype)
        z.hold(varying, constant, per_image, None if per_image is None else self._images(constant))
        means, squares = self._room(constant) if with_moments else (NOTHING, NOTHING)
        if z.images is not None and with_moments:
            _moments_of_images(z, means, squares)
        if self._dead is None or self._silent:
            self._sum_maps(z, self._channels[1], bias, means, squares)
        else:
            self._sum_maps(z, alone, bias, means, squares)
            self._sum_maps(z, mixed, bias, NOTHING, NOTHING)
        if self._dead is not None:
            self._sum_borders(z, adds, bias, means, squares)
        if with_moments:
            self.moments = merged(means, squares, z.shape)

    @property
    def _silent(self) -> bool:
        """Are all the numbers that dead entries read zero, and without a gradient?"""
        silent = self.x.silent
        return silent is not None and bool(silent[self._record.once("borders", self._borders_work)[4]].all())

    @property
    def _channels(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Inputs and outputs that have entries which read maps."""
        return self._record.once(
            "channels",
            lambda: (self._order("input", self._maps).channels, self._order("output", self._maps).channels),
        )

    def _room(self, constant: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of planes that hold one number, the moments."""
        means = np.empty((self.shape.blocks, len(constant)))
        means[:] = constant
        return means.reshape(-1), np.zeros(means.size)

    def _kinds(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_] | None, NDArray, NDArray, NDArray[np.bool_]]:
        """Of outputs: those that vary, and those that are one number an image (None: no such). A channel without a live
        weight is its bias everywhere, and one that reads numbers alone is a number where no tap leaves the image.

        Then the channels that read maps alone, those that read numbers too, and [C] which read maps at all.
        """
        channels = self._order("output", self._maps).channels
        reads_maps = np.zeros(self.shape.channels, np.bool_)
        reads_maps[channels] = True
        if self._dead is None:
            return reads_maps, None, channels, channels[:0], reads_maps
        mixed = np.zeros_like(reads_maps)
        mixed[self._dead.channels] = True
        alone, both = channels[~mixed[channels]], channels[mixed[channels]]
        if self._has_borders():
            return reads_maps | mixed, None, alone, both, reads_maps
        per_image = mixed & ~reads_maps
        return reads_maps, per_image if per_image.any() else None, alone, both, reads_maps

    def _sum_maps(self, z: Value, channels: NDArray, bias: NDArray, *moments: NDArray) -> None:
        if not channels.size:
            return
        x = self.x.read(self._order("input", self._maps).channels)
        with timed("forward convolution"):
            if self._by_rows:
                sizes, pad, first, offsets, at = self._record.once("rows forward", self._rows_forward)
                conv_kernels.rows(
                    x, z.buffer.array, sizes, channels, pad, first, offsets, self._values(at), bias, False, *moments
                )
            else:
                sizes, taps, at = self._record.once("taps forward", lambda: self._taps_work("output"))
                conv_kernels.taps(x, z.buffer.array, sizes, channels, *taps, self._values(at), bias, *moments)

    def _rows_forward(self) -> RowsWork:
        order, offsets = self._sliced("output")
        return self._rows_sizes(self.x.shape, self.shape), self.filter.pad[0], order.first, offsets, order.entries

    def _taps_work(self, side: str) -> tuple[tuple[int, ...], tuple[Any, ...], NDArray[np.int64]]:
        order = self._order(side, self._maps)
        sizes, *geometry = self._taps_geometry()
        return sizes, (*geometry, *self._taps(order)), order.entries

    def _sum_borders(self, z: Value, adds: NDArray[np.bool_], bias: NDArray, *moments: NDArray) -> None:
        taps, at, borders, channels, read = self._record.once("borders", self._borders_work)
        if self._silent:
            channels = channels[~adds[channels]]
        if not channels.size:
            return
        entries = (*taps, self._values(at), bias, self.x.numbers_of(read, self.tape.dtype))
        with timed("forward convolution"):
            work = z.shape.map_sizes, channels, adds, borders
            border_kernels.border(z.buffer.array, *work, *entries, *moments)

    def _borders_work(self) -> BordersWork:
        """Of the entries that read numbers; then those of their channels that vary, and the channels that they read."""
        assert self._dead is not None
        varying = self._record.once("kinds", self._kinds)[0]
        channels = self._dead.channels
        read = np.unique(self._dead.inner)
        return self._taps(self._dead), self._dead.entries, self._borders(), channels[varying[channels]], read

    def _images(self, bias: NDArray) -> NDArray:
        """[blocks, C, block] what dead entries add up to, and the bias, in a map of one class of positions."""
        assert self._dead is not None
        taps, at, borders, _, read = self._record.once("borders", self._borders_work)
        shape = self.shape.like(self.shape.channels, 1, 1)
        one = np.zeros(shape.numbers, self.tape.dtype)
        entries = (*taps, self._values(at), bias, self.x.numbers_of(read, self.tape.dtype))
        place = np.zeros(1, np.int64)
        nothing = np.zeros(shape.channels, np.bool_)
        work = shape.map_sizes, self._dead.channels, nothing, (place, place, *borders[2:])
        border_kernels.border(one, *work, *entries, NOTHING, NOTHING)
        return pixels(one, shape)[:, :, 0, 0].numpy().copy()

    def _has_borders(self) -> bool:
        return any(len(inside) > 1 for inside in self._borders()[2:])

    def _borders(self) -> Borders:
        x, z, filter = self.x.shape, self.shape, self.filter
        sides = zip(filter.shape[2:], filter.stride, filter.pad, filter.dilation, strict=True)
        rows, columns = (
            classes(*side, inside, outside)
            for side, inside, outside in zip(sides, (x.height, x.width), (z.height, z.width), strict=True)
        )
        return rows[0], columns[0], rows[1], columns[1]

    def backward(self) -> tuple[Tensor | None, ...]:
        record = self._recorded()
        if record is not self._record:  # the mask is another by now
            self._recall(record)
        g = self.z.parted(self.tape)
        if self.tape.wants_dense:
            g.spread(g.even)
        else:
            g.part(self.z.varying)
        weight = self.live.weight
        gradient = np.zeros(len(self._record.positions))
        self._border_gradients(g, gradient)
        factor = self._weight_gradient(g, gradient) if weight.requires_grad or self.factor is not None else None
        dense = self._dense_gradient(g) if self.tape.wants_dense and weight.requires_grad else None
        bias = None if self.bias is None else gradient_of(self.bias, self._bias_gradient(g))
        if self.x.needs_gradient:
            self._input_gradient(g)
        return DONE, dense, bias, factor

    def _border_gradients(self, g: Gradient, gradient: NDArray[np.float64]) -> None:
        """Of the entries that read numbers, into `gradient`; and of those numbers."""
        dead = self._dead
        if dead is None or self._silent:
            return
        taps, at, borders, _, numbers = self._record.once("borders", self._borders_work)
        touched = g.written | g.even
        channels = dead.channels[touched[dead.channels]]
        shape, inputs = self.shape, self.x.shape.channels
        room = shape.blocks, len(dead.entries)
        partial, sums = np.zeros(room), np.zeros((*room, shape.block))
        totals = np.zeros((shape.blocks, shape.channels, shape.block)) if g.totals is None else g.totals
        work = shape.map_sizes, channels, g.written, totals, borders
        entries = (*taps, self.x.numbers_of(numbers, self.tape.dtype))
        with timed("weight gradient"):
            border_kernels.border_weight(g.array, *work, *entries, partial, sums)
            gradient[dead.entries] = partial.sum(0)
        if self.x.needs_gradient:
            into, read = np.zeros((shape.blocks, inputs, shape.block)), np.zeros(inputs, np.bool_)
            with timed("input gradient"):
                border_kernels.border_input(sums, dead.inner, self._values(at), into)
            read[dead.inner] = True
            self.x.give_totals(self.tape, read, into)

    def _weight_gradient(self, g: Gradient, gradient: NDArray[np.float64]) -> Tensor | None:
        """Leaves that of the live weights with them; returns that of the factor. gradient: what is known of it."""
        entries, channels = self._record.once(("written", g.written.tobytes()), lambda: self._reached(g))
        partial = np.zeros((self.shape.blocks, len(entries)))
        x = self.x.buffer.array
        with timed("weight gradient"):
            if self._by_rows:
                sizes, pad, first, offsets, _ = self._record.once("rows forward", self._rows_forward)
                slices = (len(first) - 1) // (self.shape.channels * self.filter.shape[2])
                kernel = conv_kernels.rows_weight_sliced if slices > 1 else conv_kernels.rows_weight
                kernel(x, g.array, sizes, channels, pad, first, offsets, partial)
            else:
                sizes, taps, _ = self._record.once("taps forward", lambda: self._taps_work("output"))
                conv_kernels.taps_weight(x, g.array, sizes, channels, *taps, partial)
            statistics_kernels.summed(partial, entries, gradient)
        factor = None
        if self.factor is not None:
            product = np.asarray(np.dot(gradient, self.live.values.astype(np.float64)))
            factor = gradient_of(self.factor, product)
            gradient *= self.factor.item()
        if self.live.weight.requires_grad:
            self.live.add(gradient.astype(self.tape.dtype))
        return factor

    def _reached(self, g: Gradient) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The entries in the order in which kernels walk through them, and their channels that have a gradient."""
        order = self._sliced("output")[0] if self._by_rows else self._order("output", self._maps)
        return order.entries, order.channels[g.written[order.channels]]

    def _dense_gradient(self, g: Gradient) -> Tensor:
        """That of pruned weights too, in torch's layout; many times a sparse step, so only where a method asks."""
        weight = self.live.weight
        with timed("dense gradient"), torch.no_grad():
            filter = self.filter
            gradient = torch.ops.aten.convolution_backward(
                unpack(g.whole(), self.shape), self.x.tensor(), weight.detach().view(filter.shape), None, filter.stride,
                filter.pad, filter.dilation, False, [0, 0], filter.groups, [False, True, False],
            )[1].view_as(weight)  # fmt: skip
            return gradient if self.factor is None else gradient * self.factor

    def _bias_gradient(self, g: Gradient) -> NDArray:
        if self.centred:
            return np.zeros(self.shape.channels, self.tape.dtype)
        return sums(g) if g.totals is None else sums(g) + g.totals.sum((0, 2))

    def _input_gradient(self, g: Gradient) -> None:
        channels, outputs = self._channels
        g.write(outputs)
        y, adds = self.x.receiving(self.tape, channels)
        with timed("input gradient"):
            if self._by_rows:
                sizes, pad, first, offsets, at = self._record.once("rows backward", self._rows_backward)
                weights = first, offsets, self._values(at), np.zeros(0, self.tape.dtype)
                conv_kernels.rows(g.array, y, sizes, channels, pad, *weights, adds, NOTHING, NOTHING)
            else:
                sizes, taps, at = self._record.once("taps backward", lambda: self._taps_work("input"))
                conv_kernels.taps_input(g.array, y, sizes, channels, *taps, self._values(at), adds)

    def _rows_backward(self) -> RowsWork:
        order, offsets = self._sliced("input")
        pad = self.filter.shape[2] - 1 - self.filter.pad[0]
        return self._rows_sizes(self.shape, self.x.shape), pad, order.first, offsets, order.entries

    @property
    def _by_rows(self) -> bool:
        return self._record.once("by rows", lambda: self.filter.by_rows(self.x.shape))

    def _sliced(self, side: str) -> tuple[Order, NDArray[np.int64]]:
        """Entries in slices of the other channels that lie in the cache, and their offsets."""
        order = self._order(side, self._maps)
        others = self.x.shape.channels if side == "output" else self.shape.channels
        wide = AT_A_TIME + (self.filter.shape[3] - 1) * self.x.shape.block * self.tape.dtype.itemsize
        each = len(order.entries) // max(1, len(order.channels))
        slices = max(1, min(-(-others * self.filter.shape[2] * wide // NEAREST), each // ENTRIES))
        if self.tape.stored == BFLOAT16:
            slices = 1  # what a slice leaves would be rounded before the next adds to it
        order = self.live.order(side, self.filter.shape, self.filter.groups, self._maps, slices)
        return order, self._offsets(side, slices)

    def _order(self, side: str, among: NDArray[np.bool_] | None) -> Order:
        return self.live.order(side, self.filter.shape, self.filter.groups, among)

    def _values(self, entries: NDArray[np.int64]) -> NDArray:
        """Of the kept weights, which are taken together once a pass: what is far apart is not in the cache."""
        values = self._kept[entries]
        return values if self.factor is None else values * values.dtype.type(self.factor.item())

    def _offsets(self, side: str, slices: int = 1) -> NDArray[np.int64]:
        shape, pad = self.x.shape, self.filter.pad
        lies = shape.height, shape.pitch, shape.block, pad
        return self.live.offsets(side, self.filter.shape, self.filter.groups, *lies, self._maps, slices)

    def _rows_sizes(self, source: Shape, target: Shape) -> tuple[int, ...]:
        sizes = (source.guard, target.guard, source.blocks, source.channels, target.channels)
        return (*sizes, source.height, source.width, source.block, self.filter.shape[2], self.tape.threads)

    def _taps_geometry(self) -> tuple[tuple[int, ...], ...]:
        x, z = self.x.shape, self.shape
        inputs = (x.blocks, x.block, x.channels, x.height, x.width, x.guard)
        outputs = (z.channels, z.height, z.width, z.guard)
        return (*inputs, *outputs), self.filter.stride, self.filter.pad, self.filter.dilation

    def _taps(self, order: Order) -> tuple[NDArray[np.int64], ...]:
        first = np.ascontiguousarray(order.first[:: self.filter.shape[2]])
        return first, order.inner, order.row, order.column


def sums(g: Gradient) -> NDArray[np.float64]:
    """[C] a gradient summed over images and positions; zero where nothing is written."""
    shape, channels = g.shape, g.channels
    partial = np.zeros((shape.blocks, shape.channels))
    sizes = (shape.guard, shape.blocks, shape.channels, shape.height, shape.width, shape.block)
    with timed("other"):
        conv_kernels.channel_sums(g.array, *sizes, channels, partial)
    return partial.sum(0)


def moments_of(x: Value) -> Moments:
    """Of a map that is there already."""
    shape = x.shape
    planes = shape.blocks * shape.channels
    means, squares = np.empty(planes), np.empty(planes)
    with timed("normalisation, activation, pooling"):
        conv_kernels.moments(x.whole(), shape.guard, planes, shape.height, shape.width, shape.block, means, squares)
    return merged(means, squares, shape)


def _moments_of_images(z: Value, means: NDArray[np.float64], squares: NDArray[np.float64]) -> None:
    """Of planes that are one number an image, where they are: into means and squares of all planes."""
    assert z.images is not None
    shape, channels = z.shape, z.per_image
    images = z.images[:, channels].astype(np.float64)
    mean = images.mean(2)
    means.reshape(shape.blocks, -1)[:, channels] = mean
    spread = np.square(images - mean[:, :, None]).sum(2)
    squares.reshape(shape.blocks, -1)[:, channels] = shape.height * shape.width * spread


def merged(means: NDArray[np.float64], squares: NDArray[np.float64], shape: Shape) -> Moments:
    """Moments of the batch from those of equally large planes."""
    mean, variance = np.zeros((2, shape.channels))
    statistics_kernels.merged(means, squares, shape.height * shape.width * shape.block, mean, variance)
    return Moments(mean, variance)
