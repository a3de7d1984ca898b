"""Convolutions over live weights: forward, input gradient, weight gradient.

Two families. `rows`: stride 1, an output as large as its input, padding that the spare pixel covers; a weight is a
(value, offset) pair, and a row of outputs is a sum of rows of inputs, four weights at a time. `taps`: every other
convolution and linear layers; each weight finds the outputs for which its tap lies on the image.

All arrays are flat (`layout`). Work is shared out over (block, channel); every sum has a fixed order.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from sparse_lab.sparse_cpu.kernel import INLINED, KERNEL, kernel
from sparse_lab.sparse_cpu.layout_kernels import SPARE
from sparse_lab.sparse_cpu.simd import BYTES, DOTTED, FEW, FEWEST, LANES, dotted, few, fewest, gathered
from sparse_lab.sparse_cpu.storage import closed, opened, room

NEAR = 256 * 1024  # bytes of maps that stay in the second cache
LITTLE = 12  # entries of a channel from which on it pays to sum rows piece by piece
PIECE = 512  # bytes of a row that all channels sum before the next
LONGEST_SUM = 4096  # numbers that are added up in their own precision before float64 takes over


@njit(**INLINED)
def _set_1(z, x, start, run, o0, v0, bias):
    out, a = z[start : start + run], x[o0 : o0 + run]
    for i in range(run):
        out[i] = bias + v0 * a[i]


@njit(**INLINED)
def _set_2(z, x, start, run, o0, o1, v0, v1, bias):
    out, a, b = z[start : start + run], x[o0 : o0 + run], x[o1 : o1 + run]
    for i in range(run):
        out[i] = bias + v0 * a[i] + v1 * b[i]


@njit(**INLINED)
def _add_1(z, x, start, run, o0, v0):
    out, a = z[start : start + run], x[o0 : o0 + run]
    for i in range(run):
        out[i] += v0 * a[i]


@njit(**INLINED)
def _add_2(z, x, start, run, o0, o1, v0, v1):
    out, a, b = z[start : start + run], x[o0 : o0 + run], x[o1 : o1 + run]
    for i in range(run):
        out[i] += v0 * a[i] + v1 * b[i]


@njit(**INLINED)
def _add_4(z, x, start, run, o0, o1, o2, o3, v0, v1, v2, v3):
    out, a, b, c, d = z[start : start + run], x[o0 : o0 + run], x[o1 : o1 + run], x[o2 : o2 + run], x[o3 : o3 + run]
    for i in range(run):
        out[i] += v0 * a[i] + v1 * b[i] + v2 * c[i] + v3 * d[i]


@njit(**INLINED)
def sum_of_rows(z, start, run, x, base, offsets, values, first, last, bias, adds):
    """z[start : start + run] = bias + the sum of values[e] * x[base + offsets[e] ...], or added to what is there."""
    e = first
    if not adds:
        if last - e >= 2:
            _set_2(z, x, start, run, base + offsets[e], base + offsets[e + 1], values[e], values[e + 1], bias)
            e += 2
        elif last > e:
            _set_1(z, x, start, run, base + offsets[e], values[e], bias)
            e += 1
        else:
            z[start : start + run] = bias
    while e + 4 <= last:
        o0, o1, o2, o3 = base + offsets[e], base + offsets[e + 1], base + offsets[e + 2], base + offsets[e + 3]
        _add_4(z, x, start, run, o0, o1, o2, o3, values[e], values[e + 1], values[e + 2], values[e + 3])
        e += 4
    if e + 2 <= last:
        _add_2(z, x, start, run, base + offsets[e], base + offsets[e + 1], values[e], values[e + 1])
        e += 2
    if e < last:
        _add_1(z, x, start, run, base + offsets[e], values[e])


@njit(**INLINED)
def _row_moments(z, start, run):
    """Mean, and sum of squared deviations from it, of a run that lies in the cache."""
    row = z[start : start + run]
    total = row[0] - row[0]
    for i in range(run):
        total += row[i]
    mean = total / (total - total + run)
    squares = total - total
    for i in range(run):
        squares += (row[i] - mean) * (row[i] - mean)
    return np.float64(mean), np.float64(squares)


@njit(**INLINED)
def _merged(row, run, mean, squares, mean_here, squares_here):
    """Moments of `row` rows of `run` numbers and of one more (Chan et al. 1983)."""
    if row == 0:
        return mean_here, squares_here
    step = mean_here - mean
    return mean + step / (row + 1), squares + squares_here + run * step * step * row / (row + 1)


@njit(**INLINED)
def plane_moments(z, start, height, run, pitch):
    """Mean and sum of squared deviations of one plane: rows are merged in float64."""
    mean = squares = 0.0
    for row in range(height):
        mean_here, squares_here = _row_moments(z, start + row * pitch, run)
        mean, squares = _merged(row, run, mean, squares, mean_here, squares_here)
    return mean, squares


@njit(**INLINED)
def _rest(z, out, run, x, base, offsets, values, low, high, start, adds):
    """z[out : out + run] = start, or what is there, and the sum of the rows of x that entries [low, high) ask for."""
    done = 0
    while done + FEW // values.itemsize <= run:
        few(z, out + done, x, base + done, offsets, values, low, high, start, adds)
        done += FEW // values.itemsize
    while done + FEWEST // values.itemsize <= run:
        fewest(z, out + done, x, base + done, offsets, values, low, high, start, adds)
        done += FEWEST // values.itemsize
    if done < run:
        sums = opened(z, out + done, run - done)
        sum_of_rows(sums, 0, run - done, x, base + done, offsets, values, low, high, start, adds)
        closed(z, out + done, sums)


@kernel(parallel=True, **KERNEL)
def rows(x, z, sizes, channels, pad, first, offsets, values, bias, adds, means, squares):
    """Output rows as sums of input rows, for these channels of z. Backward: the same over gradients, by input channel.

    sizes: (x's guard, z's guard, blocks, channels of x, of z, H, W, block, rows of the kernel, threads). first: as in
    `Order`, of any number of slices. bias: [outputs] or empty. means, squares: [blocks * outputs] float64 for the
    moments of each output plane, or empty. Where channels read little, or all of x lies in the cache, a plane at a
    time; otherwise a piece of a row of all channels at a time, slice by slice, so that what they read of x lies in the
    cache.
    """
    x_guard, z_guard, blocks, inputs, outputs, height, width, block, kernel, threads = sizes
    pitch, run = (width + SPARE) * block, width * block
    plane = height * pitch
    slices = (first.size - 1) // (outputs * kernel)
    each = offsets.size // max(1, channels.size * slices)  # entries
    nothing = z[0] - z[0]
    step = BYTES // values.itemsize
    whole = run // step * step
    if slices == 1 and (each < LITTLE or inputs * plane * x.itemsize <= NEAR):
        for item in prange(blocks * channels.size):
            group, channel = item // channels.size, channels[item % channels.size]
            source = x_guard + group * inputs * plane
            target = z_guard + (group * outputs + channel) * plane
            start = nothing if bias.size == 0 else bias[channel]
            for row in range(height):
                low = first[channel * kernel + max(0, pad - row)]
                high = first[channel * kernel + min(kernel, height + pad - row)]
                base, out = source + row * pitch, target + row * pitch
                for done in range(0, whole, step):
                    gathered(z, out + done, x, base + done, offsets, values, low, high, start, adds)
                if whole < run:
                    _rest(z, out + whole, run - whole, x, base + whole, offsets, values, low, high, start, adds)
            if means.size:
                place = group * outputs + channel
                means[place], squares[place] = plane_moments(z, target, height, run, pitch)
        return
    parts = min(channels.size, max(1, 2 * threads // blocks))  # no sum depends on it
    piece = max(step, PIECE // values.itemsize)
    for item in prange(blocks * parts):
        group, part = item // parts, item % parts
        source, target = x_guard + group * inputs * plane, z_guard + group * outputs * plane
        begin, end = part * channels.size // parts, (part + 1) * channels.size // parts
        for row in range(height):
            top, bottom = max(0, pad - row), min(kernel, height + pad - row)
            for left in range(0, run, piece):
                base, right = source + row * pitch, min(left + piece, whole)
                for cut in range(slices):
                    for index in range(begin, end):
                        channel = channels[index]
                        at = (cut * outputs + channel) * kernel
                        low, high = first[at + top], first[at + bottom]
                        if cut == 0 or low < high:
                            start = nothing if bias.size == 0 else bias[channel]
                            out, more = target + channel * plane + row * pitch, adds or cut > 0
                            for done in range(left, right, step):
                                gathered(z, out + done, x, base + done, offsets, values, low, high, start, more)
                            if whole < run <= left + piece:
                                last = max(left, whole)
                                _rest(
                                    z, out + last, run - last, x, base + last, offsets, values, low, high, start, more
                                )
            if means.size:
                for index in range(begin, end):
                    place = group * outputs + channels[index]
                    found = _row_moments(z, target + channels[index] * plane + row * pitch, run)
                    means[place], squares[place] = _merged(row, run, means[place], squares[place], *found)


@njit(**INLINED)
def _dot_1(g, x, start, run, o0):
    a, b = g[start : start + run], x[o0 : o0 + run]
    total = a[0] - a[0]
    for i in range(run):
        total += a[i] * b[i]
    return np.float64(total)


@njit(**INLINED)
def _dot_4(g, x, start, run, o0, o1, o2, o3):
    a, b, c, d, e = g[start : start + run], x[o0 : o0 + run], x[o1 : o1 + run], x[o2 : o2 + run], x[o3 : o3 + run]
    s0 = s1 = s2 = s3 = a[0] - a[0]
    for i in range(run):
        s0 += a[i] * b[i]
        s1 += a[i] * c[i]
        s2 += a[i] * d[i]
        s3 += a[i] * e[i]
    return np.float64(s0), np.float64(s1), np.float64(s2), np.float64(s3)


@kernel(parallel=True, **KERNEL)
def rows_weight(x, g, sizes, channels, pad, first, offsets, partial):
    """partial[block, e] (float64): the gradient of entry e, from the gradients `g` of these output channels and `x`.

    The spare pixels of g are zero, so that rows can be multiplied together with what lies between them.
    """
    x_guard, g_guard, blocks, inputs, outputs, height, width, block, kernel, _ = sizes
    pitch = (width + SPARE) * block
    plane = height * pitch
    together = max(1, LONGEST_SUM // pitch)
    for item in prange(blocks * channels.size):
        group, channel = item // channels.size, channels[item % channels.size]
        source = x_guard + group * inputs * plane
        start = g_guard + (group * outputs + channel) * plane
        sums = partial[group]
        for tap in range(kernel):
            low, high = first[channel * kernel + tap], first[channel * kernel + tap + 1]
            top, bottom = max(0, pad - tap), min(height, height + pad - tap)
            e = low
            while e + 4 <= high:
                t0 = t1 = t2 = t3 = 0.0
                for row in range(top, bottom, together):
                    base, run = source + row * pitch, min(together, bottom - row) * pitch
                    o0, o1, o2, o3 = offsets[e], offsets[e + 1], offsets[e + 2], offsets[e + 3]
                    s0, s1, s2, s3 = _dot_4(g, x, start + row * pitch, run, base + o0, base + o1, base + o2, base + o3)
                    t0, t1, t2, t3 = t0 + s0, t1 + s1, t2 + s2, t3 + s3
                sums[e], sums[e + 1], sums[e + 2], sums[e + 3] = t0, t1, t2, t3
                e += 4
            while e < high:
                t0 = 0.0
                for row in range(top, bottom, together):
                    run = min(together, bottom - row) * pitch
                    t0 += _dot_1(g, x, start + row * pitch, run, source + row * pitch + offsets[e])
                sums[e] = t0
                e += 1


@njit(**INLINED)
def _put_together(sums, lanes, first, last, totals):
    """Add the lanes of entries [first, last) to their totals, and begin again."""
    for e in range(first, last):
        own = sums[e * lanes : (e + 1) * lanes]
        total = own[0] - own[0]
        for i in range(lanes):
            total += own[i]
            own[i] = 0.0
        totals[e] += total


@kernel(parallel=True, **KERNEL)
def rows_weight_sliced(x, g, sizes, channels, pad, first, offsets, partial):
    """As `rows_weight`, slice by slice and piece by piece, so that what is read of x lies in the cache. partial: zeros.

    What a piece gives an entry stays a vector until LONGEST_SUM numbers are added up.
    """
    x_guard, g_guard, blocks, inputs, outputs, height, width, block, kernel, threads = sizes
    pitch, run = (width + SPARE) * block, width * block
    plane = height * pitch
    real = room(g, 0).itemsize
    slices, lanes, step = (first.size - 1) // (outputs * kernel), LANES // real, DOTTED // real
    whole, piece = run // step * step, max(step, PIECE // real)
    together = max(1, LONGEST_SUM // run)
    parts = min(channels.size, max(1, 2 * threads // blocks))  # no sum depends on it
    for item in prange(blocks * parts):
        group, part = item // parts, item % parts
        source, origin = x_guard + group * inputs * plane, g_guard + group * outputs * plane
        begin, end = part * channels.size // parts, (part + 1) * channels.size // parts
        sums, totals = room(g, offsets.size * lanes), partial[group]
        sums[:] = 0.0
        for row in range(height):
            base = source + row * pitch
            top, bottom = max(0, pad - row), min(kernel, height + pad - row)
            for left in range(0, run, piece):
                for cut in range(slices):
                    for index in range(begin, end):
                        at = (cut * outputs + channels[index]) * kernel
                        low, high = first[at + top], first[at + bottom]
                        start = origin + channels[index] * plane + row * pitch
                        for done in range(left, min(left + piece, whole), step):
                            dotted(sums, g, start + done, x, base + done, offsets, low, high)
                        if whole < run <= left + piece:
                            last = max(left, whole)
                            for e in range(low, high):
                                totals[e] += _dot_1(g, x, start + last, run - last, base + last + offsets[e])
            if (row + 1) % together == 0 or row + 1 == height:
                for place in range(slices * (end - begin)):
                    at = (place // (end - begin) * outputs + channels[begin + place % (end - begin)]) * kernel
                    _put_together(sums, lanes, first[at], first[at + kernel], totals)


@njit(**INLINED)
def _span(tap, stride, pad, inside, outside):
    """Output positions [low, high) whose input position low * stride + tap - pad lies in [0, inside)."""
    low = max(0, -((tap - pad) // stride))
    high = min(outside, (inside - 1 - tap + pad) // stride + 1)
    return low, max(low, high)


@njit(**INLINED)
def _add_strided(z, start, z_step, x, begin, x_step, pixels, block, value):
    if z_step == x_step:
        _add_1(z, x, start, pixels * block, begin, value)
        return
    for pixel in range(pixels):
        out = z[start + pixel * z_step : start + pixel * z_step + block]
        a = x[begin + pixel * x_step : begin + pixel * x_step + block]
        for i in range(block):
            out[i] += value * a[i]


@njit(**INLINED)
def _dot_strided(g, start, g_step, x, begin, x_step, pixels, block):
    if g_step == x_step:
        return _dot_1(g, x, start, pixels * block, begin)
    total = 0.0
    for pixel in range(pixels):
        total += _dot_1(g, x, start + pixel * g_step, block, begin + pixel * x_step)
    return total


@kernel(parallel=True, **KERNEL)
def taps(
    x, z, sizes, channels, stride, pad, dilation, first, inner, row_taps, column_taps, values, bias, means, squares
):
    """z = bias + conv(x) for any stride, padding and dilation.

    sizes: (blocks, block, inputs, H, W, x's guard, outputs, H', W', z's guard). channels: those of z to compute. first:
    where the entries of each output channel begin.
    """
    blocks, block, inputs, height, width, x_guard, outputs, out_height, out_width, z_guard = sizes
    pitch, out_pitch = (width + SPARE) * block, (out_width + SPARE) * block
    for item in prange(blocks * channels.size):
        group, channel = item // channels.size, channels[item % channels.size]
        target = z_guard + (group * outputs + channel) * out_height * out_pitch
        start = z[0] - z[0] if bias.size == 0 else bias[channel]
        sums = opened(z, target, out_height * out_pitch)
        for row in range(out_height):
            sums[row * out_pitch : row * out_pitch + out_width * block] = start
        for e in range(first[channel], first[channel + 1]):
            source = x_guard + (group * inputs + inner[e]) * height * pitch
            down, right = row_taps[e] * dilation[0], column_taps[e] * dilation[1]
            top, bottom = _span(down, stride[0], pad[0], height, out_height)
            left, end = _span(right, stride[1], pad[1], width, out_width)
            for row in range(top, bottom):
                begin = source + (row * stride[0] + down - pad[0]) * pitch + (left * stride[1] + right - pad[1]) * block
                out = row * out_pitch + left * block
                _add_strided(sums, out, block, x, begin, stride[1] * block, end - left, block, values[e])
        closed(z, target, sums)
        if means.size:
            place = group * outputs + channel
            means[place], squares[place] = plane_moments(z, target, out_height, out_width * block, out_pitch)


@kernel(parallel=True, **KERNEL)
def taps_input(g, y, sizes, channels, stride, pad, dilation, first, inner, row_taps, column_taps, values, adds):
    """y = the gradient of the inputs, or added to what is there; sizes as in `taps`, entries by input channel."""
    blocks, block, inputs, height, width, y_guard, outputs, out_height, out_width, g_guard = sizes
    pitch, out_pitch = (width + SPARE) * block, (out_width + SPARE) * block
    for item in prange(blocks * channels.size):
        group, channel = item // channels.size, channels[item % channels.size]
        target = y_guard + (group * inputs + channel) * height * pitch
        sums = opened(y, target, height * pitch)
        if not adds:
            sums[:] = 0.0
        for e in range(first[channel], first[channel + 1]):
            source = g_guard + (group * outputs + inner[e]) * out_height * out_pitch
            down, right = row_taps[e] * dilation[0], column_taps[e] * dilation[1]
            top, bottom = _span(down, stride[0], pad[0], height, out_height)
            left, end = _span(right, stride[1], pad[1], width, out_width)
            for row in range(top, bottom):
                out = (row * stride[0] + down - pad[0]) * pitch + (left * stride[1] + right - pad[1]) * block
                begin = source + row * out_pitch + left * block
                _add_strided(sums, out, stride[1] * block, g, begin, block, end - left, block, values[e])
        closed(y, target, sums)


@kernel(parallel=True, **KERNEL)
def taps_weight(x, g, sizes, channels, stride, pad, dilation, first, inner, row_taps, column_taps, partial):
    """partial[block, e] (float64): the gradient of entry e; entries by output channel."""
    blocks, block, inputs, height, width, x_guard, outputs, out_height, out_width, g_guard = sizes
    pitch, out_pitch = (width + SPARE) * block, (out_width + SPARE) * block
    for item in prange(blocks * channels.size):
        group, channel = item // channels.size, channels[item % channels.size]
        origin = g_guard + (group * outputs + channel) * out_height * out_pitch
        for e in range(first[channel], first[channel + 1]):
            source = x_guard + (group * inputs + inner[e]) * height * pitch
            down, right = row_taps[e] * dilation[0], column_taps[e] * dilation[1]
            top, bottom = _span(down, stride[0], pad[0], height, out_height)
            left, end = _span(right, stride[1], pad[1], width, out_width)
            total = 0.0
            for row in range(top, bottom):
                begin = source + (row * stride[0] + down - pad[0]) * pitch + (left * stride[1] + right - pad[1]) * block
                start = origin + row * out_pitch + left * block
                total += _dot_strided(g, start, block, x, begin, stride[1] * block, end - left, block)
            partial[group, e] = total


@kernel(parallel=True, **KERNEL)
def channel_sums(g, guard, blocks, number, height, width, block, channels, partial):
    """partial[block, c] (float64): the sum over each plane of these of the `number` channels."""
    pitch, run = (width + SPARE) * block, width * block
    for item in prange(blocks * channels.size):
        group, channel = item // channels.size, channels[item % channels.size]
        total = 0.0
        for row in range(height):
            start = guard + ((group * number + channel) * height + row) * pitch
            line = g[start : start + run]
            here = line[0] - line[0]
            for i in range(run):
                here += line[i]
            total += here
        partial[group, channel] = total


@kernel(parallel=True, **KERNEL)
def moments(x, guard, planes, height, width, block, means, squares):
    """means, squares [planes] (float64): the mean of each plane, and the sum of squared deviations from it."""
    pitch = (width + SPARE) * block
    for plane in prange(planes):
        start = guard + plane * height * pitch
        means[plane], squares[plane] = plane_moments(x, start, height, width * block, pitch)
