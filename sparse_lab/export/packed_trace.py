"""A trace in a packed file: steps as plain values, pruned weights as positions and values, all else as it is.

Streams as in `packed`: `positions` (coded bytes), `values` (float32 or float16, of weights), `numbers` (float32, of all
else), and `integers1` to `integers8`, named by the bytes of one number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_lab.coding import head, rice_coding
from sparse_lab.coding.rice_coding import MOST_BITS
from sparse_lab.export.streams import Streams
from sparse_lab.trace.plain import LONGEST, as_plain, from_plain
from sparse_lab.trace.trace import TYPES, Trace, check, numbers_of

SPARSE = 0.9  # share of numbers that are not zero, below which positions pay
DIMENSIONS = 16  # of a tensor
INTEGERS: dict[int, Any] = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
WHOLE = {name: kind for name, kind in TYPES.items() if not kind.is_floating_point}


def put(trace: Trace, tensors: Mapping[str, Tensor], streams: Streams) -> dict[str, Any]:
    """What the head says of a trace; the numbers go to the streams."""
    return {"trace": as_plain(trace), "tensors": [_put(name, tensor, streams) for name, tensor in tensors.items()]}


def take(of: Mapping[str, Any], streams: Streams, allowance: head.Allowance) -> tuple[Trace, dict[str, Tensor]]:
    """The trace and its tensors, float32 and checked. Raises ValueError for what `put` would not have written."""
    head.only(of, ("format", "checksum", "values", "about", "trace", "tensors"))
    tensors: dict[str, Tensor] = {}
    for entry in head.items(of, "tensors"):
        name, sizes = head.text(entry, "name"), head.wholes(entry, "shape", 0, head.MOST)
        if name in tensors or len(sizes) > DIMENSIONS:
            raise ValueError(f"tensor {name[:LONGEST]!r} stands twice, or has no shape")
        tensors[name] = _take(entry, name, sizes, allowance.take(sizes), streams)
    streams.end()
    trace = from_plain(head.field(of, "trace"), tensors)
    check(trace, tensors)
    allowance.check_results(numbers_of(trace, tensors))
    return trace, tensors


def _put(name: str, tensor: Tensor, streams: Streams) -> dict[str, Any]:
    flat = tensor.flatten().numpy()
    entry: dict[str, Any] = {"name": name, "shape": list(tensor.shape)}
    if not tensor.is_floating_point():
        low, high = (int(flat.min()), int(flat.max())) if flat.size else (0, 0)
        size = next(size for size, kind in INTEGERS.items() if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)
        streams.put(f"integers{size}", flat.astype(INTEGERS[size]))
        return entry | {"type": str(tensor.dtype).removeprefix("torch."), "size": size}
    # a weight that is not zero must not become one that is
    positions = np.flatnonzero(flat.astype(np.float32))
    if len(positions) > SPARSE * flat.size:
        streams.put("numbers", flat.astype(np.float32))
        return entry
    bits, code = rice_coding.encode(positions)
    streams.put("positions", np.frombuffer(code, dtype=np.uint8))
    return entry | {"bits": bits, "bytes": len(code), "weights": len(positions)} | streams.put_values(flat[positions])


def _take(entry: Any, name: str, sizes: tuple[int, ...], count: int, streams: Streams) -> Tensor:
    if "type" in entry:
        head.only(entry, ("name", "shape", "type", "size"))
        kind, size = head.choice(entry, "type", tuple(WHOLE)), head.choice(entry, "size", tuple(INTEGERS))
        numbers = streams.take(f"integers{size}", count).astype(np.int64)
        return torch.from_numpy(numbers).to(WHOLE[kind]).reshape(sizes)
    if "weights" not in entry:
        head.only(entry, ("name", "shape"))
        return torch.from_numpy(streams.take("numbers", count).astype(np.float32)).reshape(sizes)
    head.only(entry, ("name", "shape", "bits", "bytes", "weights", "scale"))
    code = streams.take("positions", head.whole(entry, "bytes", 0, count + 8 * MOST_BITS)).tobytes()
    weights = head.whole(entry, "weights", 0, min(count, 8 * len(code)))
    positions = rice_coding.decode(code, head.whole(entry, "bits", 0, MOST_BITS), weights)
    values = streams.take_values(weights, head.number(entry, "scale"))
    if weights and positions[-1] >= count:
        raise ValueError(f"tensor {name[:LONGEST]!r} has weights beyond its end")
    flat = np.zeros(count, dtype=np.float32)
    flat[positions] = values
    return torch.from_numpy(flat).reshape(sizes)
