"""Dynamic ReLU of what normalisation and residual add up to, one pass forward, and one backward.

v = (z - mean) * scale + base + residual; out = max(a1 v + b1, a2 v + b2). base, and the coefficients a1, a2, b1, b2, are
numbers for each image and channel. A channel's z or residual that is no map is in its base: kinds says what are maps.
sizes: (guard, blocks, number of channels, H, W, block); channels: those to compute.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from sparse_lab.sparse_cpu.image_kernels import BOTH, RESIDUAL, TOGETHER, Z, folded, lanes, repeat
from sparse_lab.sparse_cpu.kernel import INLINED, KERNEL, kernel
from sparse_lab.sparse_cpu.layout_kernels import SPARE

# places in a tile: base, a1, a2, b1, b2, and what is added up
EVEN, SUMS = 5, 6


@njit(**INLINED)
def _larger(v, t, i):
    first = t[TOGETHER + i] * v + t[3 * TOGETHER + i]
    second = t[2 * TOGETHER + i] * v + t[4 * TOGETHER + i]
    return second if first <= second else first


@njit(**INLINED)
def _out_of_both(z, r, y, t, m, s):
    for i in range(y.size):
        out = _larger((z[i] - m) * s + t[i] + r[i], t, i)
        y[i] = out
        t[5 * TOGETHER + i] += out


@njit(**INLINED)
def _out_of_one(x, y, t, m, s):
    for i in range(y.size):
        out = _larger((x[i] - m) * s + t[i], t, i)
        y[i] = out
        t[5 * TOGETHER + i] += out


@kernel(parallel=True, **KERNEL)
def dynamic_relu(z, residual, out, sizes, channels, kinds, mean, scale, base, coefficients, means):
    """base: [blocks, C, block], coefficients: [blocks, C, 4, block]; means: [blocks, C, block] float64, of out."""
    guard, blocks, number, height, width, block = sizes
    pitch = (width + SPARE) * block
    images, pixels, groups = lanes(block, width)
    none, one = z.dtype.type(0), z.dtype.type(1)
    for item in prange(blocks * channels.size):
        group, channel = item // channels.size, channels[item % channels.size]
        start = guard + (group * number + channel) * height * pitch
        tile = np.empty(6 * TOGETHER, z.dtype)
        kind, m, s = kinds[channel], mean[channel], scale[channel]
        for lane in range(0, groups * images, images):
            count = min(images, block - lane)
            repeat(tile, 0, base[group, channel, lane : lane + count], count, pixels)
            for place in range(4):
                repeat(tile, 1 + place, coefficients[group, channel, place, lane : lane + count], count, pixels)
            tile[5 * TOGETHER :] = 0.0
            for row in range(height):
                for pixel in range(0, width, pixels):
                    here = start + row * pitch + pixel * block + lane
                    end = here + min(pixels, width - pixel) * count
                    if kind == BOTH:
                        _out_of_both(z[here:end], residual[here:end], out[here:end], tile, m, s)
                    elif kind == Z:
                        _out_of_one(z[here:end], out[here:end], tile, m, s)
                    else:
                        _out_of_one(residual[here:end], out[here:end], tile, none, one)
            sums = means[group, channel, lane : lane + count]
            folded(tile, 5, count, pixels, sums)
            for i in range(count):
                sums[i] /= height * width


@njit(**INLINED)
def _back_through_both(g, z, r, t, m, s, zero):
    for i in range(g.size):
        away = z[i] - m
        v = away * s + t[i] + r[i]
        dy = g[i] + t[5 * TOGETHER + i]
        a1, a2 = t[TOGETHER + i], t[2 * TOGETHER + i]
        on = a1 * v + t[3 * TOGETHER + i] > a2 * v + t[4 * TOGETHER + i]
        first = dy if on else zero
        second = zero if on else dy
        t[6 * TOGETHER + i] += first
        t[7 * TOGETHER + i] += second
        t[8 * TOGETHER + i] += first * away
        t[9 * TOGETHER + i] += second * away
        t[10 * TOGETHER + i] += first * r[i]
        t[11 * TOGETHER + i] += second * r[i]
        g[i] = first * a1 + second * a2


@njit(**INLINED)
def _back_through_one(g, x, t, m, s, zero):
    for i in range(g.size):
        away = x[i] - m
        v = away * s + t[i]
        dy = g[i] + t[5 * TOGETHER + i]
        a1, a2 = t[TOGETHER + i], t[2 * TOGETHER + i]
        on = a1 * v + t[3 * TOGETHER + i] > a2 * v + t[4 * TOGETHER + i]
        first = dy if on else zero
        second = zero if on else dy
        t[6 * TOGETHER + i] += first
        t[7 * TOGETHER + i] += second
        t[8 * TOGETHER + i] += first * away
        t[9 * TOGETHER + i] += second * away
        g[i] = first * a1 + second * a2


@kernel(parallel=True, **KERNEL)
def dynamic_relu_input(g, z, residual, sizes, channels, kinds, mean, scale, base, coefficients, even, sums):
    """g, to which `even` [blocks, C, block] is added, becomes the gradient of v.

    sums [blocks, C, 6, block] (float64): of g, of g * (z - mean) and of g * residual over the positions of each image,
    of each once where the first piece is the larger one and once where the second is.
    """
    guard, blocks, number, height, width, block = sizes
    pitch = (width + SPARE) * block
    images, pixels, groups = lanes(block, width)
    none, one = z.dtype.type(0), z.dtype.type(1)
    for item in prange(blocks * channels.size):
        group, channel = item // channels.size, channels[item % channels.size]
        start = guard + (group * number + channel) * height * pitch
        tile = np.empty(12 * TOGETHER, z.dtype)
        kind, m, s = kinds[channel], mean[channel], scale[channel]
        for lane in range(0, groups * images, images):
            count = min(images, block - lane)
            repeat(tile, 0, base[group, channel, lane : lane + count], count, pixels)
            for place in range(4):
                repeat(tile, 1 + place, coefficients[group, channel, place, lane : lane + count], count, pixels)
            repeat(tile, EVEN, even[group, channel, lane : lane + count], count, pixels)
            tile[SUMS * TOGETHER :] = 0.0
            for row in range(height):
                for pixel in range(0, width, pixels):
                    here = start + row * pitch + pixel * block + lane
                    end = here + min(pixels, width - pixel) * count
                    if kind == BOTH:
                        _back_through_both(g[here:end], z[here:end], residual[here:end], tile, m, s, none)
                    elif kind == Z:
                        _back_through_one(g[here:end], z[here:end], tile, m, s, none)
                    else:
                        _back_through_one(g[here:end], residual[here:end], tile, none, one, none)
            for place in range(6):
                folded(tile, SUMS + place, count, pixels, sums[group, channel, place, lane : lane + count])
            if kind == RESIDUAL:
                for place in range(2):
                    for i in range(lane, lane + count):
                        sums[group, channel, 4 + place, i] = sums[group, channel, 2 + place, i]
                        sums[group, channel, 2 + place, i] = 0.0
