"""The other steps of a forward pass: normalisation with activation and pooling, means, max pooling, dynamic ReLU,
gates, LayerNorm, and what torch computes where the map lies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparse_lab.sparse_cpu import norm_kernels, op_kernels, statistics_kernels
from sparse_lab.sparse_cpu.affine_sum import Affine, AffineStep, AffineSum, Learned, identity, means_of
from sparse_lab.sparse_cpu.autograd import DONE, Gradient, Tape, Value, gradient_of
from sparse_lab.sparse_cpu.layout import Buffer, Shape, pixels
from sparse_lab.sparse_cpu.timers import timed

Constant = NDArray[np.float64] | None


@dataclass(frozen=True)
class Norm:
    """pool(clamp(affine(z) + residual)), computed when it is asked for: what follows can still join in."""

    tape: Tape
    z: Value
    affine: Affine
    residual: Value | None = None
    ends: tuple[float, float] | None = None  # of the activation
    pools: bool = False  # 2x2, stride 2

    @property
    def shape(self) -> Shape:
        shape = self.z.shape
        return shape.like(shape.channels, shape.height // 2, shape.width // 2) if self.pools else shape

    @property
    def open(self) -> bool:
        """Nothing has joined in yet."""
        return self.residual is None and self.ends is None and not self.pools

    def value(self) -> Value:
        if self.ends is None and not self.pools and not self.tape.wants_dense:
            return AffineStep(AffineSum(self.tape, self.z, self.affine, self.residual)).value()
        step = _NormStep(self, self.tape.new(self.shape))
        step.hold()
        step.forward()
        self.z.readers += 1
        step.out.readers += self.residual is not None  # where the activation let the gradient pass is read off there
        residual = None if self.residual is None else self.residual.edge
        edges = (self.z.edge, residual, self.affine.weight, self.affine.bias)
        return self.tape.made(step, step.out, *edges)


class _NormStep:
    def __init__(self, norm: Norm, out: Value) -> None:
        self.norm = norm
        self.out = out
        low, high = (-np.inf, np.inf) if norm.ends is None else norm.ends
        kind = norm.tape.dtype.type
        affine = norm.affine
        self._affine = (affine.mean, affine.scale, affine.shift, kind(low), kind(high))
        z = norm.z.shape
        self._sizes = (z.guard, z.blocks, z.channels, z.height, z.width, z.block)

    def hold(self) -> None:
        """What is constant in everything that is added up is constant afterwards."""
        norm, (mean, scale, shift, low, high) = self.norm, self._affine
        varying = norm.z.varying | norm.z.per_image
        if norm.residual is not None:
            varying |= norm.residual.varying | norm.residual.per_image
            shift = shift + norm.residual.constant.astype(norm.tape.dtype)
        constant = norm.z.constant.astype(norm.tape.dtype, copy=False)
        made = np.empty_like(mean)
        statistics_kernels.constants(constant, mean, scale, shift, low, high, made)
        self.out.hold(varying, made)
        if norm.ends is not None and 0.0 in (low, high):
            self.out.silent = ~varying & (made == 0.0)

    def forward(self) -> None:
        norm, out = self.norm, self.out
        channels = np.flatnonzero(out.varying)
        z = norm.z.read(channels)
        with timed("normalisation, activation, pooling"):
            if norm.pools:
                norm_kernels.norm_pool(z, out.buffer.array, out.shape.guard, self._sizes, channels, self._affine)
            else:
                residual = z[:0] if norm.residual is None else norm.residual.read(channels)
                norm_kernels.norm(z, residual, out.buffer.array, self._sizes, channels, self._affine)

    def backward(self) -> tuple[Tensor | None, ...]:
        norm, g = self.norm, self.out.parted(self.norm.tape)
        if norm.tape.wants_dense:  # pruned weights would feed channels that do not vary: they ask where its gradient is
            g.spread(g.even)
        else:
            g.part(self.out.varying)
        even, constant = self._of_numbers(g)
        with timed("gradient of normalisation"):
            channels = g.channels
            dz, learned = (
                self._through_pool(g, channels, constant) if norm.pools else self._through(g, channels, constant)
            )
        norm.z.give(dz, g.written)
        if norm.residual is not None:
            norm.residual.give(g.buffer, g.written)
        if even is not None:
            self._give_numbers(g, even)
        return DONE, DONE, *learned

    def _of_numbers(self, g: Gradient) -> tuple[NDArray[np.bool_] | None, NDArray[np.float64] | None]:
        """Which channels have an even gradient that the activation lets pass, and [C] its sum. None: no such."""
        if g.totals is None:
            return None, None
        low, high = self._affine[3:]
        even = g.even
        if self.norm.ends:
            even = even & (low < self.out.constant) & (self.out.constant < high)
        total, channels = np.zeros(even.size), np.flatnonzero(even)
        total[channels] = g.totals[:, channels].sum((0, 2))
        return even, total

    def _give_numbers(self, g: Gradient, even: NDArray[np.bool_]) -> None:
        """Of channels that do not vary: through the statistics of a batch it adds up to nothing."""
        norm = self.norm
        if g.totals is None:
            return
        if not norm.affine.of_batch:
            norm.z.give_totals(norm.tape, even, norm.affine.scale[:, None] * g.totals)
        if norm.residual is not None:
            norm.residual.give_totals(norm.tape, even, g.totals)

    def _through(self, g: Gradient, channels: NDArray[np.int64], constant: Constant) -> tuple[Buffer, Learned]:
        norm, partial = self.norm, np.zeros((self._sizes[1] * self._sizes[2], 2))
        z, out = norm.z.read(channels), self.out.buffer.array
        gate = norm_kernels.OPEN if norm.ends is None else norm_kernels.GATED
        if gate and norm.residual is not None:
            gate, out = norm_kernels.GATED_BY_OUTPUT, self.out.read(channels)
        norm_kernels.norm_sums(g.array, z, out, self._sizes, channels, self._affine, gate, partial)
        through, learned = self._statistics(partial, constant)
        if norm.residual is None:
            gated = gate == norm_kernels.GATED
            norm_kernels.norm_input(g.array, z, self._sizes, channels, self._affine, gated, *through)
            return g.buffer, learned
        dz = self._over_z()
        norm_kernels.norm_input_over(g.array, dz.array, self._sizes, channels, self._affine, *through)
        return dz, learned

    def _through_pool(self, g: Gradient, channels: NDArray[np.int64], constant: Constant) -> tuple[Buffer, Learned]:
        norm, partial = self.norm, np.zeros((self._sizes[1] * self._sizes[2], 2))
        z, guard = norm.z.read(channels), self.out.shape.guard
        norm_kernels.norm_pool_sums(g.array, z, guard, self._sizes, channels, self._affine, partial)
        (through, learned), dz = self._statistics(partial, constant), self._over_z()
        norm_kernels.norm_pool_input(g.array, dz.array, guard, self._sizes, channels, self._affine, *through)
        return dz, learned

    def _over_z(self) -> Buffer:
        """Where the gradient of z is written over z: into z itself, unless somebody else reads it still."""
        z = self.norm.z
        if z.readers == 1:
            return z.buffer
        copy = self.norm.tape.take(z.shape)
        copy.array[:] = z.buffer.array
        return copy

    def _statistics(self, partial: NDArray[np.float64], constant: Constant) -> tuple[tuple[NDArray, NDArray], Learned]:
        """What goes back through the statistics of the batch; gradients of BatchNorm's parameters.

        constant: [C] the summed gradient of channels that do not vary, or None.
        """
        shape, affine = self.norm.z.shape, self.norm.affine
        total, product = both = np.zeros((2, shape.channels))
        statistics_kernels.planes(partial, both)
        if constant is not None:
            total += constant
            product += constant * (self.norm.z.constant - affine.mean)
        return affine.through(total, product, shape.images * shape.height * shape.width)


def plain(tape: Tape, z: Value) -> Norm:
    """No normalisation: a place where an activation or a residual can join in."""
    return Norm(tape, z, identity(z.shape.channels, tape.dtype))


def joined(norm: Norm, **changes: object) -> Norm:
    """`norm` with a residual, an activation or a pool behind it."""
    return replace(norm, **changes)  # type: ignore[arg-type]


class Mean:
    """The mean over positions: (N, C, H, W) -> (N, C, 1, 1)."""

    def __init__(self, tape: Tape, x: Value) -> None:
        self.tape = tape
        self.x = x
        self.out = tape.new(x.shape.like(x.shape.channels, 1, 1))
        self._pixel(self.out.buffer.array).copy_(torch.from_numpy(means_of(x)))

    def value(self) -> Value:
        return self.tape.made(self, self.out, self.x.edge)

    def backward(self) -> tuple[Tensor]:
        g = self.out.taken(self.tape)
        self.x.give_totals(self.tape, g.written, self._pixel(g.array).double().numpy())
        return (DONE,)

    def _pixel(self, array: NDArray) -> Tensor:
        """[blocks, C, block] of a map of one pixel, where it lies."""
        return pixels(array, self.out.shape)[:, :, 0, 0]


class MaxPool:
    """The largest of every window, of any size."""

    def __init__(
        self, tape: Tape, x: Value, kernel: tuple[int, int], stride: tuple[int, int], pad: tuple[int, int]
    ) -> None:
        self.tape = tape
        self.x = x
        size = [
            (inside + 2 * p - k) // s + 1
            for inside, p, k, s in zip((x.shape.height, x.shape.width), pad, kernel, stride, strict=True)
        ]
        self.out = tape.new(x.shape.like(x.shape.channels, *size))
        self._winners = np.empty(self.out.shape.numbers, np.uint8)
        self.out.hold(x.varying, x.constant, x.per_image, x.images)
        self.out.silent = x.silent
        inputs = (x.shape.blocks, x.shape.channels, x.shape.block, x.shape.height, x.shape.width, x.shape.guard)
        sizes = (*inputs, self.out.shape.height, self.out.shape.width, self.out.shape.guard)
        self._windows = (sizes, kernel, stride, pad)
        with timed("normalisation, activation, pooling"):
            op_kernels.max_pool(
                x.maps(), self.out.buffer.array, self._winners, *self._windows, np.flatnonzero(x.varying)
            )

    def value(self) -> Value:
        return self.tape.made(self, self.out, self.x.edge)

    def backward(self) -> tuple[Tensor]:
        g = self.out.parted(self.tape)  # held to the end, or its memory would be y's
        varying = self.x.varying
        g.spread(varying)
        g.collect(~varying)
        if g.totals is not None:
            self.x.give_totals(self.tape, g.even, g.totals)
        channels = np.flatnonzero(g.written)
        y, adds = self.x.receiving(self.tape, channels)
        with timed("gradient of normalisation"):
            op_kernels.max_pool_input(g.array, y, self._winners, *self._windows, channels, adds)
        return (DONE,)


class Gate:
    """x times one factor for each channel of each image: (N, C, H, W) * (N, C, 1, 1)."""

    def __init__(self, tape: Tape, x: Value, factors: Value) -> None:
        self.tape = tape
        self.x = x
        self.factors = factors
        x.readers += 1
        factors.readers += 1
        shape = x.shape
        self.out = tape.new(shape)
        planes = (shape.blocks * shape.channels, shape.height, shape.width, shape.block)
        self._sizes = (shape.guard, factors.shape.guard, factors.shape.pitch, *planes)
        with timed("normalisation, activation, pooling"):
            op_kernels.gate(x.whole(), factors.whole(), self.out.buffer.array, *self._sizes)

    def value(self) -> Value:
        return self.tape.made(self, self.out, self.x.edge, self.factors.edge)

    def backward(self) -> tuple[Tensor, Tensor]:
        g, slopes = self.out.taken(self.tape), self.tape.take(self.factors.shape)
        with timed("gradient of normalisation"):
            op_kernels.gate_input(g.whole(), self.x.buffer.array, self.factors.buffer.array, slopes.array, *self._sizes)
        self.x.give(g.buffer)
        self.factors.give(slopes)
        return DONE, DONE


class LayerNorm:
    """Each position of each image over its channels."""

    def __init__(self, tape: Tape, x: Value, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> None:
        self.tape = tape
        self.x = x
        x.readers += 1
        self._learned = weight, bias
        shape = x.shape
        self.out = tape.new(shape)
        self._sizes = (shape.guard, shape.blocks, shape.channels, shape.height, shape.width, shape.block)
        self._shares = shape.blocks * shape.height * -(-shape.width * shape.block // norm_kernels.TOGETHER)
        self._weight = np.ones(shape.channels, tape.dtype) if weight is None else tape.numbers(weight)
        shift = np.zeros(shape.channels, tape.dtype) if bias is None else tape.numbers(bias)
        self._means, self._deviations = self._room(), self._room()
        statistics = tape.dtype.type(epsilon), self._means, self._deviations
        with timed("normalisation, activation, pooling"):
            norm_kernels.layer_norm(x.whole(), self.out.buffer.array, self._sizes, self._weight, shift, *statistics)

    def value(self) -> Value:
        return self.tape.made(self, self.out, self.x.edge, *self._learned)

    def _room(self) -> NDArray:
        return np.empty(self._shares * norm_kernels.TOGETHER, self.tape.dtype)

    def backward(self) -> tuple[Tensor | None, ...]:
        g = self.out.taken(self.tape)
        partial = np.empty((self._shares, self.x.shape.channels, 2))
        sums = np.empty(2 * self._means.size, self.tape.dtype)
        statistics = self._means, self._deviations, sums, partial
        with timed("gradient of normalisation"):
            norm_kernels.layer_norm_input(g.whole(), self.x.buffer.array, self._sizes, self._weight, *statistics)
        self.x.give(g.buffer)
        by_weight, by_bias = partial.sum(0).T
        weight, bias = self._learned
        return DONE, gradient_of(weight, by_weight), gradient_of(bias, by_bias)


@dataclass(frozen=True)
class Pointwise:
    """A function of each number by itself, as torch's own kernels compute it where the map lies.

    forward(x, out): writes out. backward(gradient, read, out): writes the gradient, from x or from what came out.
    """

    forward: Callable[[Tensor, Tensor], Any]
    backward: Callable[[Tensor, Tensor, Tensor], Any]
    reads_output: bool = False


class PointwiseStep:
    def __init__(self, tape: Tape, x: Value, function: Pointwise) -> None:
        self.tape = tape
        self.x = x
        self.function = function
        self.out = tape.new(x.shape)
        constant = torch.from_numpy(x.constant.astype(tape.dtype))
        function.forward(constant, constant)
        images = x.images
        if images is not None:
            images = np.empty_like(images)
            function.forward(torch.from_numpy(x.images), torch.from_numpy(images))
        self.out.hold(x.varying, constant.numpy(), x.per_image, images)
        self._read = self.out if function.reads_output else x
        self._read.readers += 1
        with timed("normalisation, activation, pooling"), torch.no_grad():
            function.forward(pixels(x.maps(), x.shape), pixels(self.out.buffer.array, x.shape))

    def value(self) -> Value:
        return self.tape.made(self, self.out, self.x.edge)

    def backward(self) -> tuple[Tensor]:
        g = self.out.taken(self.tape)
        read = pixels(self._read.read(g.channels), self.x.shape)
        with timed("gradient of normalisation"):
            gradient = pixels(g.array, self.x.shape)
            self.function.backward(gradient, read, gradient)
        self.x.give(g.buffer, g.written)
        return (DONE,)


class Concatenation:
    """Maps of one size, one behind the other: (N, C1, H, W), (N, C2, H, W) -> (N, C1 + C2, H, W)."""

    def __init__(self, tape: Tape, maps: list[Value]) -> None:
        self.tape = tape
        self.maps = maps
        shape = maps[0].shape
        self.out = tape.new(shape.like(sum(one.shape.channels for one in maps), shape.height, shape.width))
        varying = [one.varying | one.per_image for one in maps]
        self.out.hold(np.concatenate(varying), np.concatenate([one.constant for one in maps]))
        with timed("other"):
            for (target, one), found in zip(self._places(self.out.buffer.array), varying, strict=True):
                target.copy_(pixels(one.read(np.flatnonzero(found)), one.shape))

    def value(self) -> Value:
        return self.tape.made(self, self.out, *(one.edge for one in self.maps))

    def _places(self, array: NDArray) -> list[tuple[Tensor, Value]]:
        sizes = [one.shape.channels for one in self.maps]
        return list(zip(pixels(array, self.out.shape).split(sizes, 1), self.maps, strict=True))

    def backward(self) -> tuple[Tensor, ...]:
        g = self.out.taken(self.tape)
        with timed("other"):
            for part, one in self._places(g.whole()):
                buffer = self.tape.take(one.shape)
                pixels(buffer.array, one.shape).copy_(part)
                one.give(buffer)
        return (DONE,) * len(self.maps)


class Slice:
    """Some of the channels."""

    def __init__(self, tape: Tape, x: Value, kept: slice) -> None:
        self.tape = tape
        self.x = x
        self.kept = kept
        self.out = tape.new(x.shape.like(kept.stop - kept.start, x.shape.height, x.shape.width))
        images = None if x.images is None else x.images[:, self.kept]
        self.out.hold(x.varying[self.kept], x.constant[self.kept], x.per_image[self.kept], images)
        with timed("other"):
            pixels(self.out.buffer.array, self.out.shape).copy_(pixels(x.maps(), x.shape)[:, self.kept])

    def value(self) -> Value:
        return self.tape.made(self, self.out, self.x.edge)

    def backward(self) -> tuple[Tensor]:
        g = self.out.taken(self.tape)
        buffer = self.tape.take(self.x.shape)
        written = np.zeros(self.x.shape.channels, np.bool_)
        written[self.kept] = g.written
        with timed("other"):
            pixels(buffer.array, self.x.shape)[:, self.kept].copy_(pixels(g.array, self.out.shape))
        self.x.give(buffer, written)
        return (DONE,)
