"""Dynamic ReLU as one step of a forward pass, over what its input is made of."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparse_lab.sparse_cpu import dyrelu_kernels
from sparse_lab.sparse_cpu.affine_sum import AffineSum, identity
from sparse_lab.sparse_cpu.autograd import DONE, Tape, Value
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
        made, shape = self.sum, self.shape
        room = shape.blocks, shape.channels, shape.block
        images, means = np.empty(room, self.tape.dtype), np.empty(room)
        z, residual = made.maps()
        with timed("normalisation, activation, pooling"):
            out = self.out.buffer.array
            dyrelu_kernels.dynamic_relu(z, residual, out, *self._work(), images, means)
        self.out.hold(made.varying, np.zeros(shape.channels, self.tape.dtype), ~made.varying, images)
        self.out.means = means

    def _work(self) -> tuple[object, ...]:
        made, affine = self.sum, self.sum.affine
        return self.shape.map_sizes, made.kinds, affine.mean, affine.scale, made.base, self._numbers

    def value(self) -> Value:
        return self.tape.made(self, self.out, self.x.edge, self.coefficients)

    def backward(self) -> tuple[Tensor, Tensor | None]:
        made, g, shape = self.sum, self.out.parted(self.tape), self.shape
        room = shape.blocks, shape.channels, shape.block
        with timed("gradient of normalisation"):
            g.collect(~made.varying)
            g.write(np.flatnonzero(made.varying))
            totals = np.zeros(room) if g.totals is None else g.totals
            total, product = np.empty(room), np.empty(room)
            slopes = np.empty_like(self._numbers)
            dyrelu_kernels.dynamic_relu_input(g.array, *made.maps(), *self._work(), totals, total, product, slopes)
        self.x.give_totals(self.tape, ~made.varying, total)
        total[:, ~made.varying] = 0.0  # the rest is of the maps
        self.x.give(g.buffer, made.varying, (total, product) if made is self.x.sum else None)
        return DONE, self._gradient(slopes)

    def _gradient(self, slopes: NDArray) -> Tensor | None:
        """Of the coefficients, as torch has them."""
        if not self.coefficients.requires_grad:
            return None
        found = torch.from_numpy(slopes).permute(0, 3, 2, 1).reshape(self.coefficients.shape)
        return found.to(self.coefficients.dtype)
