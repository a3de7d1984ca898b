"""A convolution (or a linear layer) of live weights as one step of a forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparse_lab.sparse_cpu import conv_kernels
from sparse_lab.sparse_cpu.autograd import DONE, Gradient, Tape, Value, gradient_of
from sparse_lab.sparse_cpu.layout import SPARE, Shape, unpack
from sparse_lab.sparse_cpu.sparse_weights import Order, SparseWeight
from sparse_lab.sparse_cpu.timers import timed

NOTHING = np.empty(0)


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
    def __init__(self, conv: Conv, with_moments: bool) -> None:
        self.tape, self.x, self.live, self.filter = conv.tape, conv.x, conv.live, conv.filter
        self.bias, self.factor, self.shape = conv.bias, conv.factor, conv.shape
        self.centred = True  # a BatchNorm takes the mean away again, so that the bias has no gradient
        self.moments: Moments | None = None
        self.z = self.tape.new(self.shape)
        self._forward(self.z, with_moments)

    def _forward(self, z: Value, with_moments: bool) -> None:
        self.x.readers += 1
        order = self._order("output")
        bias = self.tape.numbers(NOTHING if self.bias is None else self.bias)
        self._hold(z, order, bias)
        means = np.tile(z.constant.astype(np.float64), z.shape.blocks) if with_moments else np.empty(0)
        squares = np.zeros_like(means)
        x = self.x.read(self._order("input").channels)
        weights = order.first, self._offsets("output"), self._values()[order.entries]
        with timed("forward convolution"):
            if self.filter.by_rows(self.x.shape):
                sizes, pad = self._rows_sizes(self.x.shape, z.shape), self.filter.pad[0]
                conv_kernels.rows(x, z.buffer.array, sizes, order.channels, pad, *weights, bias, False, means, squares)
            else:
                sizes, *geometry = self._taps_geometry()
                taps = (*geometry, *self._taps(order))
                conv_kernels.taps(x, z.buffer.array, sizes, order.channels, *taps, weights[2], bias, means, squares)
        if with_moments:
            self.moments = _merged(means, squares, z.shape)

    def _hold(self, z: Value, order: Order, bias: NDArray) -> None:
        """A channel without a live weight is its bias everywhere."""
        varying = np.zeros(z.shape.channels, np.bool_)
        varying[order.channels] = True
        z.hold(varying, bias if bias.size else np.zeros(z.shape.channels, self.tape.dtype))

    def backward(self) -> tuple[Tensor | None, ...]:
        g = self.z.parted(self.tape)
        g.spread(self.z.varying | self.tape.wants_dense)
        weight = self.live.weight
        factor = self._weight_gradient(g) if weight.requires_grad or self.factor is not None else None
        dense = self._dense_gradient(g) if self.tape.wants_dense and weight.requires_grad else None
        bias = None if self.bias is None else gradient_of(self.bias, self._bias_gradient(g))
        if self.x.needs_gradient:
            self._input_gradient(g)
        return DONE, dense, bias, factor

    def _weight_gradient(self, g: Gradient) -> Tensor | None:
        """Leaves that of the live weights with them; returns that of the factor."""
        order = self._order("output")
        channels = order.channels[g.written[order.channels]]
        partial = np.zeros((self.shape.blocks, len(order.entries)))
        x = self.x.buffer.array
        with timed("weight gradient"):
            if self.filter.by_rows(self.x.shape):
                sizes, pad = self._rows_sizes(self.x.shape, self.shape), self.filter.pad[0]
                conv_kernels.rows_weight(
                    x, g.array, sizes, channels, pad, order.first, self._offsets("output"), partial
                )
            else:
                sizes, *geometry = self._taps_geometry()
                conv_kernels.taps_weight(x, g.array, sizes, channels, *geometry, *self._taps(order), partial)
        gradient = np.empty(len(order.entries))
        gradient[order.entries] = partial.sum(0)
        factor = None
        if self.factor is not None:
            product = np.asarray(np.dot(gradient, self.live.values.astype(np.float64)))
            factor = gradient_of(self.factor, product)
            gradient *= self.factor.item()
        if self.live.weight.requires_grad:
            self.live.add(gradient.astype(self.tape.dtype))
        return factor

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
            return np.zeros(self.shape.channels)
        return sums(g) if g.totals is None else sums(g) + g.totals.sum((0, 2))

    def _input_gradient(self, g: Gradient) -> None:
        order = self._order("input")
        g.write(self._order("output").channels)
        y, adds = self.x.receiving(self.tape, order.channels)
        weights = order.first, self._offsets("input"), self._values()[order.entries]
        with timed("input gradient"):
            if self.filter.by_rows(self.x.shape):
                sizes, pad = self._rows_sizes(self.shape, self.x.shape), self.filter.shape[2] - 1 - self.filter.pad[0]
                none, nothing = self.tape.numbers(NOTHING), NOTHING
                conv_kernels.rows(g.array, y, sizes, order.channels, pad, *weights, none, adds, nothing, nothing)
            else:
                sizes, *geometry = self._taps_geometry()
                taps = (*geometry, *self._taps(order))
                conv_kernels.taps_input(g.array, y, sizes, order.channels, *taps, weights[2], adds)

    def _order(self, side: str) -> Order:
        return self.live.order(side, self.filter.shape, self.filter.groups)

    def _values(self) -> NDArray:
        values = self.live.values
        return values if self.factor is None else values * values.dtype.type(self.factor.item())

    def _offsets(self, side: str) -> NDArray[np.int64]:
        shape, pad = self.x.shape, self.filter.pad
        return self.live.offsets(
            side, self.filter.shape, self.filter.groups, shape.height, shape.pitch, shape.block, pad
        )

    def _rows_sizes(self, source: Shape, target: Shape) -> tuple[int, ...]:
        sizes = (source.guard, target.guard, source.blocks, source.channels, target.channels)
        return (*sizes, source.height, source.width, source.block, self.filter.shape[2])

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
    return _merged(means, squares, shape)


def _merged(means: NDArray[np.float64], squares: NDArray[np.float64], shape: Shape) -> Moments:
    """Moments of the batch from those of equally large planes."""
    means, squares = means.reshape(shape.blocks, -1), squares.reshape(shape.blocks, -1)
    numbers = shape.height * shape.width * shape.block
    mean = means.mean(0)
    total = squares.sum(0) + numbers * np.square(means - mean).sum(0)
    return Moments(mean, total / (numbers * shape.blocks))
