"""BatchNorm, residual addition and activation in one pass, their gradients in two; 2x2 max pooling inside of them.
LayerNorm over channels.

y = (z - mean) * scale + shift [+ residual], then kept within [low, high]: ReLU is [0, largest number], ReLU6 is [0, 6].
sizes: (guard, blocks, number of channels, H, W, block) of z; channels: those to compute; affine: (mean, scale, shift,
low, high). Comparisons are written so that NaN passes through.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from sparse_lab.sparse_cpu.kernel import INLINED, KERNEL, kernel
from sparse_lab.sparse_cpu.layout_kernels import SPARE

OPEN, GATED, GATED_BY_OUTPUT = 0, 1, 2  # is the gradient stopped by the activation, and who knows where


@njit(**INLINED)
def _clamp(y, low, high):
    y = low if y < low else y
    return high if y > high else y


@kernel(parallel=True, **KERNEL)
def norm(z, residual, out, sizes, channels, affine):
    """out = clamp((z - mean) * scale + shift + residual); an empty residual is none."""
    guard, blocks, number, height, width, block = sizes
    mean, scale, shift, low, high = affine
    pitch, run = (width + SPARE) * block, width * block
    for item in prange(blocks * channels.size):
        channel = channels[item % channels.size]
        plane = item // channels.size * number + channel
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


@njit(**INLINED)
def _sums_open(g, x, m):
    total = product = g[0] - g[0]
    for i in range(g.size):
        total += g[i]
        product += g[i] * (x[i] - m)
    return total, product


@njit(**INLINED)
def _sums_gated(g, x, m, s, b, low, high):
    zero = g[0] - g[0]
    total = product = zero
    for i in range(g.size):
        y = (x[i] - m) * s + b
        dy = g[i]
        dy = zero if y <= low or y >= high else dy
        total += dy
        product += dy * (x[i] - m)
    return total, product


@njit(**INLINED)
def _sums_gated_by_output(g, x, y, m, low, high):
    zero = g[0] - g[0]
    total = product = zero
    for i in range(g.size):
        dy, at = g[i], y[i]
        dy = zero if at <= low or at >= high else dy
        g[i] = dy
        total += dy
        product += dy * (x[i] - m)
    return total, product


@kernel(parallel=True, **KERNEL)
def norm_sums(g, z, out, sizes, channels, affine, gate, partial):
    """partial[plane] (float64): sums of dy and of dy * (z - mean), dy being g where the activation lets it pass.

    gate=GATED_BY_OUTPUT reads `out`, the activation's output, and leaves dy in g.
    """
    guard, blocks, number, height, width, block = sizes
    mean, scale, shift, low, high = affine
    pitch, run = (width + SPARE) * block, width * block
    for item in prange(blocks * channels.size):
        channel = channels[item % channels.size]
        plane = item // channels.size * number + channel
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


@njit(**INLINED)
def _input_gated(g, x, m, s, b, low, high, k, p):
    for i in range(g.size):
        away = x[i] - m
        y = away * s + b
        passed = g[i]
        passed = passed - passed if y <= low or y >= high else passed
        g[i] = s * passed - k - p * away


@kernel(parallel=True, **KERNEL)
def norm_input(g, z, sizes, channels, affine, gated, by_sum, by_product):
    """g = scale * dy - by_sum - by_product * (z - mean), in place."""
    guard, blocks, number, height, width, block = sizes
    mean, scale, shift, low, high = affine
    pitch, run = (width + SPARE) * block, width * block
    for item in prange(blocks * channels.size):
        channel = channels[item % channels.size]
        plane = item // channels.size * number + channel
        m, s, b = mean[channel], scale[channel], shift[channel]
        k, p = by_sum[channel], by_product[channel]
        for row in range(height):
            start = guard + (plane * height + row) * pitch
            dy, x = g[start : start + run], z[start : start + run]
            if gated:
                _input_gated(dy, x, m, s, b, low, high, k, p)
            else:
                for i in range(run):
                    dy[i] = s * dy[i] - k - p * (x[i] - m)


@kernel(parallel=True, **KERNEL)
def norm_input_over(g, z, sizes, channels, affine, by_sum, by_product):
    """z = scale * g - by_sum - by_product * (z - mean), in place; g is still needed, by the residual."""
    guard, blocks, number, height, width, block = sizes
    mean, scale = affine[:2]
    pitch, run = (width + SPARE) * block, width * block
    for item in prange(blocks * channels.size):
        channel = channels[item % channels.size]
        plane = item // channels.size * number + channel
        m, s, k, p = mean[channel], scale[channel], by_sum[channel], by_product[channel]
        for row in range(height):
            start = guard + (plane * height + row) * pitch
            dy, x = g[start : start + run], z[start : start + run]
            for i in range(run):
                x[i] = s * dy[i] - k - p * (x[i] - m)


@njit(**INLINED)
def _larger(a, b):  # type: ignore[no-untyped-def]
    """NaN where one of the two is."""
    return b if b > a or b != b else a


@kernel(parallel=True, **KERNEL)
def norm_pool(z, out, out_guard, sizes, channels, affine):
    """As `norm`, then the largest of each 2x2 square; an odd last row or column is left out."""
    guard, blocks, number, height, width, block = sizes
    mean, scale, shift, low, high = affine
    half_height, half_width = height // 2, width // 2
    pitch, half_pitch = (width + SPARE) * block, (half_width + SPARE) * block
    for item in prange(blocks * channels.size):
        channel = channels[item % channels.size]
        plane = item // channels.size * number + channel
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
                    y[i] = _clamp(_larger(_larger(y0, y1), _larger(y2, y3)), low, high)


@kernel(parallel=True, **KERNEL)
def norm_pool_sums(g, z, g_guard, sizes, channels, affine, partial):
    """As `norm_sums`, for `norm_pool`: g has the pooled shape, and a square's winner gets it."""
    guard, blocks, number, height, width, block = sizes
    mean, scale, shift, low, high = affine
    half_height, half_width = height // 2, width // 2
    pitch, half_pitch = (width + SPARE) * block, (half_width + SPARE) * block
    for item in prange(blocks * channels.size):
        channel = channels[item % channels.size]
        plane = item // channels.size * number + channel
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
                    a0, a1, a2, a3, passed = v0[i] - m, v1[i] - m, v2[i] - m, v3[i] - m, dy[i]
                    best, x = a0 * s + b, a0
                    y = a1 * s + b
                    best, x = (y, a1) if y > best else (best, x)
                    y = a2 * s + b
                    best, x = (y, a2) if y > best else (best, x)
                    y = a3 * s + b
                    best, x = (y, a3) if y > best else (best, x)
                    passed = passed - passed if best <= low or best >= high else passed
                    total += passed
                    product += passed * x
                totals += total
                products += product
        partial[plane, 0], partial[plane, 1] = totals, products


@njit(**INLINED)
def _square_input(g, v0, v1, v2, v3, m, s, b, low, high, k, p):
    """The gradient goes to the first maximum of a square, as torch has it: the later one only if it is larger."""
    for i in range(g.size):
        a0, a1, a2, a3 = v0[i] - m, v1[i] - m, v2[i] - m, v3[i] - m
        y0, y1, y2, y3 = a0 * s + b, a1 * s + b, a2 * s + b, a3 * s + b
        upper = y1 if y1 > y0 else y0
        lower = y3 if y3 > y2 else y2
        best = lower if lower > upper else upper
        passed = s * g[i]
        zero = passed - passed
        passed = zero if best <= low or best >= high else passed
        passed_up = zero if lower > upper else passed
        passed_down = passed - passed_up
        right_up = passed_up if y1 > y0 else zero
        right_down = passed_down if y3 > y2 else zero
        v0[i] = (passed_up - right_up) - k - p * a0
        v1[i] = right_up - k - p * a1
        v2[i] = (passed_down - right_down) - k - p * a2
        v3[i] = right_down - k - p * a3


@kernel(parallel=True, **KERNEL)
def norm_pool_input(g, z, g_guard, sizes, channels, affine, by_sum, by_product):
    """As `norm_input`, for `norm_pool`, in place of z; an odd last row or column gets what the statistics give it."""
    guard, blocks, number, height, width, block = sizes
    mean, scale, shift, low, high = affine
    half_height, half_width = height // 2, width // 2
    pitch, half_pitch = (width + SPARE) * block, (half_width + SPARE) * block
    for item in prange(blocks * channels.size):
        channel = channels[item % channels.size]
        plane = item // channels.size * number + channel
        m, s, b = mean[channel], scale[channel], shift[channel]
        k, p = by_sum[channel], by_product[channel]
        for row in range(height):
            start = guard + (plane * height + row) * pitch
            first = 2 * half_width * block if row < 2 * half_height else 0
            rest = z[start + first : start + width * block]
            for i in range(rest.size):
                rest[i] = -k - p * (rest[i] - m)
        for row in range(half_height):
            start = guard + (plane * height + 2 * row) * pitch
            upper, lower = z[start : start + pitch], z[start + pitch : start + 2 * pitch]
            start = g_guard + (plane * half_height + row) * half_pitch
            for pixel in range(half_width):
                left, right = 2 * pixel * block, (2 * pixel + 1) * block
                dy = g[start + pixel * block : start + (pixel + 1) * block]
                v0, v1 = upper[left:right], upper[right : right + block]
                v2, v3 = lower[left:right], lower[right : right + block]
                _square_input(dy, v0, v1, v2, v3, m, s, b, low, high, k, p)


@kernel(parallel=True, **KERNEL)
def add(target, other):
    """target += other, both of one shape."""
    parts = 64
    for part in prange(parts):
        a = target[part * target.size // parts : (part + 1) * target.size // parts]
        b = other[part * target.size // parts : (part + 1) * target.size // parts]
        for i in range(a.size):
            a[i] += b[i]


TOGETHER = 512  # positions and images that `layer_norm` takes at a time, channel by channel: they stay in the cache


@njit(**INLINED)
def _chunk(item, chunks, run, guard, number, height, pitch):
    """Where the positions begin in the first channel, and how many there are."""
    line, first = item // chunks, item % chunks * TOGETHER
    return guard + (line // height * number * height + line % height) * pitch + first, min(TOGETHER, run - first)


@kernel(parallel=True, **KERNEL)
def layer_norm(x, out, sizes, weight, bias, epsilon, means, deviations):
    """Each position of each image over its channels: out = (x - mean) * deviation * weight + bias.

    means, deviations (1 / standard deviation): [blocks * H * chunks * TOGETHER], for the way back.
    """
    guard, blocks, number, height, width, block = sizes
    pitch, run = (width + SPARE) * block, width * block
    chunks = (run + TOGETHER - 1) // TOGETHER
    for item in prange(blocks * height * chunks):
        start, count = _chunk(item, chunks, run, guard, number, height, pitch)
        m = means[item * TOGETHER : item * TOGETHER + count]
        d = deviations[item * TOGETHER : item * TOGETHER + count]
        m[:] = 0.0
        d[:] = 0.0
        for channel in range(number):
            v = x[start + channel * height * pitch : start + channel * height * pitch + count]
            for i in range(count):
                m[i] += v[i]
        for i in range(count):
            m[i] /= number
        for channel in range(number):
            v = x[start + channel * height * pitch : start + channel * height * pitch + count]
            for i in range(count):
                d[i] += (v[i] - m[i]) * (v[i] - m[i])
        for i in range(count):
            d[i] = 1.0 / np.sqrt(d[i] / number + epsilon)
        for channel in range(number):
            place = start + channel * height * pitch
            v, y, w, b = x[place : place + count], out[place : place + count], weight[channel], bias[channel]
            for i in range(count):
                y[i] = (v[i] - m[i]) * d[i] * w + b


@kernel(parallel=True, **KERNEL)
def layer_norm_input(g, x, sizes, weight, means, deviations, sums, partial):
    """g becomes the gradient of x.

    partial[item, channel] (float64): what each share of the positions adds to the gradients of weight and bias. sums:
    room for as many numbers as two of `means`.
    """
    guard, blocks, number, height, width, block = sizes
    pitch, run = (width + SPARE) * block, width * block
    chunks = (run + TOGETHER - 1) // TOGETHER
    for item in prange(blocks * height * chunks):
        start, count = _chunk(item, chunks, run, guard, number, height, pitch)
        m = means[item * TOGETHER : item * TOGETHER + count]
        d = deviations[item * TOGETHER : item * TOGETHER + count]
        total = sums[2 * item * TOGETHER : 2 * item * TOGETHER + count]
        product = sums[(2 * item + 1) * TOGETHER : (2 * item + 1) * TOGETHER + count]
        total[:] = 0.0
        product[:] = 0.0
        for channel in range(number):
            place = start + channel * height * pitch
            v, dy, w = x[place : place + count], g[place : place + count], weight[channel]
            by_weight = by_bias = w - w
            for i in range(count):
                away = (v[i] - m[i]) * d[i]
                by_weight += dy[i] * away
                by_bias += dy[i]
                total[i] += dy[i] * w
                product[i] += dy[i] * w * away
            partial[item, channel, 0], partial[item, channel, 1] = by_weight, by_bias
        for i in range(count):
            total[i] /= number
            product[i] /= number
        for channel in range(number):
            place = start + channel * height * pitch
            v, dy, w = x[place : place + count], g[place : place + count], weight[channel]
            for i in range(count):
                dy[i] = (dy[i] * w - total[i] - (v[i] - m[i]) * d[i] * product[i]) * d[i]
