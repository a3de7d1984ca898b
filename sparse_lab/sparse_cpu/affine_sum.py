"""Normalisation and residual before an activation: a map that is not written unless somebody reads it.

Dynamic ReLU and means over positions read what it is made of instead. Of channels that are one number an image, all is
done on numbers, forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sparse_lab.sparse_cpu import image_kernels, norm_kernels, statistics_kernels
from sparse_lab.sparse_cpu.autograd import DONE, Gradient, Tape, Value, gradient_of
from sparse_lab.sparse_cpu.layout import Buffer, number_dtype
from sparse_lab.sparse_cpu.timers import timed

Learned = tuple[Tensor | None, Tensor | None]  # the gradients of a norm's weight and bias


@dataclass(frozen=True)
class Affine:
    """(z - mean) * scale + shift, one number a channel in the tape's dtype.

    deviation: 1 / sqrt(variance + eps) in float64, or None where there is no BatchNorm. of_batch: the statistics are
    those of the batch itself, so that gradients go through them.
    """

    mean: NDArray
    scale: NDArray
    shift: NDArray
    deviation: NDArray[np.float64] | None = None
    of_batch: bool = False
    weight: Tensor | None = None
    bias: Tensor | None = None

    def through(self, total: NDArray, product: NDArray, number: int) -> tuple[tuple[NDArray, NDArray], Learned]:
        """What goes back through the statistics of a batch of `number` positions, by channel: what is taken off the
        gradient of z everywhere, and by z - mean; gradients of BatchNorm's parameters.

        total, product: [C] float64, the gradient and the gradient times z - mean, added up over the batch.
        """
        if self.deviation is None:
            nothing = np.zeros_like(self.scale)
            return (nothing, nothing), (None, None)
        numbers = np.empty((4, self.scale.size), self.scale.dtype)
        statistics_kernels.through(total, product, self.scale, self.deviation, self.of_batch / number, numbers)
        by_sum, by_product, by_weight, by_bias = numbers
        return (by_sum, by_product), (gradient_of(self.weight, by_weight), gradient_of(self.bias, by_bias))


def identity(channels: int, dtype: np.dtype) -> Affine:
    ones = np.ones(channels, dtype)
    return Affine(0 * ones, ones, 0 * ones)


class AffineSum:
    """affine(z) + residual. Of each channel, z and residual may be a map or numbers, and it is a map if one of them is.

    varying: which channels are maps.
    """

    def __init__(self, tape: Tape, z: Value, affine: Affine, residual: Value | None = None) -> None:
        self.tape, self.z, self.affine, self.residual = tape, z, affine, residual
        self.shape = z.shape
        self.kinds = image_kernels.Z * z.varying
        if residual is not None:
            self.kinds = self.kinds + image_kernels.RESIDUAL * residual.varying
        self.varying = self.kinds > 0
        self._base: NDArray | None = None
        self._away: NDArray[np.float64] | None = None

    @property
    def base(self) -> NDArray:
        """[blocks, C, block] what is added up of numbers: shift, and z or residual where they are no maps."""
        if self._base is None:
            affine, dtype = self.affine, self.tape.dtype
            numbers = self.z.numbers(dtype)
            numbers -= affine.mean[:, None]
            numbers *= np.where(self.z.varying, 0, affine.scale)[:, None]
            numbers += affine.shift[:, None]
            if self.residual is not None:
                numbers += self.residual.numbers(dtype)
            self._base = numbers
        return self._base

    @property
    def away(self) -> NDArray[np.float64]:
        """[blocks, C, block] the mean of z - mean over positions, where z is a map."""
        if self._away is None:
            self._away = _means(self.z, self.affine.mean)
        return self._away

    def hold(self, out: Value) -> None:
        """Say what is known of the map without writing it."""
        z, residual, affine = self.z, self.residual, self.affine
        constant = (z.constant.astype(affine.scale.dtype) - affine.mean) * affine.scale + affine.shift
        per_image = z.per_image
        if residual is not None:
            constant = constant + residual.constant.astype(constant.dtype)
            per_image = per_image | residual.per_image
        per_image = per_image & ~self.varying
        out.hold(self.varying, constant, per_image, self.base if per_image.any() else None)
        out.sum = self
        out.write_by(self.write)

    def write(self, channels: NDArray[np.int64], array: NDArray) -> None:
        affine, end = self.affine, self.tape.dtype.type(np.inf)
        z = self.z.read(channels)
        residual = z[:0] if self.residual is None else self.residual.read(channels)
        with timed("normalisation, activation, pooling"):
            numbers = (affine.mean, affine.scale, affine.shift, -end, end)
            norm_kernels.norm(z, residual, array, self.shape.map_sizes, channels, numbers)

    def means(self) -> NDArray[np.float64]:
        """[blocks, C, block] over positions, from those of what is added up."""
        means = self.base.astype(np.float64)
        if self.z.varying.any():
            means += self.affine.scale.astype(np.float64)[:, None] * self.away
        if self.residual is not None and self.residual.varying.any():
            np.add(means, means_of(self.residual), out=means, where=self.residual.varying[:, None])
        return means

    def maps(self) -> tuple[NDArray, NDArray]:
        """z and residual, written where they vary."""
        z = self.z.maps()
        return z, z if self.residual is None else self.residual.maps()


def means_of(x: Value) -> NDArray[np.float64]:
    """[blocks, C, block] over the positions of each image."""
    if x.means is None and x.sum is not None:
        x.means = x.sum.means()
    elif x.means is None:
        x.means = _means(x, np.zeros(x.shape.channels)) + x.numbers(np.dtype(np.float64))
    return x.means


def _means(x: Value, centre: NDArray) -> NDArray[np.float64]:
    """Of x - centre where x varies; zero where it does not."""
    means = np.zeros((x.shape.blocks, x.shape.channels, x.shape.block))
    channels = np.flatnonzero(x.varying)
    array = x.read(channels)
    with timed("normalisation, activation, pooling"):
        image_kernels.away(array, x.shape.map_sizes, channels, centre.astype(number_dtype(array)), means)
    return means


class AffineStep:
    """An `AffineSum` as a step of the forward pass."""

    def __init__(self, made: AffineSum) -> None:
        self.sum = made
        self.out = made.tape.new(made.shape)
        made.hold(self.out)
        made.z.readers += 1
        if made.residual is not None:
            made.residual.readers += 1

    def value(self) -> Value:
        made = self.sum
        residual = None if made.residual is None else made.residual.edge
        edges = (made.z.edge, residual, made.affine.weight, made.affine.bias)
        return made.tape.made(self, self.out, *edges)

    def backward(self) -> tuple[Tensor | None, ...]:
        made, g = self.sum, self.out.parted(self.sum.tape)
        self.out.writer = None
        with timed("gradient of normalisation"):
            if statistics_kernels.beyond(g.written, made.varying):
                g.collect(~made.varying)
            by_image, product = self._sums(g)
            shape = made.shape
            number = shape.images * shape.height * shape.width
            through, learned = made.affine.through(by_image.sum((0, 2)), product, number)
            self._give_numbers(g, by_image, through)
            self._give_maps(g, through)
        return DONE, DONE, *learned

    def _sums(self, g: Gradient) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The gradient added up over positions, [blocks, C, block]; and times z - mean over the batch, [C]."""
        made, z, mean = self.sum, self.sum.z, self.sum.affine.mean
        if g.sums is None:
            room = made.shape.blocks, made.shape.channels, made.shape.block
            total, products = np.zeros(room), np.zeros(room)
            sizes, written = made.shape.map_sizes, g.written
            image_kernels.totals(g.array, sizes, np.flatnonzero(written & ~z.varying), total)
            channels = np.flatnonzero(written & z.varying)
            image_kernels.products(g.array, z.read(channels), sizes, channels, mean, total, products)
        else:
            total, products = g.sums
        product = products.sum((0, 2))
        if g.totals is not None:
            if (g.even & z.varying).any():
                product += np.where(z.varying, (g.totals * made.away).sum((0, 2)), 0.0)
            total = total + g.totals
        if not z.varying.all():
            numbers = z.numbers(np.dtype(np.float64)) - mean[:, None]
            product = np.where(z.varying, product, (total * numbers).sum((0, 2)))
        return total, product

    def _give_numbers(self, g: Gradient, total: NDArray, through: tuple[NDArray, NDArray]) -> None:
        """To channels of z and of the residual that are no maps."""
        made, z, affine = self.sum, self.sum.z, self.sum.affine
        touched = g.written | g.even
        # the gradient of a constant channel adds up to nothing behind the statistics of a batch
        channels = touched & ~z.varying & (z.per_image | (not affine.of_batch))
        if channels.any():
            by_sum, by_product = (one[:, None] for one in through)
            positions = made.shape.height * made.shape.width
            numbers = z.numbers(np.dtype(np.float64)) - affine.mean[:, None]
            dz = affine.scale[:, None] * total - positions * (by_sum + by_product * numbers)
            z.give_totals(made.tape, channels, dz)
        if made.residual is not None:
            made.residual.give_totals(made.tape, touched & ~made.residual.varying, total)

    def _give_maps(self, g: Gradient, through: tuple[NDArray, NDArray]) -> None:
        made, z, affine, residual = self.sum, self.sum.z, self.sum.affine, self.sum.residual
        by_sum, by_product = through
        touched = (g.written | g.even) & z.varying
        shape = made.shape
        even = np.empty((shape.blocks, shape.channels, shape.block), made.tape.dtype)
        even[:] = -by_sum[:, None]
        if g.totals is not None:
            even += (affine.scale / (shape.height * shape.width))[:, None] * g.totals
        channels = np.flatnonzero(touched)
        array = z.read(channels)
        dz = g.buffer if residual is None else self._over_z()
        target = array if residual is None else dz.array
        numbers = affine.mean, affine.scale, by_product, even, residual is not None
        image_kernels.through(g.array, target, shape.map_sizes, channels, g.written, *numbers)
        z.give(dz, touched)
        if residual is not None:
            residual.give(g.buffer, g.written & residual.varying)
            if g.totals is not None:
                residual.give_totals(made.tape, g.even & residual.varying, g.totals)

    def _over_z(self) -> Buffer:
        """Where the gradient of z is written over z: into z itself, unless somebody else reads it still."""
        z = self.sum.z
        if z.readers == 1:
            return z.buffer
        copy = self.sum.tape.take(z.shape)
        copy.array[:] = z.buffer.array
        return copy
