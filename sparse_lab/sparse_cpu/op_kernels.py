"""What else happens to maps: means over positions, max pooling of any size, dynamic ReLU, gates."""

from __future__ import annotations

import numpy as np
from numba import prange

from sparse_lab.sparse_cpu.kernel import KERNEL, kernel
from sparse_lab.sparse_cpu.layout_kernels import SPARE


@kernel(parallel=True, **KERNEL)
def mean(x, out, guard, out_guard, out_pitch, planes, height, width, block):
    """out: one pixel a plane, the mean over its positions for each image."""
    pitch = (width + SPARE) * block
    for plane in prange(planes):
        total = out[out_guard + plane * out_pitch : out_guard + plane * out_pitch + block]
        total[:] = 0.0
        for row in range(height):
            for pixel in range(width):
                start = guard + (plane * height + row) * pitch + pixel * block
                a = x[start : start + block]
                for i in range(block):
                    total[i] += a[i]
        for i in range(block):
            total[i] /= height * width


@kernel(parallel=True, **KERNEL)
def mean_input(g, y, guard, g_guard, g_pitch, blocks, number, height, width, block, channels, adds):
    """y = the gradient of every position of these channels, or added to what is there; g: one pixel a plane."""
    pitch = (width + SPARE) * block
    for item in prange(blocks * channels.size):
        plane = item // channels.size * number + channels[item % channels.size]
        dy = g[g_guard + plane * g_pitch : g_guard + plane * g_pitch + block]
        for row in range(height):
            for pixel in range(width):
                start = guard + (plane * height + row) * pitch + pixel * block
                a = y[start : start + block]
                if adds:
                    for i in range(block):
                        a[i] += dy[i] / (height * width)
                else:
                    for i in range(block):
                        a[i] = dy[i] / (height * width)


@kernel(parallel=True, **KERNEL)
def max_pool(x, out, winners, sizes, kernel, stride, pad):
    """The largest of every window; winners (uint8, as out): which tap it was, the first one where several are equal.

    sizes: (planes, block, H, W, x's guard, H', W', out's guard).
    """
    planes, block, height, width, guard, out_height, out_width, out_guard = sizes
    pitch, out_pitch = (width + SPARE) * block, (out_width + SPARE) * block
    for plane in prange(planes):
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
def max_pool_input(g, y, winners, sizes, kernel, stride, pad, adds):
    """y = the gradient of the inputs of `max_pool`, or added to what is there."""
    planes, block, height, width, guard, out_height, out_width, out_guard = sizes
    pitch, out_pitch = (width + SPARE) * block, (out_width + SPARE) * block
    for plane in prange(planes):
        if not adds:
            y[guard + plane * height * pitch : guard + (plane + 1) * height * pitch] = 0.0
        for row in range(out_height):
            for pixel in range(out_width):
                start = out_guard + (plane * out_height + row) * out_pitch + pixel * block
                for i in range(block):
                    tap = np.int64(winners[start + i])
                    down = row * stride[0] - pad[0] + tap // kernel[1]
                    right = pixel * stride[1] - pad[1] + tap % kernel[1]
                    y[guard + (plane * height + down) * pitch + right * block + i] += g[start + i]


@kernel(parallel=True, **KERNEL)
def dynamic_relu(x, out, guard, planes, height, width, block, coefficients):
    """out = max(a1 x + b1, a2 x + b2); coefficients [planes, 4, block]: a1, a2, b1, b2 of each image."""
    pitch = (width + SPARE) * block
    for plane in prange(planes):
        a1, a2, b1, b2 = coefficients[plane]
        for row in range(height):
            for pixel in range(width):
                start = guard + (plane * height + row) * pitch + pixel * block
                v, y = x[start : start + block], out[start : start + block]
                for i in range(block):
                    first, second = a1[i] * v[i] + b1[i], a2[i] * v[i] + b2[i]
                    y[i] = second if first <= second else first


@kernel(parallel=True, **KERNEL)
def dynamic_relu_input(g, x, guard, planes, height, width, block, coefficients, slopes):
    """g becomes the gradient of x; slopes [planes, 4, block]: the gradient of the coefficients."""
    pitch = (width + SPARE) * block
    for plane in prange(planes):
        a1, a2, b1, b2 = coefficients[plane]
        da1, da2, db1, db2 = slopes[plane]
        slopes[plane] = 0.0
        for row in range(height):
            for pixel in range(width):
                start = guard + (plane * height + row) * pitch + pixel * block
                v, dy = x[start : start + block], g[start : start + block]
                for i in range(block):
                    on = a1[i] * v[i] + b1[i] > a2[i] * v[i] + b2[i]
                    first = dy[i] if on else dy[i] - dy[i]
                    second = dy[i] - first
                    da1[i] += first * v[i]
                    da2[i] += second * v[i]
                    db1[i] += first
                    db2[i] += second
                    dy[i] = first * a1[i] + second * a2[i]


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
        f, df = factors[first : first + block], slopes[first : first + block]
        df[:] = 0.0
        for row in range(height):
            for pixel in range(width):
                start = guard + (plane * height + row) * pitch + pixel * block
                v, dy = x[start : start + block], g[start : start + block]
                for i in range(block):
                    df[i] += dy[i] * v[i]
                    dy[i] = dy[i] * f[i]
