"""Convolutions of input channels that are one number an image each: outputs differ only where taps leave the image.

An output position's class, along either axis, is which taps of the kernel lie inside there. borders: (class of each
row, class of each column, [classes, taps] which rows of the kernel are inside, the same of columns). Entries are those
that read such inputs, by output channel; sizes: (guard, blocks, number of channels, H, W, block) of z; channels: those
to compute; images: [blocks, inputs, block].
"""

from __future__ import annotations

import numpy as np
from numba import prange

from sparse_lab.sparse_cpu.conv_kernels import plane_moments
from sparse_lab.sparse_cpu.kernel import KERNEL, kernel
from sparse_lab.sparse_cpu.layout_kernels import SPARE


@kernel(parallel=True, **KERNEL)
def border(
    z, sizes, channels, adds, borders, first, inner, row_taps, column_taps, values, bias, images, means, squares
):
    """z = bias + the sum of these entries, or that sum added to what is there, where adds [C] says so.

    bias: [C] or empty; means, squares: as in `conv_kernels.rows`.
    """
    guard, blocks, number, height, width, block = sizes
    row_class, column_class, row_inside, column_inside = borders
    down, right, pitch = row_inside.shape[0], column_inside.shape[0], (width + SPARE) * block
    for item in prange(blocks * channels.size):
        group, channel = item // channels.size, channels[item % channels.size]
        target = guard + (group * number + channel) * height * pitch
        start = z[0] - z[0] if bias.size == 0 or adds[channel] else bias[channel]
        table = np.full((down * right, block), start, values.dtype)
        for e in range(first[channel], first[channel + 1]):
            line = images[group, inner[e]]
            for place in range(down * right):
                if row_inside[place // right, row_taps[e]] and column_inside[place % right, column_taps[e]]:
                    for i in range(block):
                        table[place, i] += values[e] * line[i]
        for row in range(height):
            for pixel in range(width):
                place = target + row * pitch + pixel * block
                out, line = z[place : place + block], table[row_class[row] * right + column_class[pixel]]
                if adds[channel]:
                    for i in range(block):
                        out[i] += line[i]
                else:
                    for i in range(block):
                        out[i] = line[i]
        if means.size:
            place = group * number + channel
            means[place], squares[place] = plane_moments(z, target, height, width * block, pitch)


@kernel(parallel=True, **KERNEL)
def border_weight(
    g, sizes, channels, written, totals, borders, first, inner, row_taps, column_taps, images, partial, sums
):
    """partial[block, e] (float64): the gradient of entry e; sums[block, e]: that of what it reads, over its value.

    written: [C] where g is a map; totals [blocks, C, block]: its sum where it is none, and there is one class alone.
    """
    guard, blocks, number, height, width, block = sizes
    row_class, column_class, row_inside, column_inside = borders
    down, right, pitch = row_inside.shape[0], column_inside.shape[0], (width + SPARE) * block
    for item in prange(blocks * channels.size):
        group, channel = item // channels.size, channels[item % channels.size]
        source = guard + (group * number + channel) * height * pitch
        table = np.zeros((down * right, block))
        if written[channel]:
            for row in range(height):
                for pixel in range(width):
                    place = source + row * pitch + pixel * block
                    line, dy = table[row_class[row] * right + column_class[pixel]], g[place : place + block]
                    for i in range(block):
                        line[i] += dy[i]
        else:
            table[0] = totals[group, channel]
        for e in range(first[channel], first[channel + 1]):
            total, line = sums[group, e], images[group, inner[e]]
            total[:] = 0.0
            for place in range(down * right):
                if row_inside[place // right, row_taps[e]] and column_inside[place % right, column_taps[e]]:
                    for i in range(block):
                        total[i] += table[place, i]
            product = 0.0
            for i in range(block):
                product += total[i] * line[i]
            partial[group, e] = product


@kernel(parallel=True, **KERNEL)
def border_input(sums, inner, values, totals):
    """totals[block, input] (float64) += the gradient of every input, from the sums of `border_weight`."""
    blocks, number, block = sums.shape
    for group in prange(blocks):
        for e in range(number):
            total = totals[group, inner[e]]
            for i in range(block):
                total[i] += values[e] * sums[group, e, i]
