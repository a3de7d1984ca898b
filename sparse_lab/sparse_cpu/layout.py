"""How activations lie in memory: batch innermost, so that one weight multiplies one long run of numbers.

[blocks][channels][H][W + 1][B]: B images side by side, and a spare pixel at the end of each row that is always zero, so
that a tap to the left or right of a row reads zeros and needs no branch. B divides the number of images: no image is
padding, and sums over a batch need no exceptions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

import sparse_lab.sparse_cpu.threads  # noqa: F401  first of all
from sparse_lab.sparse_cpu import image_kernels, layout_kernels
from sparse_lab.sparse_cpu.layout_kernels import SPARE
from sparse_lab.sparse_cpu.storage import BFloat16Array

ALIGNED = 64  # bytes: a cache line
BFLOAT16 = np.dtype(np.uint16)  # how numpy sees maps that are stored so
BEST_BLOCK = 32  # images: one row of a 4x4 map is then 16 AVX2 registers long


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
    def sizes(self) -> tuple[int, int, int, int]:
        return self.images, self.channels, self.height, self.width

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
    def map_sizes(self) -> tuple[int, int, int, int, int, int]:
        """What kernels are told of a map: (guard, blocks, channels, H, W, block)."""
        return self.guard, self.blocks, self.channels, self.height, self.width, self.block

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
        """dtype: float32, float64, or BFLOAT16."""
        free = self._free[shape, dtype]
        return Buffer(free.pop() if free else _aligned(shape.numbers, dtype), free)


def _aligned(numbers: int, dtype: np.dtype) -> NDArray:
    size = np.dtype(dtype).itemsize
    room = np.zeros(numbers + ALIGNED // size, dtype)
    first = -room.ctypes.data % ALIGNED // size
    array = room[first : first + numbers]
    return array.view(BFloat16Array) if dtype == BFLOAT16 else array


def number_dtype(array: NDArray) -> np.dtype:
    """Of one number beside a map, and of sums."""
    return np.dtype(np.float32) if array.dtype == BFLOAT16 else array.dtype


def pack(images: torch.Tensor, shape: Shape, out: NDArray) -> None:
    """(N, C, H, W) into the blocked layout."""
    source = np.ascontiguousarray(images.detach().numpy()).reshape(-1)
    layout_kernels.pack(
        source, out, shape.guard, shape.blocks * shape.channels, shape.channels, shape.height, shape.width, shape.block
    )


def unpack(source: NDArray, shape: Shape) -> torch.Tensor:
    """The blocked layout as a contiguous (N, C, H, W) tensor."""
    kind = torch.float64 if source.dtype == np.float64 else torch.float32
    out = torch.empty(shape.images, shape.channels, shape.height, shape.width, dtype=kind)
    flat = out.view(-1).numpy()
    layout_kernels.unpack(
        source, flat, shape.guard, shape.blocks * shape.channels, shape.channels, shape.height, shape.width, shape.block
    )
    return out


def pixels(array: NDArray, shape: Shape) -> torch.Tensor:
    """The map as torch may read and write it where it lies: (blocks, C, H, W, block), without spare pixels."""
    sizes = (shape.blocks, shape.channels, shape.height, shape.width, shape.block)
    plane = shape.height * shape.pitch
    strides = (shape.channels * plane, plane, shape.pitch, shape.block, 1)
    stored = array.dtype == BFLOAT16
    numbers = torch.from_numpy(array.view(np.ndarray)).view(torch.bfloat16) if stored else torch.from_numpy(array)
    return numbers.as_strided(sizes, strides, shape.guard)


def fill(array: NDArray, shape: Shape, channels: NDArray[np.int64], values: NDArray) -> None:
    """One number in every pixel of each of these channels; `values` has one for each of them."""
    layout_kernels.fill(
        array, shape.guard, shape.blocks, shape.channels, shape.height, shape.width, shape.block, channels, values
    )


def spread(array: NDArray, shape: Shape, channels: NDArray[np.int64], numbers: NDArray, adds: bool) -> None:
    """One number of `numbers` [blocks, C, block] in every pixel of each image of these channels, or added there."""
    if channels.size:
        image_kernels.spread(array, shape.map_sizes, channels, numbers, adds)
