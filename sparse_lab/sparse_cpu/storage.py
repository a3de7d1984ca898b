"""Maps that are stored in bfloat16: half the memory, and half the traffic of what only reads and writes maps.

A number is stored as the upper 16 bits of a float32, rounded to even. numba is taught a type whose numbers lie so in
arrays and are float32 everywhere else: kernels are the same, and compute and add up in float32 (or float64).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.datamodel import register_default
from numba.core.datamodel.models import PrimitiveModel
from numba.core.typeconv.castgraph import Conversion
from numba.extending import lower_cast, overload, typeof_impl

from sparse_lab.sparse_cpu.kernel import INLINED

WORD = ir.IntType(32)
HALF = ir.IntType(16)


class BFloat16(types.Type):
    """numba's type of one number."""

    def __init__(self) -> None:
        super().__init__("bfloat16")
        self.bitwidth = 16

    def can_convert_to(self, context: Any, other: Any) -> Conversion | None:
        if other == types.float32:
            return Conversion.promote
        return Conversion.safe if other == types.float64 else None

    def can_convert_from(self, context: Any, other: Any) -> Conversion | None:
        return Conversion.unsafe if isinstance(other, types.Float) else None

    def unify(self, context: Any, other: Any) -> Any:
        """What a variable is that may hold both."""
        return other if isinstance(other, types.Float) else types.float32


bfloat16 = BFloat16()


def widened(builder: ir.IRBuilder, bits: Any) -> Any:
    """float32 (a number, or a vector) of stored bits."""
    words = like(bits.type, WORD)
    return builder.bitcast(builder.shl(builder.zext(bits, words), every(words, 16)), like(bits.type, ir.FloatType()))


def narrowed(builder: ir.IRBuilder, number: Any) -> Any:
    """The bits of the nearest number that can be stored, the even one of two; NaN stays NaN."""
    words = like(number.type, WORD)
    bits = builder.bitcast(number, words)
    upper = builder.lshr(bits, every(words, 16))
    nearest = builder.add(bits, builder.add(builder.and_(upper, every(words, 1)), every(words, 0x7FFF)))
    nan = builder.fcmp_unordered("uno", number, number)
    kept = builder.select(nan, builder.or_(upper, every(words, 0x40)), builder.lshr(nearest, every(words, 16)))
    return builder.trunc(kept, like(number.type, HALF))


def like(kind: ir.Type, element: ir.Type) -> ir.Type:
    """`element`, in a vector as wide as `kind` is one."""
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


def every(kind: ir.Type, number: int) -> ir.Constant:
    return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)


@register_default(BFloat16)
class _Model(PrimitiveModel):
    """float32 in registers, 16 bits in arrays."""

    def __init__(self, manager: Any, kind: BFloat16) -> None:
        super().__init__(manager, kind, ir.FloatType())

    def get_data_type(self) -> ir.Type:
        return HALF

    def as_data(self, builder: ir.IRBuilder, value: Any) -> Any:
        return narrowed(builder, value)

    def from_data(self, builder: ir.IRBuilder, value: Any) -> Any:
        return widened(builder, value)

    def load_from_data_pointer(self, builder: ir.IRBuilder, pointer: Any, align: int | None = None) -> Any:
        return widened(builder, builder.load(pointer, align=align))


@lower_cast(BFloat16, types.Float)
def _to_float(context: Any, builder: ir.IRBuilder, own: Any, other: Any, value: Any) -> Any:
    return value if other == types.float32 else builder.fpext(value, ir.DoubleType())


@lower_cast(types.Float, BFloat16)
def _from_float(context: Any, builder: ir.IRBuilder, other: Any, own: Any, value: Any) -> Any:
    return value if other == types.float32 else builder.fptrunc(value, ir.FloatType())


class BFloat16Array(np.ndarray):
    """Stored numbers, as numpy sees them: uint16, contiguous."""


@typeof_impl.register(BFloat16Array)
def _typeof(array: BFloat16Array, context: Any) -> types.Array:
    return types.Array(bfloat16, array.ndim, "C")


def room(x, number):  # type: ignore[no-untyped-def]
    """A new array of `number` numbers in which those of x can be added up. For kernels."""


@overload(room, jit_options=INLINED)  # type: ignore[arg-type]
def _room(x, number):  # type: ignore[no-untyped-def]
    if x.dtype == bfloat16:
        return lambda x, number: np.empty(number, np.float32)
    return lambda x, number: np.empty(number, x.dtype)


def opened(x, start, number):  # type: ignore[no-untyped-def]
    """x[start : start + number] where sums can grow: there itself, or in float32 beside it. For kernels."""


@overload(opened, jit_options=INLINED)  # type: ignore[arg-type]
def _opened(x, start, number):  # type: ignore[no-untyped-def]
    if x.dtype == bfloat16:

        def copied(x, start, number):  # type: ignore[no-untyped-def]
            sums, stored = np.empty(number, np.float32), x[start : start + number]
            for i in range(number):
                sums[i] = stored[i]
            return sums

        return copied
    return lambda x, start, number: x[start : start + number]


def closed(x, start, sums):  # type: ignore[no-untyped-def]
    """Store what has been added up where `opened` took it from. For kernels."""


@overload(closed, jit_options=INLINED)  # type: ignore[arg-type]
def _closed(x, start, sums):  # type: ignore[no-untyped-def]
    if x.dtype == bfloat16:

        def stored(x, start, sums):  # type: ignore[no-untyped-def]
            to = x[start : start + sums.size]
            for i in range(sums.size):
                to[i] = sums[i]

        return stored
    return lambda x, start, sums: None
