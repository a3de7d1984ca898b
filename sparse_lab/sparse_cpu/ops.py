"""The other steps of a forward pass: normalisation with activation and pooling, means, max pooling, dynamic ReLU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from sparse_lab.sparse_cpu import norm_kernels, op_kernels
from sparse_lab.sparse_cpu.autograd import Gradient, Tape, Value, accumulate
from sparse_lab.sparse_cpu.conv import sums
from sparse_lab.sparse_cpu.layout import Buffer, Shape
from sparse_lab.sparse_cpu.timers import timed


@dataclass(frozen=True)
class Affine:
    """(z - mean) * scale + shift, one number a channel in the maps' dtype.

    deviation: 1 / sqrt(variance + eps) in float64, or None where there is no BatchNorm. of_batch: the statistics are
    those of the batch itself, so that gradients go through them.
    """

    mean: NDArray
    scale: NDArray
    shift: NDArray
    deviation: NDArray[np.float64] | None = None
    of_batch: bool = False
    weight: torch.nn.Parameter | None = None
    bias: torch.nn.Parameter | None = None


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
        step = _NormStep(self, self.tape.new(self.shape))
        step.hold()
        step.forward()
        self.z.readers += 1
        step.out.readers += self.residual is not None  # where the activation let the gradient pass is read off there
        self.tape.record(step)
        return step.out


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
        varying, constant = norm.z.varying.copy(), (norm.z.constant.astype(norm.tape.dtype) - mean) * scale + shift
        if norm.residual is not None:
            varying |= norm.residual.varying
            constant = constant + norm.residual.constant.astype(norm.tape.dtype)
        self.out.hold(varying, np.clip(constant, low, high))

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

    def backward(self) -> None:
        norm, g = self.norm, self.out.taken(self.norm.tape)
        # a constant channel's gradient of z adds up to nothing; only pruned weights that would feed it can tell
        skips = norm.affine.of_batch and not norm.tape.wants_dense
        live = g.written & self.out.varying if skips else g.written.copy()
        low, high = self._affine[3:]
        passes = (low < self.out.constant) & (self.out.constant < high) if norm.ends else np.ones_like(live)
        constant = g.written & ~live & passes
        total = np.where(constant, sums(g), 0.0) if constant.any() else np.zeros(live.size)
        with timed("gradient of normalisation"):
            channels = np.flatnonzero(live)
            dz = self._through_pool(g, channels, total) if norm.pools else self._through(g, channels, total)
        norm.z.give(dz, live)
        if norm.residual is not None:
            norm.residual.give(g.buffer, live | constant)

    def _through(self, g: Gradient, channels: NDArray[np.int64], total: NDArray) -> Buffer:
        norm, partial = self.norm, np.zeros((self._sizes[1] * self._sizes[2], 2))
        z, out = norm.z.read(channels), self.out.buffer.array
        gate = norm_kernels.OPEN if norm.ends is None else norm_kernels.GATED
        if gate and norm.residual is not None:
            gate, out = norm_kernels.GATED_BY_OUTPUT, self.out.read(channels)
        norm_kernels.norm_sums(g.array, z, out, self._sizes, channels, self._affine, gate, partial)
        through = self._statistics(partial, total)
        if norm.residual is None:
            gated = gate == norm_kernels.GATED
            norm_kernels.norm_input(g.array, z, self._sizes, channels, self._affine, gated, *through)
            return g.buffer
        dz = self._over_z()
        norm_kernels.norm_input_over(g.array, dz.array, self._sizes, channels, self._affine, *through)
        return dz

    def _through_pool(self, g: Gradient, channels: NDArray[np.int64], total: NDArray) -> Buffer:
        norm, partial = self.norm, np.zeros((self._sizes[1] * self._sizes[2], 2))
        z, guard = norm.z.read(channels), self.out.shape.guard
        norm_kernels.norm_pool_sums(g.array, z, guard, self._sizes, channels, self._affine, partial)
        through, dz = self._statistics(partial, total), self._over_z()
        norm_kernels.norm_pool_input(g.array, dz.array, guard, self._sizes, channels, self._affine, *through)
        return dz

    def _over_z(self) -> Buffer:
        """Where the gradient of z is written over z: into z itself, unless somebody else reads it still."""
        z = self.norm.z
        if z.readers == 1:
            return z.buffer
        copy = self.norm.tape.take(z.shape)
        copy.array[:] = z.buffer.array
        return copy

    def _statistics(self, partial: NDArray[np.float64], constant: NDArray) -> tuple[NDArray, NDArray]:
        """Gradients of BatchNorm's parameters; what goes back through the statistics of the batch.

        constant: [C] the summed gradient of channels that do not vary, which reaches the shift alone.
        """
        norm, affine = self.norm, self.norm.affine
        total, product = partial.reshape(norm.z.shape.blocks, -1, 2).sum(0).T
        total = total + constant
        if affine.deviation is None:
            nothing = np.zeros_like(affine.scale)
            return nothing, nothing
        accumulate(affine.bias, total)
        accumulate(affine.weight, product * affine.deviation)
        shape = norm.z.shape
        share = affine.of_batch * affine.scale / (shape.images * shape.height * shape.width)
        numbers = norm.tape.numbers
        return numbers(share * total), numbers(share * np.square(affine.deviation) * product)


def plain(tape: Tape, z: Value) -> Norm:
    """No normalisation: a place where an activation or a residual can join in."""
    ones = np.ones(z.shape.channels, tape.dtype)
    zeros = np.zeros_like(ones)
    return Norm(tape, z, Affine(zeros, ones, zeros))


def joined(norm: Norm, **changes: object) -> Norm:
    """`norm` with a residual, an activation or a pool behind it."""
    return replace(norm, **changes)  # type: ignore[arg-type]


class Mean:
    """The mean over positions: (N, C, H, W) -> (N, C, 1, 1)."""

    def __init__(self, tape: Tape, x: Value) -> None:
        self.tape = tape
        self.x = x
        self.out = tape.new(x.shape.like(x.shape.channels, 1, 1))
        with timed("normalisation, activation, pooling"):
            op_kernels.mean(x.whole(), self.out.buffer.array, x.shape.guard, *self._sizes(False))
        tape.record(self)

    def backward(self) -> None:
        g = self.out.taken(self.tape)
        y, adds = self.x.receiving(self.tape, g.channels)
        with timed("gradient of normalisation"):
            op_kernels.mean_input(g.array, y, self.x.shape.guard, *self._sizes(True), g.channels, adds)

    def _sizes(self, apart: bool) -> tuple[int, ...]:
        x, out = self.x.shape, self.out.shape
        planes = (x.blocks, x.channels) if apart else (x.blocks * x.channels,)
        return out.guard, out.pitch, *planes, x.height, x.width, x.block


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
        planes = x.shape.blocks * x.shape.channels
        inputs = (planes, x.shape.block, x.shape.height, x.shape.width, x.shape.guard)
        sizes = (*inputs, self.out.shape.height, self.out.shape.width, self.out.shape.guard)
        self._windows = (sizes, kernel, stride, pad)
        with timed("normalisation, activation, pooling"):
            op_kernels.max_pool(x.whole(), self.out.buffer.array, self._winners, *self._windows)
        tape.record(self)

    def backward(self) -> None:
        g = self.out.taken(self.tape)  # held to the end, or its memory would be y's
        y, adds = self.x.receiving(self.tape, np.arange(self.x.shape.channels))
        with timed("gradient of normalisation"):
            op_kernels.max_pool_input(g.whole(), y, self._winners, *self._windows, adds)


class DynamicReLU:
    """max_k (a_k x + b_k) with coefficients (N, 4, C) that torch computes and differentiates."""

    def __init__(self, tape: Tape, x: Value, coefficients: torch.Tensor) -> None:
        self.tape = tape
        self.x = x
        x.readers += 1
        self.coefficients = coefficients
        shape = x.shape
        # (N, 4, C) -> [blocks * C, 4, block]
        blocked = coefficients.detach().view(shape.blocks, shape.block, 4, shape.channels).permute(0, 3, 2, 1)
        self._blocked = np.ascontiguousarray(blocked.numpy(), tape.dtype).reshape(-1, 4, shape.block)
        self.out = tape.new(shape)
        self._sizes = (shape.guard, shape.blocks * shape.channels, shape.height, shape.width, shape.block)
        with timed("normalisation, activation, pooling"):
            op_kernels.dynamic_relu(x.whole(), self.out.buffer.array, *self._sizes, self._blocked)
        tape.record(self)

    def backward(self) -> None:
        g = self.out.taken(self.tape)
        slopes = np.empty_like(self._blocked)
        with timed("gradient of normalisation"):
            op_kernels.dynamic_relu_input(g.whole(), self.x.buffer.array, *self._sizes, self._blocked, slopes)
        self.x.give(g.buffer)
        shape = self.x.shape
        gradient = torch.from_numpy(slopes).view(shape.blocks, shape.channels, 4, shape.block)
        gradient = gradient.permute(0, 3, 2, 1).reshape(self.coefficients.shape)
        if self.coefficients.requires_grad:
            self.coefficients.backward(gradient.to(self.coefficients.dtype))
