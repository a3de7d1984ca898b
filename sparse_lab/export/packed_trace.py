"""A trace in a packed file: steps as plain values, pruned weights as positions and values, all else as it is.

Streams as in `packed`: `positions` (coded bytes), `values` (float32 or float16, of weights), `numbers` (float32, of all
else), and `integers1` to `integers8`, named by the bytes of one number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_lab.export import rice_coding
from sparse_lab.export.streams import Streams
from sparse_lab.trace.plain import as_plain, from_plain
from sparse_lab.trace.trace import TYPES, Trace, check

SPARSE = 0.9  # share of numbers that are not zero, below which positions pay
MOST = 2**29  # numbers in all tensors together, as in memory
INTEGERS: dict[int, Any] = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
WHOLE = {name: kind for name, kind in TYPES.items() if not kind.is_floating_point}


def put(trace: Trace, tensors: Mapping[str, Tensor], streams: Streams) -> dict[str, Any]:
    """What the head says of a trace; the numbers go to the streams."""
    return {"trace": as_plain(trace), "tensors": [_put(name, tensor, streams) for name, tensor in tensors.items()]}


def take(head: Mapping[str, Any], streams: Streams) -> tuple[Trace, dict[str, Tensor]]:
    """The trace and its tensors, float32 and checked. Raises ValueError for what `put` would not have written."""
    left, tensors = MOST, {}
    for entry in head["tensors"]:
        if not all(type(size) is int and size >= 0 for size in entry["shape"]):
            raise ValueError(f"tensor {entry['name']!r} has no shape")
        left -= math.prod(entry["shape"])
        if left < 0:
            raise ValueError(f"it asks for more than {MOST:,} numbers")
        tensors[str(entry["name"])] = _take(entry, streams)
    trace = from_plain(head["trace"], tensors)
    check(trace, tensors)
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


def _take(entry: Mapping[str, Any], streams: Streams) -> Tensor:
    count = math.prod(entry["shape"])
    if "type" in entry:
        numbers = streams.take(f"integers{entry['size']}", count)
        return torch.from_numpy(numbers.astype(np.int64)).to(WHOLE[entry["type"]]).reshape(entry["shape"])
    if "weights" not in entry:
        return torch.from_numpy(streams.take("numbers", count).astype(np.float32)).reshape(entry["shape"])
    code = streams.take("positions", entry["bytes"]).tobytes()
    positions = rice_coding.decode(code, entry["bits"], entry["weights"])
    values = streams.take_values(entry["weights"], entry["scale"])
    if len(positions) and positions[-1] >= count:
        raise ValueError(f"tensor {entry['name']!r} has weights beyond its end")
    flat = np.zeros(count, dtype=np.float32)
    flat[positions] = values
    return torch.from_numpy(flat).reshape(entry["shape"])
