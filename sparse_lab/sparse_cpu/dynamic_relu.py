"""Dynamic ReLU as one step of a forward pass, over what its input is made of."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparse_lab.sparse_cpu import dyrelu_kernels
from sparse_lab.sparse_cpu.affine_sum import AffineSum, identity
from sparse_lab.sparse_cpu.autograd import DONE, Gradient, Tape, Value, gradient_of
from sparse_lab.sparse_cpu.timers import timed


class DynamicReLU:
    """max_k (a_k x + b_k) with coefficients (N, 4, C) that torch computes and differentiates.

    Of normalisation and residual, x is not written. A channel that does not vary is one number an image afterwards.
    """

    def __init__(self, tape: Tape, x: Value, coefficients: Tensor) -> None:
        self.tape = tape
        self.x = x
        self.coefficients = coefficients
        self.shape = x.shape
        self.sum = self._made_of(x)
        self._numbers = self._blocked(coefficients)
        self.out = tape.new(x.shape)
        self._forward()

    def _made_of(self, x: Value) -> AffineSum:
        if x.sum is not None and not self.tape.wants_dense:
            return x.sum
        x.readers += 1
        if self.tape.wants_dense:  # of a pruned weight too the gradient is asked, at every position
            x.widen()
        return AffineSum(self.tape, x, identity(x.shape.channels, self.tape.dtype))

    def _blocked(self, coefficients: Tensor) -> NDArray:
        """(N, 4, C) -> [blocks, C, 4, block]"""
        shape = self.shape
        blocked = coefficients.detach().view(shape.blocks, shape.block, 4, shape.channels).permute(0, 3, 2, 1)
        return blocked.contiguous().numpy().astype(self.tape.dtype, copy=False)

    def _forward(self) -> None:
        made, numbers = self.sum, self._numbers
        varying = made.varying
        a1, a2, b1, b2 = numbers.transpose(2, 0, 1, 3)
        images = None
        if not varying.all():
            first, second = a1 * made.base + b1, a2 * made.base + b2
            images = np.where(first <= second, second, first)
        self.out.hold(varying, np.zeros(varying.size, self.tape.dtype), ~varying, images)
        room = self.shape.blocks, self.shape.channels, self.shape.block
        means = np.zeros(room) if images is None else images.astype(np.float64)
        z, residual = made.maps()
        with timed("normalisation, activation, pooling"):
            dyrelu_kernels.dynamic_relu(z, residual, self.out.buffer.array, *self._work(), numbers, means)
        self.out.means = means

    def _work(self) -> tuple[object, ...]:
        made = self.sum
        channels, affine = np.flatnonzero(made.varying), made.affine
        return made.shape.map_sizes, channels, made.kinds, affine.mean, affine.scale, made.base

    def value(self) -> Value:
        return self.tape.made(self, self.out, self.x.edge, self.coefficients)

    def backward(self) -> tuple[Tensor, Tensor | None]:
        made, g, shape = self.sum, self.out.parted(self.tape), self.shape
        with timed("gradient of normalisation"):
            g.collect(~made.varying)
            sums = self._through(g)
            a1, a2 = self._numbers[:, :, 0], self._numbers[:, :, 1]
            total = a1 * sums[:, :, 0] + a2 * sums[:, :, 1]
            product = a1 * sums[:, :, 2] + a2 * sums[:, :, 3]
            known = (total, product) if self.sum is self.x.sum else None
            self.x.give(g.buffer, made.varying, known)
            self.x.give_totals(self.tape, ~made.varying, total)
            scale = made.affine.scale[:, None, None]
            by_slope = scale * sums[:, :, 2:4] + made.base[:, :, None] * sums[:, :, :2] + sums[:, :, 4:]
            gradient = torch.from_numpy(np.concatenate([by_slope, sums[:, :, :2]], 2).astype(self.tape.dtype))
        return DONE, gradient_of(self.coefficients, gradient.permute(0, 3, 2, 1).reshape(shape.images, 4, -1).numpy())

    def _through(self, g: Gradient) -> NDArray[np.float64]:
        """Make g that of x, where x varies; return the sums of `dynamic_relu_input` of every channel."""
        made, shape = self.sum, self.shape
        sums = np.zeros((shape.blocks, shape.channels, 6, shape.block))
        room = shape.blocks, shape.channels, shape.block
        totals = np.zeros(room) if g.totals is None else g.totals
        even = (totals / (shape.height * shape.width)).astype(self.tape.dtype)
        g.write(np.flatnonzero(made.varying))
        dyrelu_kernels.dynamic_relu_input(g.array, *made.maps(), *self._work(), self._numbers, even, sums)
        rest = np.flatnonzero(~made.varying)
        if rest.size:
            a1, a2, b1, b2 = self._numbers[:, rest].transpose(2, 0, 1, 3)
            x = made.base[:, rest]
            on = a1 * x + b1 > a2 * x + b2
            sums[:, rest, 0] = np.where(on, totals[:, rest], 0.0)
            sums[:, rest, 1] = np.where(on, 0.0, totals[:, rest])
        return sums
