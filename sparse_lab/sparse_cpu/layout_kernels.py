"""Images into the layout of `layout` and out of it, and one number into whole channels."""

from __future__ import annotations

from numba import prange

from sparse_lab.sparse_cpu.kernel import KERNEL, kernel
from sparse_lab.sparse_cpu.storage import bfloat16  # noqa: F401  a type of map that numba then knows

SPARE = 1  # pixels at the end of each row


@kernel(parallel=True, **KERNEL)
def pack(source, out, guard, planes, channels, height, width, block):
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


@kernel(parallel=True, **KERNEL)
def unpack(source, out, guard, planes, channels, height, width, block):
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


@kernel(parallel=True, **KERNEL)
def fill(out, guard, blocks, number, height, width, block, channels, values):
    for item in prange(blocks * channels.size):
        plane = item // channels.size * number + channels[item % channels.size]
        for row in range(height):
            start = guard + (plane * height + row) * (width + SPARE) * block
            out[start : start + width * block] = values[item % channels.size]
