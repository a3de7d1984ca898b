"""A trace as plain values for JSON, and back: whoever reads a file gets listed operations with checked arguments, or a
ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from torch import Tensor

from sparse_lab.trace import operations
from sparse_lab.trace.trace import MOST, TYPES, Batch, Named, Step, Trace, Type, Value, mapped

LONGEST = 64  # characters of a text that is an argument
DEEPEST = 3  # lists in lists
MOST_IMAGES = 2**20  # times the batch
MOST_STEPS = 2**13


def as_plain(trace: Trace) -> dict[str, Any]:
    """All of a trace but its constants' numbers."""
    steps = [[step.operation, {name: _spelt(value) for name, value in step.arguments.items()}] for step in trace.steps]
    plain = {"images": list(trace.images), "steps": steps, "result": trace.result}
    return plain | {"parameters": list(trace.parameters), "buffers": list(trace.buffers)}


def from_plain(plain: Any, constants: Mapping[str, Tensor]) -> Trace:
    """The trace. Raise ValueError for what `as_plain` would not have written."""
    if not isinstance(plain, dict):
        raise ValueError("it holds no trace")
    images, parameters, buffers = (plain.get(key) for key in ("images", "parameters", "buffers"))
    result = plain.get("result")
    if not (_are(images, int) and _are(parameters, str) and _are(buffers, str) and type(result) is int):
        raise ValueError("its trace says neither what it reads nor what it gives")
    if not images or not all(0 < size <= 2**16 for size in images) or math.prod(images) > MOST:
        raise ValueError("its trace is for no image")
    if not isinstance(plain.get("steps"), list) or len(plain["steps"]) > MOST_STEPS:
        raise ValueError(f"its trace has no steps, or more than {MOST_STEPS:,}")
    there = {*parameters, *buffers, *constants}
    steps = tuple(_step(number, step, there) for number, step in enumerate(plain["steps"]))
    return Trace(tuple(images), steps, result, tuple(parameters), tuple(buffers), dict(constants))


def _are(values: Any, kind: type) -> TypeGuard[list[Any]]:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _spelt(argument: Any) -> Any:
    def one(leaf: Any) -> Any:
        if isinstance(leaf, Value):
            return {"value": leaf.number}
        if isinstance(leaf, Named):
            return {"tensor": leaf.name}
        if isinstance(leaf, Batch):
            return {"batch": leaf.times}
        if isinstance(leaf, Type):
            return {"type": leaf.name}
        return {"number": str(leaf)} if isinstance(leaf, float) and not math.isfinite(leaf) else leaf

    return mapped(argument, one)


def _step(number: int, step: Any, there: set[str]) -> Step:
    if not isinstance(step, list) or len(step) != 2 or not isinstance(step[1], dict):
        raise ValueError(f"step {number} is none")
    operation, arguments = step
    if not operations.is_known(operation):
        raise ValueError(f"step {number}: there is no operation {str(operation)[:LONGEST]!r}")
    known = operations.defaults(operation)
    if not arguments.keys() <= known.keys() - operations.ELSEWHERE:
        raise ValueError(f"step {number}: {operation} has other arguments")
    read = {name: _read(value, number, there) for name, value in arguments.items()}
    if not isinstance(read.get("dtype"), Type | None):  # torch takes a number for one, and looks it up unchecked
        raise ValueError(f"step {number}: {operation} makes numbers of no type")
    return Step(operation, read)


def _read(argument: Any, number: int, there: set[str], depth: int = 0) -> Any:
    if isinstance(argument, list):
        if depth == DEEPEST:
            raise ValueError(f"step {number}: lists in lists in lists")
        return [_read(one, number, there, depth + 1) for one in argument]
    if isinstance(argument, dict):
        return _reference(argument, number, there)
    if isinstance(argument, str) and len(argument) > LONGEST:
        raise ValueError(f"step {number}: an argument of {len(argument)} characters")
    if isinstance(argument, int) and abs(argument) >= 2**63:
        raise ValueError(f"step {number}: a number beyond 64 bits")
    return argument


def _reference(argument: dict[str, Any], number: int, there: set[str]) -> Any:
    kind, value = next(iter(argument.items())) if len(argument) == 1 else ("", None)
    if kind == "value" and type(value) is int and 0 <= value <= number:
        return Value(value)
    if kind == "tensor" and isinstance(value, str) and value in there:
        return Named(value)
    if kind == "batch" and type(value) is int and 0 < value <= MOST_IMAGES:
        return Batch(value)
    if kind == "type" and isinstance(value, str) and value in TYPES:
        return Type(value)
    if kind == "number" and value in ("inf", "-inf", "nan"):
        return float(value)
    raise ValueError(f"step {number} reads what is not there")
