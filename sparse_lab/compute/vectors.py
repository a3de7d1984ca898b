"""A sum of rows that stays in vector registers: the one place where LLVM has to be told what to do.

Numba has no vector type, and a loop over an array sends the sum through the cache once for every few weights. Here the
accumulator is an LLVM vector of 256 bytes, which every processor maps to its own registers (8 of AVX2, 4 of AVX-512, 16
of NEON).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

BYTES = 256


def lanes(itemsize: int) -> int:
    """How many numbers of that size `gathered` handles at a time."""
    return BYTES // itemsize


@intrinsic
def gathered(typingctx, z, start, x, base, offsets, values, first, last, bias, adds):
    """z[start : start + lanes] = bias + the sum over e in [first, last) of values[e] * x[base + offsets[e] ...].

    z, x, values: float32 or float64, contiguous; offsets: int64. adds: add to what is there instead of to bias.
    """
    signature = types.void(
        z, types.intp, x, types.intp, offsets, values, types.intp, types.intp, z.dtype, types.boolean
    )
    return signature, _gathered


def _gathered(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    z, start, x, base, offsets, values, first, last, bias, adds = arguments
    number = context.get_value_type(signature.args[0].dtype)
    count = lanes(signature.args[0].dtype.bitwidth // 8)
    vector = ir.VectorType(number, count)

    def data(index: int, array: Any) -> Any:
        return cgutils.create_struct_proxy(signature.args[index])(context, builder, array).data

    def address(pointer: Any, index: Any) -> Any:
        return builder.bitcast(builder.gep(pointer, [index]), vector.as_pointer())

    def splat(scalar: Any) -> Any:
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), count), [0] * count)
        return builder.shuffle_vector(one, one, zeros)

    def load(where: Any) -> Any:
        loaded = builder.load(where)
        loaded.align = signature.args[0].dtype.bitwidth // 8
        return loaded

    source, target = data(2, x), address(data(0, z), start)
    offset, value = data(4, offsets), data(5, values)
    constant = splat(bias)
    initial = cgutils.alloca_once_value(builder, constant)
    with builder.if_then(cgutils.as_bool_bit(builder, adds)):
        builder.store(load(target), initial)
    begin = builder.load(initial)
    before = builder.block
    head, body, end = (builder.append_basic_block(name) for name in ("head", "body", "end"))
    builder.branch(head)
    builder.position_at_end(head)
    entry, total = builder.phi(first.type), builder.phi(vector)
    entry.add_incoming(first, before)
    total.add_incoming(begin, before)
    builder.cbranch(builder.icmp_signed("<", entry, last), body, end)
    builder.position_at_end(body)
    place = builder.add(base, builder.load(builder.gep(offset, [entry])))
    weight = splat(builder.load(builder.gep(value, [entry])))
    product = builder.fmul(weight, load(address(source, place)), flags=("contract",))
    entry.add_incoming(builder.add(entry, ir.Constant(entry.type, 1)), body)
    total.add_incoming(builder.fadd(product, total, flags=("contract",)), body)
    builder.branch(head)
    builder.position_at_end(end)
    builder.store(total, target).align = signature.args[0].dtype.bitwidth // 8
    return context.get_dummy_value()
