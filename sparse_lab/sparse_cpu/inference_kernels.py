"""One call from images to logits: every operation of a network on live weights, in memory that each thread keeps.

A program is a table of operations (columns below) over one arena of numbers. A feature map in it is [channels]
[height + spare][width + spare][lanes]: `lanes` images side by side, spare pixels that are always zero, and as many zero
pixels in front, so that a tap beyond any edge reads zeros and a whole strip of rows is one run without a branch.
Columns hold pixels; times `lanes` they are numbers, as the weights' `offsets` are from the start.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from sparse_lab.sparse_cpu.kernel import kernel
from sparse_lab.sparse_cpu.simd import TILES, VECTOR, copied_run, pooled_run, weighted_run, weighted_tile

LANES = VECTOR  # images side by side in a batch; a single image has one lane, and its vectors run along the rows
KERNEL: dict[str, Any] = {
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
}
INLINED = {**KERNEL, "forceinline": True}

SHAPES = np.array(TILES, dtype=np.int64)  # which shapes of tiles there are: the first that fits is taken

CONV, SPLIT, MAX_POOL, AVERAGE_POOL = range(4)
RELU, RELU6 = 1, 2
(
    KIND,
    SRC,  # first pixel of channel 0
    SRC_HEIGHT,
    SRC_WIDTH,
    SRC_PITCH,  # pixels from one row to the next
    SRC_PLANE,  # pixels from one channel to the next
    DST,
    DST_HEIGHT,
    DST_WIDTH,
    DST_PITCH,
    DST_PLANE,
    DST_GUARD,  # zero pixels in front of channel 0
    CHANNELS,
    ROWS,  # in `table`: where a channel's weights begin (one more than channels); for a pool: the channel it reads
    BIAS,  # in `floats`
    MAPS,  # in `table`: where in `floats` a channel's bias map begins, or -1; -1 when no channel has one. Its rows lie
    # as the source's do
    RESIDUAL,  # first pixel, or -1
    RESIDUAL_PITCH,
    RESIDUAL_PLANE,
    RESIDUAL_ROWS,  # in `table`: the channel to add, or -1
    ACTIVATION,
    POOLED,  # 1: the largest of each 2x2 of the convolution's outputs is stored
    STRIP,  # rows of outputs at a time with one lane; even when pooled
    WINDOW,  # first of six: kernel, stride and padding, down and across
    COST,  # multiply-adds of one image, roughly
    DIRECT,  # 1: with one lane rows of sums are rows of outputs and can be written where they belong
    SHOWN,  # in `floats`, if DIRECT: 1 for each pixel of a channel, 0 for the spare ones
) = (*range(24), 30, 31, 32)
COLUMNS = 33


@njit(**INLINED)
def _zero_columns(op, arena, channel, lanes):  # type: ignore[no-untyped-def]
    """The spare pixels at the end of a channel's rows."""
    row = (op[DST] + channel * op[DST_PLANE]) * lanes
    n, whole = op[DST_WIDTH] * lanes, op[DST_PITCH] * lanes
    for _ in range(op[DST_HEIGHT]):
        for i in range(row + n, row + whole):
            arena[i] = 0.0
        row += whole


@njit(**INLINED)
def _zero_below(op, arena, channel, lanes):  # type: ignore[no-untyped-def]
    """The spare rows of one channel, and the pixels in front of the first channel."""
    plane = (op[DST] + channel * op[DST_PLANE]) * lanes
    for i in range(plane + op[DST_HEIGHT] * op[DST_PITCH] * lanes, plane + op[DST_PLANE] * lanes):
        arena[i] = 0.0
    if channel == 0:
        for i in range(plane - op[DST_GUARD] * lanes, plane):
            arena[i] = 0.0


@njit(**INLINED)
def _own(op, channel, y, x, table):  # type: ignore[no-untyped-def]
    """Where the bias map of a channel has its pixel (y, x), -1 where there is none."""
    place = table[op[MAPS] + channel] if op[MAPS] >= 0 else -1
    return place + y * op[SRC_PITCH] + x if place >= 0 else -1


@njit(**INLINED)
def _addend(op, channel, y, x, lanes, table):  # type: ignore[no-untyped-def]
    """Where pixel (y, x) of the residual of a channel begins, -1 where nothing is added."""
    added = table[op[RESIDUAL_ROWS] + channel] if op[RESIDUAL] >= 0 else -1
    pixel = op[RESIDUAL] + added * op[RESIDUAL_PLANE] + y * op[RESIDUAL_PITCH] + x
    return pixel * lanes if added >= 0 else -1


@njit(**INLINED)
def _bounds(op):  # type: ignore[no-untyped-def]
    low = np.float32(0.0) if op[ACTIVATION] else np.float32(-np.inf)
    high = np.float32(6.0) if op[ACTIVATION] == RELU6 else np.float32(np.inf)
    return low, high


@njit(**INLINED)
def _tile(op, arena, shape, y, x, first, last, table, offsets, values, floats):  # type: ignore[no-untyped-def]
    """The outputs of a few pixels in all channels, from inputs that stay in the cache meanwhile."""
    low, high = _bounds(op)
    scale = 2 if op[POOLED] else 1
    base, across = (op[SRC] + y * op[SRC_PITCH] + x) * LANES, op[SRC_PITCH] * LANES
    to, pitch = (op[DST] + y // scale * op[DST_PITCH] + x // scale) * LANES, op[DST_PITCH] * LANES
    for channel in range(first, last):
        begin, end = table[op[ROWS] + channel], table[op[ROWS] + channel + 1]
        at = to + channel * op[DST_PLANE] * LANES
        own, addend = _own(op, channel, y, x, table), _addend(op, channel, y, x, LANES, table)
        bias, beyond = floats[op[BIAS] + channel], op[RESIDUAL_PITCH] * LANES
        weighted_tile(
            shape, arena, at, pitch, arena, base, across, offsets, values, begin, end,
            bias, addend, beyond, floats, own, op[SRC_PITCH], low, high,
        )  # fmt: skip


@njit(**INLINED)
def _conv_batch(op, arena, first, last, table, offsets, values, floats):  # type: ignore[no-untyped-def]
    scale = 2 if op[POOLED] else 1
    height, width = scale * op[DST_HEIGHT], scale * op[DST_WIDTH]
    shape = y = x = 0
    while y < height:
        rows, columns, pooled = SHAPES[shape]
        if pooled != op[POOLED] or y + rows > height or x + columns > width:
            shape += 1
            continue
        _tile(op, arena, shape, y, x, first, last, table, offsets, values, floats)
        x += columns
        if x == width:
            x, y = 0, y + rows
        shape = 0
    for channel in range(first, last):
        _zero_columns(op, arena, channel, LANES)
        _zero_below(op, arena, channel, LANES)


@njit(**INLINED)
def _conv_direct(op, arena, first, last, table, offsets, values, floats):  # type: ignore[no-untyped-def]
    """One image, whose rows of sums lie as those of the outputs do: spare pixels are written with the others."""
    low, high = _bounds(op)
    height, pitch = op[DST_HEIGHT], op[DST_PITCH]
    for y in range(0, height, op[STRIP]):
        rows = min(op[STRIP], height - y)
        n = rows * pitch if y + rows < height else (rows - 1) * pitch + op[DST_WIDTH]
        for channel in range(first, last):
            begin, end = table[op[ROWS] + channel], table[op[ROWS] + channel + 1]
            row = op[DST] + channel * op[DST_PLANE] + y * pitch
            own, addend = _own(op, channel, y, 0, table), _addend(op, channel, y, 0, 1, table)
            base, shown = op[SRC] + y * pitch, op[SHOWN] + y * pitch
            bias = floats[op[BIAS] + channel]
            weighted_run(
                arena, row, n, arena, base, offsets, values, begin, end, bias, addend, floats, own, shown, low, high
            )
            if y + rows == height:
                for i in range(row + n, row - y * pitch + op[DST_PLANE]):
                    arena[i] = 0.0
    if first == 0:
        _zero_below(op, arena, first, 1)


@njit(**INLINED)
def _finish(op, arena, z, channel, y, rows, table):  # type: ignore[no-untyped-def]
    """Residual and activation of `rows` rows of a channel of one image from row `y` on: sums `z` into place."""
    low, high = _bounds(op)
    for r in range(rows):
        row = op[DST] + channel * op[DST_PLANE] + (y + r) * op[DST_PITCH]
        sums, addend = z[r * op[SRC_PITCH] :], _addend(op, channel, y + r, 0, 1, table)
        for i in range(op[DST_WIDTH]):
            value = sums[i] + arena[addend + i] if addend >= 0 else sums[i]
            value = value if value > low else low
            arena[row + i] = value if value < high else high


@njit(**INLINED)
def _conv_one(op, arena, z, first, last, table, offsets, values, floats):  # type: ignore[no-untyped-def]
    """One image, whose rows of sums are pooled, or lie in another way than those of the outputs."""
    low, high = _bounds(op)
    least = np.float32(-np.inf)
    scale = 2 if op[POOLED] else 1
    height, width, pitch = scale * op[DST_HEIGHT], scale * op[DST_WIDTH], op[SRC_PITCH]
    for y in range(0, height, op[STRIP]):
        rows = min(op[STRIP], height - y)
        n, base = (rows - 1) * pitch + width, op[SRC] + y * pitch
        for channel in range(first, last):
            begin, end = table[op[ROWS] + channel], table[op[ROWS] + channel + 1]
            bias, own = floats[op[BIAS] + channel], _own(op, channel, y, 0, table)
            if op[POOLED]:
                weighted_run(z, 0, n, arena, base, offsets, values, begin, end, bias, -1, floats, own, -1, low, high)
                row = op[DST] + channel * op[DST_PLANE] + (y // 2) * op[DST_PITCH]
                for r in range(0, rows, 2):
                    pooled_run(arena, row, z, r * pitch, (r + 1) * pitch, op[DST_WIDTH])
                    row += op[DST_PITCH]
            else:
                weighted_run(
                    z, 0, n, arena, base, offsets, values, begin, end, bias, -1, floats, own, -1, least, -least
                )
                _finish(op, arena, z, channel, y, rows, table)
    for channel in range(first, last):
        _zero_columns(op, arena, channel, 1)
        _zero_below(op, arena, channel, 1)


@njit(**INLINED)
def _conv(op, arena, z, first, last, lanes, table, offsets, values, floats):  # type: ignore[no-untyped-def]
    if lanes == LANES:
        _conv_batch(op, arena, first, last, table, offsets, values, floats)
    elif op[DIRECT]:
        _conv_direct(op, arena, first, last, table, offsets, values, floats)
    else:
        _conv_one(op, arena, z, first, last, table, offsets, values, floats)


@njit(**INLINED)
def _split(op, arena, first, last, lanes):  # type: ignore[no-untyped-def]
    """Channel c into one channel for each phase of the stride: pixel (s y + i, s x + j) to (y, x) of phase (i, j)."""
    down, across = op[WINDOW + 2], op[WINDOW + 3]
    for channel in range(first, last):
        source = op[SRC] + (channel // (down * across)) * op[SRC_PLANE]
        i, j = channel // across % down, channel % across
        for y in range(op[DST_HEIGHT]):
            row = (op[DST] + channel * op[DST_PLANE] + y * op[DST_PITCH]) * lanes
            for spot in range(row, row + op[DST_PITCH] * lanes):
                arena[spot] = 0.0
            if y * down + i >= op[SRC_HEIGHT]:
                continue
            pixel = source + (y * down + i) * op[SRC_PITCH] + j
            count = (op[SRC_WIDTH] - j + across - 1) // across
            if lanes == 1:
                to, a = arena[row : row + count], arena[pixel:]
                for x in range(count):
                    to[x] = a[x * across]
            else:
                copied_run(arena, row, arena, pixel * LANES, across, count)
        _zero_below(op, arena, channel, lanes)


@njit(**INLINED)
def _max_pool(op, arena, first, last, lanes, table):  # type: ignore[no-untyped-def]
    window = op[WINDOW : WINDOW + 6]
    for channel in range(first, last):
        source = op[SRC] + table[op[ROWS] + channel] * op[SRC_PLANE]
        for y in range(op[DST_HEIGHT]):
            row = (op[DST] + channel * op[DST_PLANE] + y * op[DST_PITCH]) * lanes
            arena[row : row + op[DST_PITCH] * lanes] = 0.0
            top = y * window[2] - window[4]
            for x in range(op[DST_WIDTH]):
                to = arena[row + x * lanes : row + (x + 1) * lanes]
                to[:] = -np.inf
                left = x * window[3] - window[5]
                for v in range(max(0, top), min(op[SRC_HEIGHT], top + window[0])):
                    for u in range(max(0, left), min(op[SRC_WIDTH], left + window[1])):
                        pixel = (source + v * op[SRC_PITCH] + u) * lanes
                        a = arena[pixel : pixel + lanes]
                        for lane in range(lanes):
                            to[lane] = a[lane] if a[lane] > to[lane] else to[lane]
        _zero_below(op, arena, channel, lanes)


@njit(**INLINED)
def _average_pool(op, arena, first, last, lanes, table):  # type: ignore[no-untyped-def]
    for channel in range(first, last):
        source = op[SRC] + table[op[ROWS] + channel] * op[SRC_PLANE]
        for y in range(op[DST_HEIGHT]):
            row = (op[DST] + channel * op[DST_PLANE] + y * op[DST_PITCH]) * lanes
            arena[row : row + op[DST_PITCH] * lanes] = 0.0
            top, bottom = y * op[SRC_HEIGHT] // op[DST_HEIGHT], -(-(y + 1) * op[SRC_HEIGHT] // op[DST_HEIGHT])
            for x in range(op[DST_WIDTH]):
                left, right = x * op[SRC_WIDTH] // op[DST_WIDTH], -(-(x + 1) * op[SRC_WIDTH] // op[DST_WIDTH])
                to = arena[row + x * lanes : row + (x + 1) * lanes]
                share = np.float32(1.0 / ((bottom - top) * (right - left)))
                for v in range(top, bottom):
                    for u in range(left, right):
                        pixel = (source + v * op[SRC_PITCH] + u) * lanes
                        a = arena[pixel : pixel + lanes]
                        for lane in range(lanes):
                            to[lane] += share * a[lane]
        _zero_below(op, arena, channel, lanes)


@njit(**INLINED)
def _perform(op, arena, z, first, last, lanes, table, offsets, values, floats):  # type: ignore[no-untyped-def]
    """One operation on its channels from `first` to before `last`."""
    if op[KIND] == CONV:
        _conv(op, arena, z, first, last, lanes, table, offsets, values, floats)
    elif op[KIND] == SPLIT:
        _split(op, arena, first, last, lanes)
    elif op[KIND] == MAX_POOL:
        _max_pool(op, arena, first, last, lanes, table)
    else:
        _average_pool(op, arena, first, last, lanes, table)


@njit(**KERNEL)
def _pack(images, start, there, place, arena, lanes):  # type: ignore[no-untyped-def]
    """`there` images from number `start` on into the arena; lanes without an image are zero. `place`: as DST ..."""
    first, height, width, pitch, plane, guard, channels = place
    arena[(first - guard) * lanes : (first + channels * plane) * lanes] = 0.0
    for lane in range(there):
        for channel in range(channels):
            for y in range(height):
                pixels = images[start + lane, channel, y]
                row = arena[(first + channel * plane + y * pitch) * lanes + lane :]
                if lanes == 1:
                    row[:width] = pixels
                else:
                    for x in range(width):
                        row[x * lanes] = pixels[x]


@njit(**KERNEL)
def _unpack(made, start, there, place, arena, lanes):  # type: ignore[no-untyped-def]
    """The last map of `there` images out of the arena. `place`: its first pixel, pitch and plane."""
    first, pitch, plane = place
    for lane in range(there):
        for channel in range(made.shape[1]):
            for y in range(made.shape[2]):
                row = arena[(first + channel * plane + y * pitch) * lanes + lane :]
                to = made[start + lane, channel, y]
                if lanes == 1:
                    to[:] = row[: to.size]
                else:
                    for x in range(to.size):
                        to[x] = row[x * lanes]


@kernel(parallel=True, **KERNEL)
def run_blocks(images, made, arenas, sums, lanes, place, end, ops, table, offsets, values, floats):  # type: ignore[no-untyped-def]
    """Blocks of `lanes` images, each from its first layer to its last by one thread in an arena of its own.

    images, made float32 [N, channels, height, width]; arenas, sums float32 [threads, ...];
    place: DST, DST_HEIGHT ... DST_GUARD, CHANNELS of the images' map; end: first pixel, pitch, plane of the last map.
    """
    zero = np.int64(0)  # 0 itself is a type of its own, for which all that is called is compiled once more
    count, threads = images.shape[0], arenas.shape[0]
    blocks = (count + lanes - 1) // lanes
    for thread in prange(threads):
        for block in range(thread, blocks, threads):
            there = min(lanes, count - block * lanes)
            _pack(images, block * lanes, there, place, arenas[thread], lanes)
            for k in range(len(ops)):
                channels = ops[k, CHANNELS]
                _perform(ops[k], arenas[thread], sums[thread], zero, channels, lanes, table, offsets, values, floats)
            _unpack(made, block * lanes, there, end, arenas[thread], lanes)


@kernel(parallel=True, **KERNEL)
def run_layers(images, made, arenas, sums, lanes, place, end, ops, table, offsets, values, floats, shares, alone):  # type: ignore[no-untyped-def]
    """The same for one block, whose threads share each operation's channels: `shares` int64 [ops, threads + 1] says
    who gets which. An operation that costs less than `alone` is not worth waking others for.
    """
    zero = np.int64(0)  # see run_blocks
    threads = sums.shape[0]
    arena = arenas[0]
    _pack(images, zero, images.shape[0], place, arena, lanes)
    for k in range(len(ops)):
        if threads == 1 or ops[k, COST] * lanes < alone:
            _perform(ops[k], arena, sums[0], zero, ops[k, CHANNELS], lanes, table, offsets, values, floats)
        else:
            for thread in prange(threads):
                first, last = shares[k, thread], shares[k, thread + 1]
                _perform(ops[k], arena, sums[thread], first, last, lanes, table, offsets, values, floats)
    _unpack(made, zero, images.shape[0], end, arena, lanes)
