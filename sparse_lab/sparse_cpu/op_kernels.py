"""What else happens to maps: max pooling of any size, gates."""

from __future__ import annotations

import numpy as np
from numba import prange

from sparse_lab.sparse_cpu.kernel import KERNEL, kernel
from sparse_lab.sparse_cpu.layout_kernels import SPARE
from sparse_lab.sparse_cpu.storage import closed, opened


@kernel(parallel=True, **KERNEL)
def max_pool(x, out, winners, sizes, kernel, stride, pad, channels):
    """The largest of every window; winners (uint8, as out): which tap it was, the first one where several are equal.

    sizes: (blocks, number of channels, block, H, W, x's guard, H', W', out's guard); channels: those to compute.
    """
    blocks, number, block, height, width, guard, out_height, out_width, out_guard = sizes
    pitch, out_pitch = (width + SPARE) * block, (out_width + SPARE) * block
    for item in prange(blocks * channels.size):
        plane = item // channels.size * number + channels[item % channels.size]
        for row in range(out_height):
            for pixel in range(out_width):
                start = out_guard + (plane * out_height + row) * out_pitch + pixel * block
                best, which = out[start : start + block], winners[start : start + block]
                empty = True
                for tap in range(kernel[0] * kernel[1]):
                    down = row * stride[0] - pad[0] + tap // kernel[1]
                    right = pixel * stride[1] - pad[1] + tap % kernel[1]
                    if down < 0 or down >= height or right < 0 or right >= width:
                        continue
                    begin = guard + (plane * height + down) * pitch + right * block
                    a = x[begin : begin + block]
                    for i in range(block):
                        if empty or a[i] > best[i] or a[i] != a[i]:
                            best[i], which[i] = a[i], np.uint8(tap)
                    empty = False


@kernel(parallel=True, **KERNEL)
def max_pool_input(g, y, winners, sizes, kernel, stride, pad, channels, adds):
    """y = the gradient of the inputs of `max_pool`, or added to what is there."""
    blocks, number, block, height, width, guard, out_height, out_width, out_guard = sizes
    pitch, out_pitch = (width + SPARE) * block, (out_width + SPARE) * block
    for item in prange(blocks * channels.size):
        plane = item // channels.size * number + channels[item % channels.size]
        target = guard + plane * height * pitch
        sums = opened(y, target, height * pitch)
        if not adds:
            sums[:] = 0.0
        for row in range(out_height):
            for pixel in range(out_width):
                start = out_guard + (plane * out_height + row) * out_pitch + pixel * block
                for i in range(block):
                    tap = np.int64(winners[start + i])
                    down = row * stride[0] - pad[0] + tap // kernel[1]
                    right = pixel * stride[1] - pad[1] + tap % kernel[1]
                    sums[down * pitch + right * block + i] += g[start + i]
        closed(y, target, sums)


@kernel(parallel=True, **KERNEL)
def gate(x, factors, out, guard, factors_guard, factors_pitch, planes, height, width, block):
    """out = x times one factor for each plane and image; factors: a map of one pixel."""
    pitch = (width + SPARE) * block
    for plane in prange(planes):
        f = factors[factors_guard + plane * factors_pitch : factors_guard + plane * factors_pitch + block]
        for row in range(height):
            for pixel in range(width):
                start = guard + (plane * height + row) * pitch + pixel * block
                v, y = x[start : start + block], out[start : start + block]
                for i in range(block):
                    y[i] = v[i] * f[i]


@kernel(parallel=True, **KERNEL)
def gate_input(g, x, factors, slopes, guard, factors_guard, factors_pitch, planes, height, width, block):
    """g becomes the gradient of x; slopes, a map of one pixel, that of the factors."""
    pitch = (width + SPARE) * block
    for plane in prange(planes):
        first = factors_guard + plane * factors_pitch
        f, df = factors[first : first + block], opened(slopes, first, block)
        df[:] = 0.0
        for row in range(height):
            for pixel in range(width):
                start = guard + (plane * height + row) * pitch + pixel * block
                v, dy = x[start : start + block], g[start : start + block]
                for i in range(block):
                    df[i] += dy[i] * v[i]
                    dy[i] = dy[i] * f[i]
        closed(slopes, first, df)
