"""How activations lie in memory: batch innermost, so that one weight multiplies one long run of numbers.

[blocks][channels][H][W + 1][B]: B images side by side, and a spare pixel at the end of each row that is always zero, so
that a tap to the left or right of a row reads zeros and needs no branch. B divides the number of images: no image is
padding, and sums over a batch need no exceptions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray

import sparse_lab.sparse_cpu.threads  # noqa: F401  first of all

SPARE = 1  # pixels at the end of each row
ALIGNED = 64  # bytes: a cache line
BEST_BLOCK = 32  # images: one row of a 4x4 map is then 16 AVX2 registers long
# sums may be reordered and fused; NaN and infinity keep their meaning, for a diverged run has to be seen
KERNEL: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}, "nogil": True, "cache": True}
# What kernels call stands in the code of each that calls it. As a function of its own it would be there twice, compiled
# for itself and with its caller, with sums rounded in other places: a process that compiles calls the first, one that
# finds the caller in the cache the second, and a run that goes on would not have the bits of one that was not stopped.
INLINED: dict[str, Any] = {**KERNEL, "forceinline": True}


def block_size(images: int) -> int:
    """Images side by side in a block: the divisor of `images` that is nearest to 32 by ratio.

    A prime above 180 or so gets blocks of 1, and then the vector runs along W.
    """
    divisors = [size for size in range(1, images + 1) if images % size == 0]
    return min(divisors, key=lambda size: (abs(math.log(size / BEST_BLOCK)), -size))


@dataclass(frozen=True)
class Shape:
    """(images, channels, height, width) in blocks of `block` images."""

    images: int
    channels: int
    height: int
    width: int
    block: int

    @property
    def blocks(self) -> int:
        return self.images // self.block

    @property
    def pitch(self) -> int:
        """Numbers from one row to the next."""
        return (self.width + SPARE) * self.block

    @property
    def guard(self) -> int:
        """Zeros in front and behind: the pixel to the left of the first one, to the right of the last spare one."""
        return -(-SPARE * self.block // ALIGNED) * ALIGNED

    @property
    def numbers(self) -> int:
        return 2 * self.guard + self.blocks * self.channels * self.height * self.pitch

    def like(self, channels: int, height: int, width: int) -> Shape:
        """The same images with other maps."""
        return Shape(self.images, channels, height, width, self.block)


class Buffer:
    """A flat array that goes back to its pool when nobody holds it any more. Spare pixels and guard are zero."""

    __slots__ = ("_free", "array")

    def __init__(self, array: NDArray, free: list[NDArray]) -> None:
        self.array = array
        self._free = free

    def __del__(self) -> None:
        self._free.append(self.array)


class Pool:
    """Buffers that stay mapped: large blocks that are freed and mapped again each step cost more than arithmetic.

    One list a shape, for only kernels of the same shape leave the same spare pixels zero.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[Shape, np.dtype], list[NDArray]] = defaultdict(list)

    def take(self, shape: Shape, dtype: np.dtype) -> Buffer:
        free = self._free[shape, dtype]
        return Buffer(free.pop() if free else _aligned(shape.numbers, dtype), free)


def _aligned(numbers: int, dtype: np.dtype) -> NDArray:
    size = np.dtype(dtype).itemsize
    room = np.zeros(numbers + ALIGNED // size, dtype)
    first = -room.ctypes.data % ALIGNED // size
    return room[first : first + numbers]


def pack(images: torch.Tensor, shape: Shape, out: NDArray) -> None:
    """(N, C, H, W) into the blocked layout."""
    source = np.ascontiguousarray(images.detach().numpy()).reshape(-1)
    _pack(
        source, out, shape.guard, shape.blocks * shape.channels, shape.channels, shape.height, shape.width, shape.block
    )


def unpack(source: NDArray, shape: Shape) -> torch.Tensor:
    """The blocked layout as a contiguous (N, C, H, W) tensor."""
    out = torch.empty(shape.images, shape.channels, shape.height, shape.width, dtype=_torch_dtype(source))
    flat = out.view(-1).numpy()
    _unpack(
        source, flat, shape.guard, shape.blocks * shape.channels, shape.channels, shape.height, shape.width, shape.block
    )
    return out


def fill(array: NDArray, shape: Shape, channels: NDArray[np.int64], values: NDArray) -> None:
    """One number in every pixel of each of these channels; `values` has one for each of them."""
    _fill(array, shape.guard, shape.blocks, shape.channels, shape.height, shape.width, shape.block, channels, values)


def _torch_dtype(array: NDArray) -> torch.dtype:
    return torch.float64 if array.dtype == np.float64 else torch.float32


@njit(parallel=True, **KERNEL)
def _pack(source, out, guard, planes, channels, height, width, block):  # type: ignore[no-untyped-def]
    pixels = height * width
    for plane in prange(planes):
        first = plane // channels * block
        channel = plane % channels
        for row in range(height):
            start = guard + (plane * height + row) * (width + SPARE) * block
            rows = out[start : start + width * block].reshape(width, block)
            for image in range(block):
                start = ((first + image) * channels + channel) * pixels + row * width
                line = source[start : start + width]
                for pixel in range(width):
                    rows[pixel, image] = line[pixel]


@njit(parallel=True, **KERNEL)
def _unpack(source, out, guard, planes, channels, height, width, block):  # type: ignore[no-untyped-def]
    pixels = height * width
    for plane in prange(planes):
        first = plane // channels * block
        channel = plane % channels
        for row in range(height):
            start = guard + (plane * height + row) * (width + SPARE) * block
            rows = source[start : start + width * block].reshape(width, block)
            for image in range(block):
                start = ((first + image) * channels + channel) * pixels + row * width
                line = out[start : start + width]
                for pixel in range(width):
                    line[pixel] = rows[pixel, image]


@njit(parallel=True, **KERNEL)
def _fill(out, guard, blocks, number, height, width, block, channels, values):  # type: ignore[no-untyped-def]
    for item in prange(blocks * channels.size):
        plane = item // channels.size * number + channels[item % channels.size]
        for row in range(height):
            start = guard + (plane * height + row) * (width + SPARE) * block
            out[start : start + width * block] = values[item % channels.size]
