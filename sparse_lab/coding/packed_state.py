"""A state (a network's, a whole checkpoint) whose sparse tensors are kept as positions and live numbers, and back.

A mask is a bool tensor at most half of which is True; its positions are coded once, whoever shares them. A tensor of
its shape (a weight, momentum, Adam's moments) that is zero everywhere else is kept as its numbers at those positions,
bit for bit, zeros among them. That is looked at, not believed: whatever is not so stays as it is. Zeros that are left
out come back as +0, as `Masks` leaves them.

The packed state is a dict of plain values and tensors, as torch.save takes them: `plain`, the state with None where a
tensor was taken out; `head`, JSON that says what was taken out where, deflated; and streams of bytes: `positions` (Rice
coded), `values` (at them), `small` (the small dense tensors, deflated, for each tensor of its own costs torch.save
some 300 bytes).
"""

from __future__ import annotations

import json
import math
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_lab.coding import head, rice_coding
from sparse_lab.errors import UserError

KIND = "sparse_lab packed state "
FORMAT = 1
STREAMS = ("head", "positions", "values", "small")
SMALL = 2**16  # bytes of a tensor that lies among the small ones
A_BYTE = 2**14  # bytes of tensors that a byte of a file may stand for; what stands for more is not packed
PIECE = 2**15  # numbers that are looked at at once: they stay in the cache
FAST = 1  # zlib's level: a checkpoint is written every epoch
LINE = 200  # characters of what is wrong with a file
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool,
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    )
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Place = tuple[str | int, ...]  # keys and indices that lead to a tensor


def packed(state: dict[str, Any]) -> dict[str, Any]:
    """Return the packed state; `state` itself where no mask lies in it. Tensors may be on any device."""
    found = _found(state)
    supports = _Supports([one.tensor for one in found])
    if not supports.entries:
        return state
    streams = _Writing(supports)
    for one in found:
        streams.put(one)
    said = streams.head()
    content: dict[str, bytes | bytearray] = {
        "head": zlib.compress(said, FAST),
        "positions": supports.code(),
        "values": streams.values,
        "small": zlib.compress(streams.small, FAST),
    }
    if streams.dense > A_BYTE * sum(map(len, content.values())) or len(said) > head.LONGEST:
        return state  # a reader would refuse it
    tensors = {name: _bytes(stream) for name, stream in content.items()}
    return {"format": f"{KIND}{FORMAT}", "plain": _without(state, streams.taken), **tensors}


def unpacked(payload: Any, path: str | Path) -> Any:
    """Return the state that a packed one from the file `path` stands for, anything else as it is. Raise UserError, in
    one line, where it contradicts itself.

    Memory for a tensor's zeros is asked for and not touched: a file takes no more than its size until somebody reads
    them, and stands for `A_BYTE` times its size at most.
    """
    mark = payload.get("format") if isinstance(payload, dict) else None
    if not isinstance(mark, str) or not mark.startswith(KIND):
        return payload
    if mark != f"{KIND}{FORMAT}":
        raise UserError(f"{path} is of a newer sparse_lab ({mark[:LINE]!r}): pip install --upgrade sparse_lab")
    try:
        return _Reading(payload).state()
    except (ValueError, zlib.error, MemoryError, RecursionError, RuntimeError) as error:
        line = " ".join(str(error).split())[:LINE]
        raise UserError(
            f"{path} is not what it says it is ({type(error).__name__}: {line}): remove it or name another"
        ) from None


@dataclass
class _Found:
    """A tensor and where it stands: in several places where they share it."""

    tensor: Tensor
    places: list[Place]


def _found(state: Any) -> list[_Found]:
    """The tensors that can be packed."""
    found: dict[tuple[Any, ...], _Found] = {}
    for place, tensor in _tensors(state, ()):
        if tensor.layout != torch.strided or tensor.requires_grad or tensor.dtype not in NAMES or not tensor.numel():
            continue
        if not (tensor.is_contiguous() or _is_channels_last(tensor)):
            continue
        same = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        found.setdefault(same, _Found(tensor, [])).places.append(place)
    return list(found.values())


def _tensors(value: Any, place: Place) -> Iterator[tuple[Place, Tensor]]:
    """Every plain tensor in dicts and lists, with the names and numbers that lead to it."""
    if type(value) is Tensor:
        yield place, value
    elif type(value) in (dict, OrderedDict):
        for key, one in value.items():
            if type(key) in (str, int):
                yield from _tensors(one, (*place, key))
    elif type(value) is list:
        for index, one in enumerate(value):
            yield from _tensors(one, (*place, index))


def _without(value: Any, taken: set[Place], place: Place = ()) -> Any:
    """A copy of `value` with None in these places."""
    if type(value) in (dict, OrderedDict):
        made = type(value)((key, _without(one, taken, (*place, key))) for key, one in value.items())
        if isinstance(value, OrderedDict):  # a state dict has the versions of its modules there
            vars(made).update(vars(value))
        return made
    if type(value) is list:
        return [_without(one, taken, (*place, index)) for index, one in enumerate(value)]
    return None if place in taken else value


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _bytes(content: bytes | bytearray) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())


def _numbers(tensor: Tensor) -> np.ndarray:
    """The tensor's numbers one after the other, as unsigned integers of their size."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().view(f"u{tensor.element_size()}")


def _count_nonzero(numbers: np.ndarray, signed: bool) -> int:
    """How many are not zero. signed: they are floats, of which one that has its sign alone is zero too."""
    count = 0
    for begin in range(0, len(numbers), PIECE):
        piece = numbers[begin : begin + PIECE]
        count += int(np.count_nonzero((piece << 1 if signed else piece) != 0))
    return count


@dataclass
class _Support:
    """Where a mask is True, in the order of a contiguous tensor."""

    index: int
    positions: np.ndarray


class _Supports:
    """The supports of all masks, each once, by shape."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.entries: list[dict[str, Any]] = []
        self._codes: list[bytes] = []
        self._by_shape: dict[torch.Size, list[_Support]] = {}
        self._masks: dict[int, _Support] = {}  # by id of the tensor
        known: dict[tuple[torch.Size, bytes], _Support] = {}
        for mask in tensors:
            if mask.dtype != torch.bool:
                continue
            flat = _numbers(mask).view(bool)
            count = np.count_nonzero(flat)
            if not count or 2 * count > len(flat):
                continue
            positions = np.flatnonzero(flat)
            key = mask.shape, positions.tobytes()
            if key not in known:
                known[key] = self._add(mask.shape, positions)
            self._masks[id(mask)] = known[key]
        for candidates in self._by_shape.values():
            candidates.sort(key=lambda one: len(one.positions))

    def _add(self, shape: torch.Size, positions: np.ndarray) -> _Support:
        bits, code = rice_coding.encode(positions)
        support = _Support(len(self.entries), positions)
        self.entries.append({"shape": list(shape), "count": len(positions), "bits": bits, "bytes": len(code)})
        self._codes.append(code)
        self._by_shape.setdefault(shape, []).append(support)
        return support

    def code(self) -> bytes:
        return b"".join(self._codes)

    def of(self, tensor: Tensor) -> tuple[int, bytes] | None:
        """The smallest support outside of which `tensor` is zero, and its bytes there; a mask has none. None where
        there is no such support.
        """
        if tensor.dtype == torch.bool:
            own = self._masks.get(id(tensor))
            return None if own is None else (own.index, b"")
        candidates = self._by_shape.get(tensor.shape, [])
        if not candidates:
            return None
        flat = _numbers(tensor)
        signed = tensor.dtype.is_floating_point
        nonzero = _count_nonzero(flat, signed)
        for one in candidates:
            if len(one.positions) >= nonzero:
                live = flat[one.positions]
                if _count_nonzero(live, signed) == nonzero:
                    return one.index, live.tobytes()
        return None


@dataclass
class _Writing:
    """What has been taken out of a state, and how it lies in the streams. dense: bytes that it takes as tensors."""

    supports: _Supports
    entries: list[dict[str, Any]] = field(default_factory=list)
    taken: set[Place] = field(default_factory=set)
    values: bytearray = field(default_factory=bytearray)
    small: bytearray = field(default_factory=bytearray)
    dense: int = 0

    def put(self, one: _Found) -> None:
        """Take the tensor out if it is sparse or small."""
        tensor, size = one.tensor, one.tensor.numel() * one.tensor.element_size()
        entry: dict[str, Any] = {"at": one.places, "dtype": NAMES[tensor.dtype]}
        if (on := self.supports.of(tensor)) is not None:
            entry["on"] = on[0]
            self.values += on[1]
        elif size <= SMALL:
            entry["shape"] = list(tensor.shape)
            self.small += _numbers(tensor).tobytes()
        else:
            return
        if not tensor.is_contiguous():
            entry["channels_last"] = True
        self.entries.append(entry)
        self.taken.update(one.places)
        self.dense += size

    def head(self) -> bytes:
        said = {"supports": self.supports.entries, "tensors": self.entries}
        return json.dumps(said, separators=(",", ":")).encode()


class _Reading:
    """The streams of a packed state, which somebody else may have written. Raises ValueError."""

    def __init__(self, payload: dict[str, Any]) -> None:
        if payload.keys() != {"format", "plain", *STREAMS}:
            raise ValueError("other parts than a packed state has")
        self.plain = head.mapping(payload, "plain")
        streams = {name: _stream(payload, name) for name in STREAMS}
        self.most = A_BYTE * sum(map(len, streams.values()))
        self.said = head.parsed(bytes(_inflated(streams["head"], head.LONGEST)))
        head.only(self.said, ("supports", "tensors"))
        self.values, self.codes, self.packed_small = streams["values"], streams["positions"], streams["small"]

    def state(self) -> dict[str, Any]:
        supports = [self._support(entry) for entry in head.items(self.said, "supports")]
        entries = [self._entry(entry, supports) for entry in head.items(self.said, "tensors")]
        if (dense := sum(one.dense for one in entries)) > self.most:
            raise ValueError(f"it stands for {dense:,} bytes, and at most {self.most:,} are taken from such a file")
        small = _inflated(self.packed_small, sum(one.length for one in entries if one.on is None))
        for one in entries:
            if one.on is None:
                content, small = small[: one.length], small[one.length :]
            else:
                content, self.values = self.values[: one.length], self.values[one.length :]
            tensor = one.tensor(content)
            for place in one.places:
                _put(self.plain, place, tensor)
        if len(small) or len(self.values) or len(self.codes):
            raise ValueError("more numbers than tensors")
        return self.plain

    def _support(self, entry: Any) -> tuple[tuple[int, ...], np.ndarray]:
        head.only(entry, ("shape", "count", "bits", "bytes"))
        length = head.whole(entry, "bytes", 0, len(self.codes))
        code, self.codes = self.codes[:length], self.codes[length:]
        count, bits = head.whole(entry, "count", 0, 8 * length), head.whole(entry, "bits", 0, rice_coding.MOST_BITS)
        positions = rice_coding.decode(bytes(code), bits, count)
        shape = head.wholes(entry, "shape", 0, 2**48)
        if len(positions) and positions[-1] >= math.prod(shape):
            raise ValueError("positions beyond the shape")
        return shape, positions

    def _entry(self, entry: Any, supports: list[tuple[tuple[int, ...], np.ndarray]]) -> _Entry:
        sparse = isinstance(entry, dict) and "on" in entry
        head.only(entry, ("at", "dtype", "channels_last", "on" if sparse else "shape"))
        places, dtype = head.items(entry, "at"), DTYPES[head.choice(entry, "dtype", tuple(DTYPES))]
        on = None
        if sparse:
            shape, on = supports[head.whole(entry, "on", 0, len(supports) - 1)]
        else:
            shape = head.wholes(entry, "shape", 0, SMALL)
        last = "channels_last" in entry and head.choice(entry, "channels_last", (True,))
        if last and len(shape) != 4:
            raise ValueError("channels_last is of four sizes")
        return _Entry(places, dtype, shape, on, last)


@dataclass(frozen=True)
class _Entry:
    """A tensor that was taken out. on: the positions of its numbers; None where it is among the small ones."""

    places: list[Any]
    dtype: torch.dtype
    shape: tuple[int, ...]
    on: np.ndarray | None
    channels_last: bool

    @property
    def dense(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def length(self) -> int:
        """Bytes of its numbers in their stream."""
        if self.on is None:
            return self.dense
        return 0 if self.dtype == torch.bool else len(self.on) * self.dtype.itemsize

    def tensor(self, content: memoryview) -> Tensor:
        """The tensor whose numbers are these. Raise ValueError where they are not as many."""
        if len(content) != self.length:
            raise ValueError("fewer numbers than tensors")
        numbers = torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())
        numbers = numbers != 0 if self.dtype == torch.bool else numbers.view(self.dtype)
        if self.on is None:
            made = numbers.view(self.shape)
            return made.contiguous(memory_format=torch.channels_last) if self.channels_last else made
        # numpy leaves zeros to the system, which makes a page when it is written to
        dense = torch.from_numpy(np.zeros(self.dense, dtype=np.uint8)).view(self.dtype)
        shape, order = self.shape, tuple(range(len(self.shape)))
        if self.channels_last:
            shape, order = tuple(self.shape[axis] for axis in (0, 2, 3, 1)), (0, 3, 1, 2)
        dense[torch.from_numpy(self._places())] = True if self.dtype == torch.bool else numbers
        return dense.view(shape).permute(order)

    def _places(self) -> np.ndarray:
        """The positions in the order in which the tensor lies."""
        assert self.on is not None
        if not self.channels_last:
            return self.on
        images, channels, rows, columns = np.unravel_index(self.on, self.shape)
        _, depth, height, width = self.shape
        return ((images * height + rows) * width + columns) * depth + channels


def _stream(payload: dict[str, Any], name: str) -> memoryview:
    found = head.field(payload, name)
    if type(found) is not Tensor or found.dtype != torch.uint8 or found.dim() != 1 or not found.is_contiguous():
        raise ValueError(f"{name} is no stream of bytes")
    return memoryview(found.numpy().data)


def _inflated(stream: memoryview, most: int) -> memoryview:
    """What was deflated. Raise ValueError where it is more than `most` bytes."""
    inflater = zlib.decompressobj()
    content = inflater.decompress(stream, most + 1)  # 0 would mean no limit
    if len(content) > most or not inflater.eof or inflater.unused_data:
        raise ValueError(f"a stream that does not unpack to at most {most:,} bytes")
    return memoryview(content)


def _put(plain: dict[str, Any], place: Any, tensor: Tensor) -> None:
    """Put a tensor where None stands. Raise ValueError for a place that is not there."""
    if not isinstance(place, list) or not place or not all(type(key) in (str, int) for key in place):
        raise ValueError("a place that is none")
    within, found = None, plain
    for key in place:
        within = found
        there = key in within if isinstance(within, dict) else isinstance(within, list) and key in range(len(within))
        if not there:
            raise ValueError(f"no place {str(key)[:40]!r}")
        found = within[key]
    if found is not None:
        raise ValueError(f"{str(place[-1])[:40]!r} is taken")
    within[place[-1]] = tensor  # type: ignore[index]
