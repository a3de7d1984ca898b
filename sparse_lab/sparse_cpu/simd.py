"""The innermost loop of sparse arithmetic, written for the vector registers: one run of outputs from many weights.

Numba compiles a loop over weights inside a loop over pixels to code that carries every sum through the cache. Here up
to 96 sums stay in registers while all weights of the run go by, so that a weight costs one load and one multiply-add
for each vector. LLVM makes AVX2, AVX-512 or NEON of it, whatever the machine has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sparse_lab.sparse_cpu.storage import HALF, narrowed, widened

VECTOR = 8  # numbers; where a register holds fewer, LLVM takes several for it
# of sums at a time: 8 registers of AVX-512 or AVX2, 16 of NEON. Fewer would wait for each other; where there are no
# more, `few` and `fewest` take several weights at a time, each with sums of its own
BYTES = 512 if get_host_cpu_features().get("avx512f") else 256
FEW, FEWEST = 128, 64
MOST = 12  # vectors of sums at a time in `weighted_run`: with a weight beside them they fill the registers of AVX2
CHAINED = 8  # vectors of sums at a time at least, where there are weights enough
# rows and columns of sums at a time in `weighted_tile`, and whether they are pooled
PLAIN = tuple((rows, columns, False) for rows in (2, 1) for columns in (4, 2, 1))
TILES = (*PLAIN, (2, 4, True), (2, 2, True))
FLAGS = ("contract", "nsz", "reassoc")
Pointers = Callable[[], list[Any]]
Source = tuple[Any, Pointers]


@intrinsic
def weighted_run(  # type: ignore[no-untyped-def]
    typing, out, at, n, x, base, offsets, values, first, last, start, addend, floats, own, shown, low, high
):
    """out[at + i] = clamp(start + x[addend + i] + sum over e in [first, last) of values[e] * x[base + offsets[e] + i],
    low, high) for i in [0, n), n rounded up to a multiple of 8: all arrays must reach so far. addend -1: none; own:
    floats[own + i] in place of start, or -1; shown: 0 where floats[shown + i] is 0, or -1.

    out, x, values, floats: contiguous, of one floating type; offsets: contiguous int32; low <= high.
    """
    index, real = types.intp, values.dtype
    numbers = (out, index, index, x, index, offsets, values, index, index)
    return types.void(*numbers, real, index, floats, index, index, real, real), _generate


def _generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    out, x, offsets, values, floats = _data(context, builder, signature, arguments, (0, 3, 5, 6, 11))
    at, n, base, first, last, start, addend, own, shown, low, high = (
        arguments[place] for place in (1, 2, 4, *range(7, 11), *range(12, 16))
    )
    index, zero = n.type, ir.Constant(n.type, 0)
    vectors = builder.lshr(builder.add(n, ir.Constant(index, VECTOR - 1)), ir.Constant(index, 3))
    place = cgutils.alloca_once_value(builder, zero)
    bounds = [_spread(builder, number) for number in (start, low, high)]
    more, done = builder.append_basic_block("more"), builder.append_basic_block("done")
    builder.branch(more)
    builder.position_at_end(more)
    here = builder.load(place)
    # the widest tile as often as it fits, then one that is as wide as the rest
    cases = [zero, *(ir.Constant(index, tile) for tile in range(1, MOST))]
    _, *bodies = _switch(builder, builder.sub(vectors, here), cases, done)
    for tile, body in enumerate(bodies, 1):
        builder.position_at_end(body)

        def pixels(numbers: Any, begin: Any, count: int = tile) -> Pointers:
            first = builder.add(begin, builder.shl(here, ir.Constant(index, 3)))
            return partial(_grid, builder, (numbers, first, zero), (1, count))

        starts = _starts(builder, bounds[0], tile, (own, pixels(floats, own)), (addend, pixels(x, addend)))
        source = builder.gep(x, [builder.add(base, builder.shl(here, ir.Constant(index, 3)))])
        sums = _tile(builder, [(source, tile)], (offsets, values, first, last), starts)
        sums = [_clamped(builder, total, *bounds[1:]) for total in sums]
        _store_all(builder, _shown(builder, sums, shown, pixels(floats, shown)), pixels(out, at)())
        builder.store(builder.add(here, ir.Constant(index, tile)), place)
        builder.branch(more if tile == MOST else done)
    builder.position_at_end(done)
    return context.get_dummy_value()


@intrinsic
def weighted_tile(  # type: ignore[no-untyped-def]
    typing, shape, out, at, pitch, x, base, across, offsets, values, first, last, start, addend, beyond, floats, own,
    below, low, high
):  # fmt: skip
    """The same for a few pixels [8]: `shape` is a number of TILES, which says how many rows and columns. Rows lie
    `pitch` apart in out, `across` in the inputs, `beyond` in the addend; own: from floats[own] on one number a pixel,
    rows `below` apart, in place of start. Where TILES says so, the largest of each 2x2 of pixels is written instead.
    """
    index, real = types.intp, values.dtype
    numbers = (index, out, index, index, x, index, index, offsets, values, index, index)
    return types.void(*numbers, real, index, index, floats, index, index, real, real), _generate_tile


def _generate_tile(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    out, x, offsets, values, floats = _data(context, builder, signature, arguments, (1, 4, 7, 8, 14))
    shape, at, pitch, base, across, first, last, start, addend, beyond, own, below, low, high = (
        arguments[place] for place in (0, 2, 3, 5, 6, *range(9, 14), *range(15, 19))
    )
    bounds = [_spread(builder, number) for number in (start, low, high)]
    done = builder.append_basic_block("done")
    bodies = _switch(builder, shape, [ir.Constant(shape.type, number) for number in range(len(TILES) - 1)])
    for (rows, columns, pooled), body in zip(TILES, bodies, strict=True):
        builder.position_at_end(body)
        size = rows, columns
        starts = _starts(
            builder,
            bounds[0],
            rows * columns,
            (own, partial(_grid, builder, (floats, own, below), size, 1)),
            (addend, partial(_grid, builder, (x, addend, beyond), size)),
        )
        sources = [(line, columns) for line in _grid(builder, (x, base, across), (rows, 1), 1)]
        sums = _tile(builder, sources, (offsets, values, first, last), starts)
        sums = [_clamped(builder, total, *bounds[1:]) for total in sums]
        if pooled:
            size = 1, columns // 2
            sums = [
                _largest(builder, *sums[left : left + 2], *sums[left + columns : left + columns + 2])
                for left in range(0, columns, 2)
            ]
        _store_all(builder, sums, _grid(builder, (out, at, pitch), size))
        builder.branch(done)
    builder.position_at_end(done)
    return context.get_dummy_value()


def _data(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any, places: tuple[int, ...]) -> list[Any]:
    """Pointers to the numbers of those arguments that are arrays."""
    return [context.make_array(signature.args[place])(context, builder, arguments[place]).data for place in places]


def _switch(builder: ir.IRBuilder, number: Any, cases: list[Any], first: Any = None) -> list[Any]:
    """A block for each case, `first` for the first one if it is given, and a last block for all other numbers."""
    blocks = [builder.append_basic_block("case") for _ in range(len(cases) + 1)]
    if first is not None:
        builder.function.blocks.remove(blocks[0])
        blocks[0] = first
    switch = builder.switch(number, blocks[-1])
    for case, block in zip(cases, blocks, strict=False):
        switch.add_case(case, block)
    return blocks


def _grid(builder: ir.IRBuilder, lines: tuple[Any, Any, Any], size: tuple[int, int], width: int = VECTOR) -> list[Any]:
    """Pointers to rows and columns of vectors, or of single numbers (width 1). lines: numbers, where the first row
    begins, and how far apart rows lie.
    """
    numbers, begin, step = lines
    found = []
    for row in range(size[0]):
        line = builder.gep(numbers, [builder.add(begin, builder.mul(step, ir.Constant(begin.type, row)))])
        for column in range(size[1]):
            single = builder.gep(line, [ir.Constant(begin.type, column)])
            found.append(single if width == 1 else _vector(builder, line, column))
    return found


def _store_all(builder: ir.IRBuilder, sums: list[Any], targets: list[Any]) -> None:
    for total, target in zip(sums, targets, strict=True):
        builder.store(total, target, align=4)


def _clamped(builder: ir.IRBuilder, total: Any, low: Any, high: Any) -> Any:
    total = builder.select(builder.fcmp_ordered(">", total, low), total, low)
    return builder.select(builder.fcmp_ordered("<", total, high), total, high)


def _largest(builder: ir.IRBuilder, largest: Any, *others: Any) -> Any:
    for other in others:
        largest = builder.select(builder.fcmp_ordered(">", other, largest), other, largest)
    return largest


@intrinsic
def copied_run(typing, out, at, x, base, step, count):  # type: ignore[no-untyped-def]
    """Every `step`-th of the pixels [8] that begin at x[base], `count` of them, side by side from out[at] on.

    out, x: contiguous, of one floating type.
    """
    index = types.intp
    return types.void(out, index, x, index, index, index), _generate_copy


def _generate_copy(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    out, at, x, base, step, count = arguments
    to = builder.gep(context.make_array(signature.args[0])(context, builder, out).data, [at])
    source = builder.gep(context.make_array(signature.args[2])(context, builder, x).data, [base])
    with cgutils.for_range(builder, count) as loop:
        eight = ir.Constant(count.type, VECTOR)
        pixel = builder.gep(source, [builder.mul(builder.mul(loop.index, step), eight)])
        place = builder.gep(to, [builder.mul(loop.index, eight)])
        builder.store(builder.load(_vector(builder, pixel, 0), align=4), _vector(builder, place, 0), align=4)
    return context.get_dummy_value()


def _gathers(size: int) -> Any:
    @intrinsic
    def gathers(typing, z, start, x, base, offsets, values, first, last, bias, adds):  # type: ignore[no-untyped-def]
        """z[start + i] = bias + sum over e in [first, last) of values[e] * x[base + offsets[e] + i], for as many i as
        fill `size` bytes exactly. adds: add to what is there instead of to bias. NaN passes through.

        values: contiguous, float32 or float64; z, x: of the same type, or bfloat16; offsets: contiguous int64. `size`
        is that of the sums.
        """
        places = z, types.intp, x, types.intp, offsets, values, types.intp, types.intp, values.dtype, types.boolean
        return types.void(*places), lambda *how: _gathered(size, *how)

    return gathers


def _gathered(size: int, context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    z, start, x, base, offsets, values, first, last, bias, adds = arguments
    vector = ir.VectorType(
        context.get_value_type(signature.args[5].dtype), size * 8 // signature.args[5].dtype.bitwidth
    )

    def data(place: int, array: Any) -> Any:
        return context.make_array(signature.args[place])(context, builder, array).data

    target = builder.gep(data(0, z), [start])
    source, offset, value = data(2, x), data(4, offsets), data(5, values)

    def added(entry: Any, total: Any) -> Any:
        place = builder.add(base, builder.load(builder.gep(offset, [entry])))
        weight = _spread(builder, builder.load(builder.gep(value, [entry])), vector)
        pixels = _loaded(builder, builder.gep(source, [place]), vector)
        return builder.fadd(builder.fmul(weight, pixels, flags=("contract",)), total, flags=("contract",))

    initial = cgutils.alloca_once_value(builder, _spread(builder, bias, vector))
    with builder.if_then(cgutils.as_bool_bit(builder, adds)):
        builder.store(_loaded(builder, target, vector), initial)
    begin, chains = builder.load(initial), max(1, BYTES // size)
    if chains > 1:
        totals = [begin, *[ir.Constant(vector, [0.0] * vector.count)] * (chains - 1)]
        first, totals = _walk(builder, first, last, totals, added)
        begin = totals[0]
        for total in totals[1:]:
            begin = builder.fadd(begin, total)
    _, (total,) = _walk(builder, first, last, [begin], added)
    _stored(builder, total, target)
    return context.get_dummy_value()


def _loaded(builder: ir.IRBuilder, place: Any, vector: ir.VectorType) -> Any:
    """A vector of numbers from where they lie, however they are stored."""
    stored = ir.VectorType(place.type.pointee, vector.count)
    numbers = builder.load(builder.bitcast(place, stored.as_pointer()), align=_bytes(stored.element))
    return widened(builder, numbers) if stored.element == HALF else numbers


def _stored(builder: ir.IRBuilder, numbers: Any, place: Any) -> None:
    if place.type.pointee == HALF:
        numbers = narrowed(builder, numbers)
    builder.store(numbers, builder.bitcast(place, numbers.type.as_pointer()), align=_bytes(place.type.pointee))


def _bytes(number: ir.Type) -> int:
    return next(size for kind, size in ((HALF, 2), (ir.FloatType(), 4), (ir.DoubleType(), 8)) if number == kind)


def _walk(builder: ir.IRBuilder, first: Any, last: Any, totals: list[Any], added: Any) -> tuple[Any, list[Any]]:
    """Entries of [first, last), as many at a time as there are totals, each added to its own; where it ended."""
    before = builder.block
    head, body, end = (builder.append_basic_block(name) for name in ("more", "weights", "summed"))
    builder.branch(head)
    builder.position_at_end(head)
    entry, sums = builder.phi(first.type), [builder.phi(total.type) for total in totals]
    for phi, start in zip((entry, *sums), (first, *totals), strict=True):
        phi.add_incoming(start, before)
    following = builder.add(entry, ir.Constant(entry.type, len(totals)))
    builder.cbranch(builder.icmp_signed("<=", following, last), body, end)
    builder.position_at_end(body)
    new = [added(builder.add(entry, ir.Constant(entry.type, place)), total) for place, total in enumerate(sums)]
    for phi, value in zip((entry, *sums), (following, *new), strict=True):
        phi.add_incoming(value, body)
    builder.branch(head)
    builder.position_at_end(end)
    return entry, sums


gathered, few, fewest = _gathers(BYTES), _gathers(FEW), _gathers(FEWEST)


LANES = 32  # bytes of partial sums of an entry in `dotted`
DOTTED = 256  # bytes of a run in `dotted`: as many registers as there are sums in `gathered`


@intrinsic
def dotted(typing, sums, g, start, x, base, offsets, first, last):  # type: ignore[no-untyped-def]
    """sums[e * lanes : (e + 1) * lanes] += the products g[start + i] * x[base + offsets[e] + i], added up to that many
    lanes, for as many i as fill DOTTED bytes and every e in [first, last); lanes: how many numbers LANES bytes hold.

    sums: contiguous, float32 or float64; g, x: of the same type, or bfloat16; offsets: contiguous int64. DOTTED and
    LANES: bytes of sums.
    """
    index = types.intp
    return types.void(sums, g, index, x, index, offsets, index, index), _dotted


def _dotted(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    sums, g, start, x, base, offsets, first, last = arguments
    real = context.get_value_type(signature.args[0].dtype)
    itemsize = signature.args[0].dtype.bitwidth // 8
    lanes, index = LANES // itemsize, first.type
    whole, half = ir.VectorType(real, 2 * lanes), ir.VectorType(real, lanes)

    def data(place: int, array: Any) -> Any:
        return context.make_array(signature.args[place])(context, builder, array).data

    def loaded(numbers: Any, place: int) -> Any:
        return _loaded(builder, builder.gep(numbers, [ir.Constant(index, place * whole.count)]), whole)

    line = builder.gep(data(1, g), [start])
    gradients = [loaded(line, place) for place in range(DOTTED // itemsize // whole.count)]
    target, source, offset = data(0, sums), data(3, x), data(5, offsets)

    def added(entry: Any, _: Any) -> Any:
        pixels = builder.gep(source, [builder.add(base, builder.load(builder.gep(offset, [entry])))])
        total = builder.fmul(gradients[0], loaded(pixels, 0), flags=("contract",))
        for place, gradient in enumerate(gradients[1:], 1):
            product = builder.fmul(gradient, loaded(pixels, place), flags=("contract",))
            total = builder.fadd(product, total, flags=("contract",))
        left, right = (
            builder.shuffle_vector(total, total, ir.Constant(ir.VectorType(ir.IntType(32), lanes), list(places)))
            for places in (range(lanes), range(lanes, 2 * lanes))
        )
        place = builder.gep(target, [builder.mul(entry, ir.Constant(index, lanes))])
        place = builder.bitcast(place, half.as_pointer())
        known = builder.load(place, align=itemsize)
        builder.store(builder.fadd(known, builder.fadd(left, right)), place, align=itemsize)
        return ir.Constant(index, 0)

    _walk(builder, first, last, [ir.Constant(index, 0)], added)
    return context.get_dummy_value()


@intrinsic
def pooled_run(typing, out, at, z, upper, lower, width):  # type: ignore[no-untyped-def]
    """out[at + i] = the largest of z[upper + 2 i], z[upper + 2 i + 1], z[lower + 2 i], z[lower + 2 i + 1] for i in
    [0, width), one image.

    out, z: contiguous, of one floating type.
    """
    index = types.intp
    return types.void(out, index, z, index, index, index), _generate_pool


def _generate_pool(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    out, at, z, upper, lower, width = arguments
    to = builder.gep(context.make_array(signature.args[0])(context, builder, out).data, [at])
    sums = context.make_array(signature.args[2])(context, builder, z).data
    rows = [builder.gep(sums, [row]) for row in (upper, lower)]
    begin = ir.Constant(width.type, 0)
    for size in (VECTOR, VECTOR // 2, 1):  # each from where the wider one ended
        end = builder.and_(width, ir.Constant(width.type, -size))
        with cgutils.for_range_slice(builder, begin, end, ir.Constant(width.type, size), inc=True) as (pixel, _):
            left = builder.shl(pixel, ir.Constant(width.type, 1))
            four = [_pairs(builder, builder.gep(row, [left]), size) for row in rows]
            largest = _largest(builder, *(half for pair in four for half in pair))
            _store(builder, largest, builder.gep(to, [pixel]), size)
        begin = end
    return context.get_dummy_value()


def _pairs(builder: ir.IRBuilder, numbers: Any, size: int) -> list[Any]:
    """Of 2 * `size` numbers those at even places and those at odd ones."""
    kind = ir.VectorType(numbers.type.pointee, 2 * size)
    both = builder.load(builder.bitcast(numbers, kind.as_pointer()), align=4)
    places = ([2 * lane + side for lane in range(size)] for side in (0, 1))
    return [
        builder.shuffle_vector(both, both, ir.Constant(ir.VectorType(ir.IntType(32), size), list(place)))
        for place in places
    ]


def _store(builder: ir.IRBuilder, numbers: Any, place: Any, size: int) -> None:
    kind = ir.VectorType(place.type.pointee, size)
    builder.store(numbers, builder.bitcast(place, kind.as_pointer()), align=4)


def _starts(builder: ir.IRBuilder, start: Any, count: int, own: Source, more: Source) -> list[Any]:
    """What `count` vectors of sums begin with: `start`, or numbers of their `own`; and `more`. Both: where they begin,
    -1 where there are none, and pointers to them.
    """
    sums = [cgutils.alloca_once_value(builder, start) for _ in range(count)]
    for (place, pointers), adds in ((own, False), (more, True)):
        with builder.if_then(builder.icmp_signed(">=", place, ir.Constant(place.type, 0))):
            for total, pointer in zip(sums, pointers(), strict=True):
                part = builder.load(pointer, align=4)
                part = part if isinstance(part.type, ir.VectorType) else _spread(builder, part)
                builder.store(builder.fadd(builder.load(total), part, flags=FLAGS) if adds else part, total)
    return [builder.load(total) for total in sums]


def _shown(builder: ir.IRBuilder, sums: list[Any], place: Any, pointers: Pointers) -> list[Any]:
    """The sums, zero where the mask is; `place` -1: there is none."""
    shown = [cgutils.alloca_once_value(builder, total) for total in sums]
    with builder.if_then(builder.icmp_signed(">=", place, ir.Constant(place.type, 0))):
        for total, pointer, into in zip(sums, pointers(), shown, strict=True):
            zero = ir.Constant(total.type, [0.0] * VECTOR)
            kept = builder.fcmp_ordered("!=", builder.load(pointer, align=4), zero)
            builder.store(builder.select(kept, total, zero), into)
    return [builder.load(total) for total in shown]


def _tile(builder: ir.IRBuilder, sources: list[tuple[Any, int]], entries: Any, starts: list[Any]) -> list[Any]:
    """The sums of a few vectors of pixels, one pass over the weights. sources: rows of them, and how many of each.

    Where these are few, several weights at a time have sums of their own, or each would wait for the one before.
    """
    weights, (first, last) = entries[:2], entries[2:]
    chains = max(1, CHAINED // len(starts))
    if chains > 1:
        before = builder.block
        several, rest = builder.append_basic_block("several"), builder.append_basic_block("rest")
        enough = builder.icmp_signed("<=", builder.add(first, ir.Constant(first.type, chains)), last)
        builder.cbranch(enough, several, rest)
        builder.position_at_end(several)
        zeros = [ir.Constant(starts[0].type, [0.0] * VECTOR)] * len(starts)
        following, totals = _pass(builder, sources, weights, (first, last), [*starts, *zeros * (chains - 1)])
        sums = totals[: len(starts)]
        for chain in range(1, chains):
            sums = [builder.fadd(*two) for two in zip(sums, totals[chain * len(starts) :], strict=False)]
        several = builder.block
        builder.branch(rest)
        builder.position_at_end(rest)
        first = _either(builder, (first, before), (following, several))
        starts = [
            _either(builder, (start, before), (total, several)) for start, total in zip(starts, sums, strict=True)
        ]
    return _pass(builder, sources, weights, (first, last), starts)[1]


def _pass(
    builder: ir.IRBuilder, sources: list[tuple[Any, int]], weights: Any, span: Any, totals: list[Any]
) -> tuple[Any, list[Any]]:
    """Weights of a span, as many at a time as there are totals for every pixel; where it ended, and the sums."""
    first, last = span
    offsets, values = weights
    pixels = sum(count for _, count in sources)
    step = ir.Constant(first.type, len(totals) // pixels)
    before = builder.block
    loop, after = builder.append_basic_block("weights"), builder.append_basic_block("summed")
    ahead = builder.add(first, step)
    builder.cbranch(builder.icmp_signed("<=", ahead, last), loop, after)
    builder.position_at_end(loop)
    entry = builder.phi(first.type)
    sums = [builder.phi(total.type) for total in totals]
    new = []
    for chain in range(len(totals) // pixels):
        place = builder.add(entry, ir.Constant(entry.type, chain))
        offset = builder.sext(builder.load(builder.gep(offsets, [place])), entry.type)
        value = _spread(builder, builder.load(builder.gep(values, [place])))
        lines = [(builder.gep(source, [offset]), count) for source, count in sources]
        inputs = [_vector(builder, line, number) for line, count in lines for number in range(count)]
        for pixel, total in zip(inputs, sums[chain * pixels : (chain + 1) * pixels], strict=True):
            part = builder.fmul(value, builder.load(pixel, align=4), flags=FLAGS)
            new.append(builder.fadd(total, part, flags=FLAGS))
    following = builder.add(entry, step)
    for phi, start, value in zip((entry, *sums), (first, *totals), (following, *new), strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<=", builder.add(following, step), last), loop, after)
    builder.position_at_end(after)
    end = _either(builder, (first, before), (following, loop))
    return end, [_either(builder, (start, before), (total, loop)) for start, total in zip(totals, new, strict=True)]


def _either(builder: ir.IRBuilder, *ways: tuple[Any, Any]) -> Any:
    """The value that belongs to the block that one comes from."""
    phi = builder.phi(ways[0][0].type)
    for value, block in ways:
        phi.add_incoming(value, block)
    return phi


def _vector(builder: ir.IRBuilder, numbers: Any, place: int) -> Any:
    """Pointer to vector number `place` of what `numbers` points to."""
    first = builder.gep(numbers, [ir.Constant(ir.IntType(64), place * VECTOR)])
    return builder.bitcast(first, ir.VectorType(numbers.type.pointee, VECTOR).as_pointer())


def _spread(builder: ir.IRBuilder, number: Any, kind: ir.VectorType | None = None) -> Any:
    """One number in all places of a vector."""
    kind = ir.VectorType(number.type, VECTOR) if kind is None else kind
    lone = builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count)
    return builder.shuffle_vector(lone, ir.Constant(kind, ir.Undefined), zeros)
