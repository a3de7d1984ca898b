"""Dynamic ReLU of what normalisation and residual add up to, one pass forward, and one backward.

v = (z - mean) * scale + base + residual; out = max(a1 v + b1, a2 v + b2). base [blocks, C, block] and the
coefficients [blocks, C, 4, block] are numbers for each image and channel. A channel's z or residual that is no map is
in its base: kinds says what are maps.
sizes: (guard, blocks, number of channels, H, W, block).
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from sparse_lab.sparse_cpu.image_kernels import BOTH, RESIDUAL, TOGETHER, Z, folded, lanes, repeat
from sparse_lab.sparse_cpu.kernel import INLINED, KERNEL, kernel
from sparse_lab.sparse_cpu.layout_kernels import SPARE
from sparse_lab.sparse_cpu.storage import room

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
def dynamic_relu(z, residual, out, sizes, kinds, mean, scale, base, coefficients, images, means):
    """images: [blocks, C, block] for what channels hold that are no maps; means: of out over positions, in float64."""
    guard, blocks, number, height, width, block = sizes
    pitch = (width + SPARE) * block
    together, pixels, groups = lanes(block, width)
    none, one = scale.dtype.type(0), scale.dtype.type(1)
    for item in prange(blocks * number):
        group, channel = item // number, item % number
        start = guard + item * height * pitch
        kind, m, s = kinds[channel], mean[channel], scale[channel]
        if kind == 0:
            a1, a2, b1, b2 = coefficients[group, channel]
            x, held, known = base[group, channel], images[group, channel], means[group, channel]
            for i in range(block):
                first, second = a1[i] * x[i] + b1[i], a2[i] * x[i] + b2[i]
                held[i] = second if first <= second else first
                known[i] = held[i]
            continue
        tile = room(z, 6 * TOGETHER)
        for lane in range(0, groups * together, together):
            count = min(together, block - lane)
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


@njit(**INLINED)
def _of_numbers(x, a1, a2, b1, b2, dy, sums):
    """The sums of a channel that is no map."""
    for i in range(x.size):
        on = a1[i] * x[i] + b1[i] > a2[i] * x[i] + b2[i]
        sums[0, i] = dy[i] if on else 0.0
        sums[1, i] = 0.0 if on else dy[i]
        for place in range(2, 6):
            sums[place, i] = 0.0


@njit(**INLINED)
def _slope(x, s, total, by_z, by_residual, out):
    for i in range(x.size):
        out[i] = x[i] * total[i] + s * by_z[i] + by_residual[i]


@njit(**INLINED)
def _combined(a1, a2, first, second, out):
    for i in range(out.size):
        out[i] = a1[i] * first[i] + a2[i] * second[i]


@njit(**INLINED)
def _finish(sums, kind, s, x, a1, a2, total, product, slopes):
    """What follows from the sums of a channel."""
    if kind == RESIDUAL:  # they are of the residual where those of z would be
        for place in range(2):
            sums[4 + place] = sums[2 + place]
            sums[2 + place] = 0.0
    for piece in range(2):
        _slope(x, s, sums[piece], sums[2 + piece], sums[4 + piece], slopes[piece])
        slopes[2 + piece] = sums[piece]
    _combined(a1, a2, sums[0], sums[1], total)
    _combined(a1, a2, sums[2], sums[3], product)


@kernel(parallel=True, **KERNEL)
def dynamic_relu_input(g, z, residual, sizes, kinds, mean, scale, base, coefficients, totals, total, product, slopes):
    """g, and `totals` over positions beside it, become the gradient of v: in place, and `total` over positions.

    totals, total, product: [blocks, C, block] float64; product: the gradient of v times z - mean, added up; slopes:
    [blocks, C, 4, block], the gradient of the coefficients.
    """
    guard, blocks, number, height, width, block = sizes
    pitch = (width + SPARE) * block
    together, pixels, groups = lanes(block, width)
    none, one = scale.dtype.type(0), scale.dtype.type(1)
    for item in prange(blocks * number):
        group, channel = item // number, item % number
        start = guard + item * height * pitch
        kind, m, s = kinds[channel], mean[channel], scale[channel]
        a1, a2, b1, b2 = coefficients[group, channel]
        sums = np.empty((6, block))
        tile = room(z, 12 * TOGETHER)
        if kind == 0:
            _of_numbers(base[group, channel], a1, a2, b1, b2, totals[group, channel], sums)
        else:
            for lane in range(0, groups * together, together):
                count = min(together, block - lane)
                repeat(tile, 0, base[group, channel, lane : lane + count], count, pixels)
                for place in range(4):
                    repeat(tile, 1 + place, coefficients[group, channel, place, lane : lane + count], count, pixels)
                even = totals[group, channel, lane : lane + count] / (height * width)
                repeat(tile, EVEN, even, count, pixels)
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
                    folded(tile, SUMS + place, count, pixels, sums[place, lane : lane + count])
        known = total[group, channel], product[group, channel], slopes[group, channel]
        _finish(sums, kind, s, base[group, channel], a1, a2, *known)
