"""The innermost loop of sparse arithmetic, written for the vector registers: one run of outputs from many weights.

Numba compiles a loop over weights inside a loop over pixels to code that carries every sum through the cache. Here up
to 64 sums stay in registers while all weights of the run go by, so that a weight costs one load and one multiply-add
for each vector. LLVM makes AVX2, AVX-512 or NEON of it, whatever the machine has.
"""

from __future__ import annotations

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
TILES = (8, 4, 2, 1)  # vectors of sums at a time
FLAGS = ("contract", "nsz", "reassoc")


@intrinsic
def weighted_run(typing, out, at, n, x, base, offsets, values, first, last, start, addend, low, high):  # type: ignore[no-untyped-def]
    """out[at + i] = clamp(start + x[addend + i] + sum over e in [first, last) of values[e] * x[base + offsets[e] + i],
    low, high) for i in [0, n), n rounded up to a multiple of 8: both arrays must reach so far. addend -1: none.

    out, x, values: contiguous, of one floating type; offsets: contiguous int32; low <= high.
    """
    index, real = types.intp, values.dtype
    numbers = (out, index, index, x, index, offsets, values, index, index)
    return types.void(*numbers, real, index, real, real), _generate


def _generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    out, x, offsets, values = (
        context.make_array(signature.args[place])(context, builder, arguments[place]).data for place in (0, 3, 5, 6)
    )
    at, n, base, first, last, start, addend, low, high = (arguments[place] for place in (1, 2, 4, *range(7, 13)))
    to = builder.gep(out, [at])
    source, added = builder.gep(x, [base]), builder.gep(x, [addend])
    adds = builder.icmp_signed(">=", addend, ir.Constant(addend.type, 0))
    one = ir.Constant(n.type, 1)
    vectors = builder.lshr(builder.add(n, ir.Constant(n.type, VECTOR - 1)), ir.Constant(n.type, 3))
    place = cgutils.alloca_once_value(builder, ir.Constant(n.type, 0))
    bounds = [_spread(builder, number) for number in (start, low, high)]
    for tile in TILES:
        # all but the widest tile are needed at most once
        more = builder.append_basic_block("more")
        body = builder.append_basic_block("tile")
        done = builder.append_basic_block("done")
        builder.branch(more)
        builder.position_at_end(more)
        here = builder.load(place)
        reaches = builder.icmp_signed("<=", builder.add(here, ir.Constant(n.type, tile)), vectors)
        builder.cbranch(reaches, body, done)
        builder.position_at_end(body)
        pixel = builder.shl(here, ir.Constant(n.type, 3))
        entries = offsets, values, first, last, one
        starts = _starts(builder, adds, builder.gep(added, [pixel]), tile, bounds[0])
        sums = _tile(builder, builder.gep(source, [pixel]), entries, starts)
        for number, total in enumerate(sums):
            total = builder.select(builder.fcmp_ordered(">", total, bounds[1]), total, bounds[1])
            total = builder.select(builder.fcmp_ordered("<", total, bounds[2]), total, bounds[2])
            builder.store(total, _vector(builder, builder.gep(to, [pixel]), number), align=4)
        builder.store(builder.add(here, ir.Constant(n.type, tile)), place)
        builder.branch(more if tile == TILES[0] else done)
        builder.position_at_end(done)
    return context.get_dummy_value()


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
        pixels = _load(builder, builder.gep(source, [place]), vector)
        return builder.fadd(builder.fmul(weight, pixels, flags=("contract",)), total, flags=("contract",))

    initial = cgutils.alloca_once_value(builder, _spread(builder, bias, vector))
    with builder.if_then(cgutils.as_bool_bit(builder, adds)):
        builder.store(_load(builder, target, vector), initial)
    begin, chains = builder.load(initial), max(1, BYTES // size)
    if chains > 1:
        totals = [begin, *[ir.Constant(vector, [0.0] * vector.count)] * (chains - 1)]
        first, totals = _walk(builder, first, last, totals, added)
        begin = totals[0]
        for total in totals[1:]:
            begin = builder.fadd(begin, total)
    _, (total,) = _walk(builder, first, last, [begin], added)
    _store(builder, total, target)
    return context.get_dummy_value()


def _load(builder: ir.IRBuilder, place: Any, vector: ir.VectorType) -> Any:
    """A vector of numbers from where they lie, however they are stored."""
    stored = ir.VectorType(place.type.pointee, vector.count)
    numbers = builder.load(builder.bitcast(place, stored.as_pointer()), align=_bytes(stored.element))
    return widened(builder, numbers) if stored.element == HALF else numbers


def _store(builder: ir.IRBuilder, numbers: Any, place: Any) -> None:
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
        return _load(builder, builder.gep(numbers, [ir.Constant(index, place * whole.count)]), whole)

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
    """The largest of each 2x2 of two rows [2 width][8] that begin at z[upper] and z[lower]: [width][8] from out[at] on.

    out, z: contiguous, of one floating type.
    """
    index = types.intp
    return types.void(out, index, z, index, index, index), _generate_pool


def _generate_pool(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    out, at, z, upper, lower, width = arguments
    to = builder.gep(context.make_array(signature.args[0])(context, builder, out).data, [at])
    sums = context.make_array(signature.args[2])(context, builder, z).data
    rows = [builder.gep(sums, [row]) for row in (upper, lower)]
    with cgutils.for_range(builder, width) as loop:
        left = builder.shl(loop.index, ir.Constant(width.type, 4))
        four = [_vector(builder, builder.gep(row, [left]), side) for row in rows for side in (0, 1)]
        largest, *others = (builder.load(place, align=4) for place in four)
        for other in others:
            largest = builder.select(builder.fcmp_ordered(">", other, largest), other, largest)
        pixel = builder.gep(to, [builder.shl(loop.index, ir.Constant(width.type, 3))])
        builder.store(largest, _vector(builder, pixel, 0), align=4)
    return context.get_dummy_value()


def _starts(builder: ir.IRBuilder, adds: Any, addends: Any, tile: int, start: Any) -> list[Any]:
    """What `tile` vectors of sums begin with."""
    before = builder.block
    load = builder.append_basic_block("addends")
    ready = builder.append_basic_block("ready")
    builder.cbranch(adds, load, ready)
    builder.position_at_end(load)
    parts = [builder.load(_vector(builder, addends, number), align=4) for number in range(tile)]
    sums = [builder.fadd(start, part, flags=FLAGS) for part in parts]
    builder.branch(ready)
    builder.position_at_end(ready)
    return [_either(builder, (start, before), (total, load)) for total in sums]


def _tile(builder: ir.IRBuilder, source: Any, entries: Any, starts: list[Any]) -> list[Any]:
    """The sums of a few vectors of pixels, one pass over the weights."""
    offsets, values, first, last, one = entries
    before = builder.block
    loop = builder.append_basic_block("weights")
    after = builder.append_basic_block("summed")
    builder.cbranch(builder.icmp_signed("<", first, last), loop, after)
    builder.position_at_end(loop)
    e = builder.phi(first.type)
    e.add_incoming(first, before)
    sums = [builder.phi(start.type) for start in starts]
    offset = builder.sext(builder.load(builder.gep(offsets, [e])), first.type)
    value = _spread(builder, builder.load(builder.gep(values, [e])))
    pixels = builder.gep(source, [offset])
    new = []
    for number, (total, start) in enumerate(zip(sums, starts, strict=True)):
        part = builder.fmul(value, builder.load(_vector(builder, pixels, number), align=4), flags=FLAGS)
        new.append(builder.fadd(total, part, flags=FLAGS))
        total.add_incoming(start, before)
        total.add_incoming(new[-1], loop)
    following = builder.add(e, one)
    e.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, last), loop, after)
    builder.position_at_end(after)
    return [_either(builder, (start, before), (total, loop)) for start, total in zip(starts, new, strict=True)]


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
