"""What is one number for each image in each channel, [blocks, C, block]: written into maps, and added up from them.

sizes: (guard, blocks, number of channels, H, W, block) of a map; channels: those to compute. Sums are kept side by side
for the images of a few pixels and put together in float64, in an order that is always the same.
"""

from __future__ import annotations

from numba import njit, prange

from sparse_lab.sparse_cpu.kernel import INLINED, KERNEL, kernel
from sparse_lab.sparse_cpu.layout_kernels import SPARE
from sparse_lab.sparse_cpu.storage import room

Z, RESIDUAL, BOTH = 1, 2, 3  # what of a normalised map with a residual is a map itself
TOGETHER = 256  # numbers of a row that are taken at a time: several arrays of as many stay in the fastest cache


@njit(**INLINED)
def lanes(block, width):
    """Images, and pixels of a row, that are taken together; and how many times images are."""
    images = min(block, TOGETHER)
    return images, max(1, min(width, TOGETHER // images)), (block + images - 1) // images


@njit(**INLINED)
def repeat(tile, place, numbers, count, pixels):
    """The `count` numbers side by side, `pixels` times, at row `place` of the tile."""
    for pixel in range(pixels):
        start = place * TOGETHER + pixel * count
        line = tile[start : start + count]
        for i in range(count):
            line[i] = numbers[i]


@njit(**INLINED)
def folded(tile, place, count, pixels, out):
    """out = the sums at row `place` of the tile, over pixels."""
    for pixel in range(pixels):
        start = place * TOGETHER + pixel * count
        line = tile[start : start + count]
        if pixel == 0:
            for i in range(count):
                out[i] = line[i]
        else:
            for i in range(count):
                out[i] += line[i]


@kernel(parallel=True, **KERNEL)
def spread(y, sizes, channels, numbers, adds):
    """y = the number of each image in all of its pixels, or added to what is there."""
    guard, blocks, number, height, width, block = sizes
    pitch = (width + SPARE) * block
    for item in prange(blocks * channels.size):
        group, channel = item // channels.size, channels[item % channels.size]
        start = guard + (group * number + channel) * height * pitch
        line = numbers[group, channel]
        for row in range(height):
            for pixel in range(width):
                place = start + row * pitch + pixel * block
                a = y[place : place + block]
                if adds:
                    for i in range(block):
                        a[i] += line[i]
                else:
                    for i in range(block):
                        a[i] = line[i]


@njit(**INLINED)
def _total(x, m, tile):
    for i in range(x.size):
        tile[i] += x[i] - m


@kernel(parallel=True, **KERNEL)
def away(x, sizes, channels, mean, out):
    """out[block, channel] (float64): x - mean, averaged over the positions of each image."""
    guard, blocks, number, height, width, block = sizes
    pitch = (width + SPARE) * block
    images, pixels, groups = lanes(block, width)
    for item in prange(blocks * channels.size):
        group, channel = item // channels.size, channels[item % channels.size]
        start = guard + (group * number + channel) * height * pitch
        tile = room(x, TOGETHER)
        for lane in range(0, groups * images, images):
            count = min(images, block - lane)
            tile[:] = 0.0
            for row in range(height):
                for pixel in range(0, width, pixels):
                    place = start + row * pitch + pixel * block + lane
                    run = min(pixels, width - pixel) * count
                    _total(x[place : place + run], mean[channel], tile)
            sums = out[group, channel, lane : lane + count]
            folded(tile, 0, count, pixels, sums)
            for i in range(count):
                sums[i] /= height * width


@kernel(parallel=True, **KERNEL)
def totals(g, sizes, channels, out):
    """out[block, channel] (float64): g added up over the positions of each image."""
    guard, blocks, number, height, width, block = sizes
    pitch = (width + SPARE) * block
    images, pixels, groups = lanes(block, width)
    for item in prange(blocks * channels.size):
        group, channel = item // channels.size, channels[item % channels.size]
        start = guard + (group * number + channel) * height * pitch
        tile = room(g, TOGETHER)
        tile[:] = 0.0
        zero = tile[0]
        for lane in range(0, groups * images, images):
            count = min(images, block - lane)
            tile[:] = 0.0
            for row in range(height):
                for pixel in range(0, width, pixels):
                    place = start + row * pitch + pixel * block + lane
                    run = min(pixels, width - pixel) * count
                    _total(g[place : place + run], zero, tile)
            folded(tile, 0, count, pixels, out[group, channel, lane : lane + count])


@njit(**INLINED)
def _sums(g, x, m, tile):
    for i in range(g.size):
        tile[i] += g[i]
        tile[TOGETHER + i] += g[i] * (x[i] - m)


@kernel(parallel=True, **KERNEL)
def products(g, x, sizes, channels, mean, out, product):
    """As `totals`; product[block, channel] (float64): g * (x - mean) added up over the positions of each image."""
    guard, blocks, number, height, width, block = sizes
    pitch = (width + SPARE) * block
    images, pixels, groups = lanes(block, width)
    for item in prange(blocks * channels.size):
        group, channel = item // channels.size, channels[item % channels.size]
        start = guard + (group * number + channel) * height * pitch
        tile = room(g, 2 * TOGETHER)
        for lane in range(0, groups * images, images):
            count = min(images, block - lane)
            tile[:] = 0.0
            for row in range(height):
                for pixel in range(0, width, pixels):
                    place = start + row * pitch + pixel * block + lane
                    run = min(pixels, width - pixel) * count
                    _sums(g[place : place + run], x[place : place + run], mean[channel], tile)
            folded(tile, 0, count, pixels, out[group, channel, lane : lane + count])
            folded(tile, 1, count, pixels, product[group, channel, lane : lane + count])


@njit(**INLINED)
def _through(g, z, tile, m, s, p):
    for i in range(g.size):
        z[i] = s * g[i] + tile[i] - p * (z[i] - m)


@njit(**INLINED)
def _through_in_place(g, z, tile, m, s, p):
    for i in range(g.size):
        g[i] = s * g[i] + tile[i] - p * (z[i] - m)


@njit(**INLINED)
def _through_alone(z, tile, m, p):
    for i in range(z.size):
        z[i] = tile[i] - p * (z[i] - m)


@njit(**INLINED)
def _through_alone_in_place(g, z, tile, m, p):
    for i in range(g.size):
        g[i] = tile[i] - p * (z[i] - m)


@kernel(parallel=True, **KERNEL)
def through(g, z, sizes, channels, written, mean, scale, by_product, even, over_z):
    """scale * g + even - by_product * (z - mean), in place of z or of g; even: [blocks, C, block].

    written: [C] where g is anything but zero.
    """
    guard, blocks, number, height, width, block = sizes
    pitch = (width + SPARE) * block
    images, pixels, groups = lanes(block, width)
    for item in prange(blocks * channels.size):
        group, channel = item // channels.size, channels[item % channels.size]
        start = guard + (group * number + channel) * height * pitch
        tile = room(z, TOGETHER)
        m, s, p = mean[channel], scale[channel], by_product[channel]
        for lane in range(0, groups * images, images):
            count = min(images, block - lane)
            repeat(tile, 0, even[group, channel, lane : lane + count], count, pixels)
            for row in range(height):
                for pixel in range(0, width, pixels):
                    place = start + row * pitch + pixel * block + lane
                    run = min(pixels, width - pixel) * count
                    x, dy = z[place : place + run], g[place : place + run]
                    if over_z and written[channel]:
                        _through(dy, x, tile, m, s, p)
                    elif over_z:
                        _through_alone(x, tile, m, p)
                    elif written[channel]:
                        _through_in_place(dy, x, tile, m, s, p)
                    else:
                        _through_alone_in_place(dy, x, tile, m, p)
