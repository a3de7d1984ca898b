"""BatchNorm, residual addition and activation in one pass, their gradients in two; 2x2 max pooling inside of them.

y = (z - mean) * scale + shift [+ residual], then kept within [low, high]: ReLU is [0, largest number], ReLU6 is [0, 6].
All maps of one call have one shape, so one guard. Comparisons are written so that NaN passes through.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from sparse_lab.compute.layout import KERNEL, SPARE

OPEN, GATED, GATED_BY_OUTPUT = 0, 1, 2  # is the gradient stopped by the activation, and who knows where


@njit(**KERNEL)
def _clamp(y, low, high):  # type: ignore[no-untyped-def]
    y = low if y < low else y
    return high if y > high else y


@njit(parallel=True, **KERNEL)
def norm(z, residual, out, guard, planes, channels, height, width, block, mean, scale, shift, low, high):  # type: ignore[no-untyped-def]
    """out = clamp((z - mean) * scale + shift + residual); an empty residual is none."""
    pitch, run = (width + SPARE) * block, width * block
    for plane in prange(planes):
        channel = plane % channels
        m, s, b = mean[channel], scale[channel], shift[channel]
        for row in range(height):
            start = guard + (plane * height + row) * pitch
            x, y = z[start : start + run], out[start : start + run]
            if residual.size:
                r = residual[start : start + run]
                for i in range(run):
                    y[i] = _clamp((x[i] - m) * s + b + r[i], low, high)
            else:
                for i in range(run):
                    y[i] = _clamp((x[i] - m) * s + b, low, high)


@njit(**KERNEL)
def _sums_open(g, x, m):  # type: ignore[no-untyped-def]
    total = product = g[0] - g[0]
    for i in range(g.size):
        total += g[i]
        product += g[i] * (x[i] - m)
    return total, product


@njit(**KERNEL)
def _sums_gated(g, x, m, s, b, low, high):  # type: ignore[no-untyped-def]
    zero = g[0] - g[0]
    total = product = zero
    for i in range(g.size):
        y = (x[i] - m) * s + b
        dy = zero if y <= low or y >= high else g[i]
        total += dy
        product += dy * (x[i] - m)
    return total, product


@njit(**KERNEL)
def _sums_gated_by_output(g, x, y, m, low, high):  # type: ignore[no-untyped-def]
    zero = g[0] - g[0]
    total = product = zero
    for i in range(g.size):
        dy = zero if y[i] <= low or y[i] >= high else g[i]
        g[i] = dy
        total += dy
        product += dy * (x[i] - m)
    return total, product


@njit(parallel=True, **KERNEL)
def norm_sums(g, z, out, guard, planes, channels, height, width, block, mean, scale, shift, low, high, gate, partial):  # type: ignore[no-untyped-def]
    """partial[plane] (float64): sums of dy and of dy * (z - mean), dy being g where the activation lets it pass.

    gate=GATED_BY_OUTPUT reads `out`, the activation's output, and leaves dy in g.
    """
    pitch, run = (width + SPARE) * block, width * block
    for plane in prange(planes):
        channel = plane % channels
        m, s, b = mean[channel], scale[channel], shift[channel]
        totals = products = 0.0
        for row in range(height):
            start = guard + (plane * height + row) * pitch
            dy, x = g[start : start + run], z[start : start + run]
            if gate == OPEN:
                total, product = _sums_open(dy, x, m)
            elif gate == GATED:
                total, product = _sums_gated(dy, x, m, s, b, low, high)
            else:
                total, product = _sums_gated_by_output(dy, x, out[start : start + run], m, low, high)
            totals += total
            products += product
        partial[plane, 0], partial[plane, 1] = totals, products


@njit(parallel=True, **KERNEL)
def norm_input(g, z, dz, guard, planes, channels, height, width, block, mean, scale, shift, low, high, gated, by_sum, by_product):  # type: ignore[no-untyped-def]
    """dz = scale * dy - by_sum - by_product * (z - mean); dz may be g itself."""
    pitch, run = (width + SPARE) * block, width * block
    for plane in prange(planes):
        channel = plane % channels
        m, s, b = mean[channel], scale[channel], shift[channel]
        k, p = by_sum[channel], by_product[channel]
        for row in range(height):
            start = guard + (plane * height + row) * pitch
            dy, x, out = g[start : start + run], z[start : start + run], dz[start : start + run]
            if gated:
                for i in range(run):
                    away = x[i] - m
                    y = away * s + b
                    passed = dy[i] - dy[i] if y <= low or y >= high else dy[i]
                    out[i] = s * passed - k - p * away
            else:
                for i in range(run):
                    out[i] = s * dy[i] - k - p * (x[i] - m)


@njit(parallel=True, **KERNEL)
def norm_pool(z, out, guard, out_guard, planes, channels, height, width, block, mean, scale, shift, low, high):  # type: ignore[no-untyped-def]
    """As `norm`, then the largest of each 2x2 square; an odd last row or column is left out."""
    half_height, half_width = height // 2, width // 2
    pitch, half_pitch = (width + SPARE) * block, (half_width + SPARE) * block
    for plane in prange(planes):
        channel = plane % channels
        m, s, b = mean[channel], scale[channel], shift[channel]
        for row in range(half_height):
            start = guard + (plane * height + 2 * row) * pitch
            upper, lower = z[start : start + pitch], z[start + pitch : start + 2 * pitch]
            start = out_guard + (plane * half_height + row) * half_pitch
            for pixel in range(half_width):
                left, right = 2 * pixel * block, (2 * pixel + 1) * block
                v0, v1 = upper[left:right], upper[right : right + block]
                v2, v3 = lower[left:right], lower[right : right + block]
                y = out[start + pixel * block : start + (pixel + 1) * block]
                for i in range(block):
                    y0, y1 = (v0[i] - m) * s + b, (v1[i] - m) * s + b
                    y2, y3 = (v2[i] - m) * s + b, (v3[i] - m) * s + b
                    y0 = y0 if y0 >= y1 else y1
                    y2 = y2 if y2 >= y3 else y3
                    y[i] = _clamp(y0 if y0 >= y2 else y2, low, high)


@njit(**KERNEL)
def _winner(x0, x1, x2, x3, m, s, b):  # type: ignore[no-untyped-def]
    """Which of a square's four is its maximum (the first, as torch has it), and that maximum."""
    best, which = (x0 - m) * s + b, np.int32(0)
    y = (x1 - m) * s + b
    which = np.int32(1) if y > best else which
    best = y if y > best else best
    y = (x2 - m) * s + b
    which = np.int32(2) if y > best else which
    best = y if y > best else best
    y = (x3 - m) * s + b
    which = np.int32(3) if y > best else which
    best = y if y > best else best
    return which, best


@njit(parallel=True, **KERNEL)
def norm_pool_sums(g, z, g_guard, guard, planes, channels, height, width, block, mean, scale, shift, low, high, partial):  # type: ignore[no-untyped-def]
    """As `norm_sums`, for `norm_pool`: g has the pooled shape, and a square's winner gets it."""
    half_height, half_width = height // 2, width // 2
    pitch, half_pitch = (width + SPARE) * block, (half_width + SPARE) * block
    for plane in prange(planes):
        channel = plane % channels
        m, s, b = mean[channel], scale[channel], shift[channel]
        totals = products = 0.0
        for row in range(half_height):
            start = guard + (plane * height + 2 * row) * pitch
            upper, lower = z[start : start + pitch], z[start + pitch : start + 2 * pitch]
            start = g_guard + (plane * half_height + row) * half_pitch
            for pixel in range(half_width):
                left, right = 2 * pixel * block, (2 * pixel + 1) * block
                v0, v1 = upper[left:right], upper[right : right + block]
                v2, v3 = lower[left:right], lower[right : right + block]
                dy = g[start + pixel * block : start + (pixel + 1) * block]
                total = product = dy[0] - dy[0]
                for i in range(block):
                    which, best = _winner(v0[i], v1[i], v2[i], v3[i], m, s, b)
                    passed = dy[i] - dy[i] if best <= low or best >= high else dy[i]
                    x = v0[i] if which == 0 else v1[i]
                    x = v2[i] if which == 2 else x
                    x = v3[i] if which == 3 else x
                    total += passed
                    product += passed * (x - m)
                totals += total
                products += product
        partial[plane, 0], partial[plane, 1] = totals, products


@njit(parallel=True, **KERNEL)
def norm_pool_input(g, z, dz, g_guard, guard, planes, channels, height, width, block, mean, scale, shift, low, high, by_sum, by_product):  # type: ignore[no-untyped-def]
    """As `norm_input`, for `norm_pool`; what an odd last row or column gets is what the batch statistics give it."""
    half_height, half_width = height // 2, width // 2
    pitch, half_pitch, run = (width + SPARE) * block, (half_width + SPARE) * block, width * block
    for plane in prange(planes):
        channel = plane % channels
        m, s, b = mean[channel], scale[channel], shift[channel]
        k, p = by_sum[channel], by_product[channel]
        if height % 2 or width % 2:
            for row in range(height):
                start = guard + (plane * height + row) * pitch
                for i in range(start, start + run):
                    dz[i] = -k - p * (z[i] - m)
        for row in range(half_height):
            start = guard + (plane * height + 2 * row) * pitch
            upper, lower = z[start : start + pitch], z[start + pitch : start + 2 * pitch]
            up, down = dz[start : start + pitch], dz[start + pitch : start + 2 * pitch]
            start = g_guard + (plane * half_height + row) * half_pitch
            for pixel in range(half_width):
                left, right = 2 * pixel * block, (2 * pixel + 1) * block
                v0, v1 = upper[left:right], upper[right : right + block]
                v2, v3 = lower[left:right], lower[right : right + block]
                d0, d1 = up[left:right], up[right : right + block]
                d2, d3 = down[left:right], down[right : right + block]
                dy = g[start + pixel * block : start + (pixel + 1) * block]
                for i in range(block):
                    which, best = _winner(v0[i], v1[i], v2[i], v3[i], m, s, b)
                    zero = dy[i] - dy[i]
                    passed = zero if best <= low or best >= high else s * dy[i]
                    d0[i] = (passed if which == 0 else zero) - k - p * (v0[i] - m)
                    d1[i] = (passed if which == 1 else zero) - k - p * (v1[i] - m)
                    d2[i] = (passed if which == 2 else zero) - k - p * (v2[i] - m)
                    d3[i] = (passed if which == 3 else zero) - k - p * (v3[i] - m)


@njit(parallel=True, **KERNEL)
def gate(g, out, guard, planes, height, width, block, low, high):  # type: ignore[no-untyped-def]
    """g = 0, in place, where the activation that gave `out` was at one of its ends."""
    pitch, run = (width + SPARE) * block, width * block
    for row in prange(planes * height):
        start = guard + row * pitch
        dy, y = g[start : start + run], out[start : start + run]
        for i in range(run):
            dy[i] = dy[i] - dy[i] if y[i] <= low or y[i] >= high else dy[i]


@njit(parallel=True, **KERNEL)
def add(target, other):  # type: ignore[no-untyped-def]
    """target += other, both of one shape."""
    parts = 64
    for part in prange(parts):
        a = target[part * target.size // parts : (part + 1) * target.size // parts]
        b = other[part * target.size // parts : (part + 1) * target.size // parts]
        for i in range(a.size):
            a[i] += b[i]
