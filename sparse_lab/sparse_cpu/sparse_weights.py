"""The positions that a mask keeps, in the orders in which the kernels walk through them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from sparse_lab.sparse_cpu.weight_kernels import buckets

Found = TypeVar("Found")
RECORDS = 64  # of a mask: a network whose shapes are others in every step does not gather them without end


@dataclass(frozen=True)
class Order:
    """Kept weights sorted by (slice of the other channels, channel, kernel row); those of slice s, channel c and row r
    begin at first[(s * number of channels + c) * rows + r].

    entries: [kept] index into `Live.positions`; inner, row, column: [kept] the other channel and the tap. Only
    `channels` have entries.
    """

    first: NDArray[np.int64]
    entries: NDArray[np.int64]
    inner: NDArray[np.int64]
    row: NDArray[np.int64]
    column: NDArray[np.int64]
    channels: NDArray[np.int64]


class Record:
    """What is worked out once for one mask: see `SparseWeight.record`."""

    def __init__(self, positions: NDArray[np.int64]) -> None:
        self.positions = positions
        self._found: dict[Hashable, Any] = {}

    def once(self, name: Hashable, make: Callable[[], Found]) -> Found:
        """What `make` gave when this was first asked for."""
        found: Found | None = self._found.get(name)
        if found is None:
            if len(self._found) >= RECORDS:
                self._found.clear()
            found = self._found[name] = make()
        return found


class SparseWeight:
    """One counted weight: what its mask keeps, and the gradient there.

    positions: int64 [kept], flat and ascending. gradient: [kept] in the weight's dtype, or None before a backward pass.
    A changed mask is noticed by itself.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.gradient: NDArray | None = None
        self._positions = np.empty(0, np.int64)
        self._seen: tuple[Tensor, int] | None = None  # the mask itself, for an id may soon be another's
        self._orders: dict[tuple[object, ...], Order] = {}
        self._offsets: dict[tuple[object, ...], NDArray[np.int64]] = {}
        self._records: dict[tuple[object, ...], Record] = {}

    @property
    def positions(self) -> NDArray[np.int64]:
        mask = self.layer._buffers["mask"]  # asked for hundreds of times a step: `get_buffer` takes ten times as long
        assert mask is not None
        if self._seen is None or self._seen[0] is not mask or self._seen[1] != mask._version:
            positions = np.flatnonzero(mask.numpy().reshape(-1))
            if not np.array_equal(positions, self._positions):
                self._positions = positions
                self._forget()
                self.gradient = None
            self._seen = mask, mask._version
        return self._positions

    def _forget(self) -> None:
        self._orders, self._offsets, self._records = {}, {}, {}

    def record(self, *key: object) -> Record:
        """What has been worked out for this mask and this key, to be used again and added to. Everything that it
        depends on besides the mask stands in the key.
        """
        positions = self.positions  # a new mask has no records
        found = self._records.get(key)
        if found is None:
            if len(self._records) >= RECORDS:  # masks of other layers change what this one reads, and it stays as it is
                self._forget()
            found = self._records[key] = Record(positions)
        return found

    @property
    def values(self) -> NDArray:
        """[kept] the weights themselves, a copy."""
        return self.flat[self.positions]

    @property
    def flat(self) -> NDArray:
        """All weights, masked ones too, where they lie."""
        return self.weight.detach().numpy().reshape(-1)

    @property
    def weight(self) -> nn.Parameter:
        found = self.layer._parameters.get("weight")
        return self.layer.get_parameter("weight") if found is None else found

    def add(self, gradient: NDArray) -> None:
        """One more use of this weight."""
        self.gradient = gradient if self.gradient is None else self.gradient + gradient

    def order(
        self,
        side: str,
        shape: tuple[int, ...],
        groups: int,
        among: NDArray[np.bool_] | None = None,
        slices: int = 1,
    ) -> Order:
        """Entries of a filter of `shape` (outputs, inputs / groups, rows, columns).

        side: 'output' sorts by output channel and kernel row, for the forward pass and the weight's gradient; 'input'
        by input channel and kernel row from the last to the first, for the input's gradient. among: [inputs] entries
        that read other channels are left out. slices: of the other channels.
        """
        positions = self.positions
        key = side, shape, b"" if among is None else among.tobytes(), slices
        if key not in self._orders:
            if slices > 1:
                others = shape[1] * groups if side == "output" else shape[0]
                self._orders[key] = _sliced(self.order(side, shape, groups, among), others, slices)
            else:
                whole = _sorted(positions, shape, groups, side)
                self._orders[key] = whole if among is None else _among(whole, among, shape[2], side)
        return self._orders[key]

    def offsets(
        self,
        side: str,
        shape: tuple[int, ...],
        groups: int,
        height: int,
        pitch: int,
        block: int,
        pad: tuple[int, int],
        among: NDArray[np.bool_] | None = None,
        slices: int = 1,
    ) -> NDArray[np.int64]:
        """[kept] how far each entry's row lies from the row that it is added to, for `conv_kernels.rows`."""
        order = self.order(side, shape, groups, among, slices)
        key = (side, shape, height, pitch, block, pad, b"" if among is None else among.tobytes(), slices)
        if key not in self._offsets:
            sign = 1 if side == "output" else -1
            down, right = sign * (order.row - pad[0]), sign * (order.column - pad[1])
            self._offsets[key] = (order.inner * height + down) * pitch + right * block
        return self._offsets[key]


def _among(order: Order, among: NDArray[np.bool_], rows: int, side: str) -> Order:
    """Without the entries that read other input channels."""
    counts = np.diff(order.first)
    bucket = np.repeat(np.arange(counts.size), counts)
    kept = among[order.inner if side == "output" else bucket // rows]
    first = np.concatenate([[0], np.cumsum(np.bincount(bucket[kept], minlength=counts.size))]).astype(np.int64)
    entries, inner, row, column = (one[kept] for one in (order.entries, order.inner, order.row, order.column))
    return Order(first, entries, inner, row, column, np.flatnonzero(np.diff(first[::rows])))


def _sliced(order: Order, others: int, slices: int) -> Order:
    """The same entries, those of the first slice of the other channels first."""
    counts = np.diff(order.first)
    bucket = order.inner * slices // others * counts.size + np.repeat(np.arange(counts.size), counts)
    first, place = buckets(bucket, slices * counts.size)
    entries, inner, row, column = (one[place] for one in (order.entries, order.inner, order.row, order.column))
    return Order(first, entries, inner, row, column, order.channels)


def _sorted(positions: NDArray[np.int64], shape: tuple[int, ...], groups: int, side: str) -> Order:
    outputs, inputs, rows, columns = shape
    rest, column = np.divmod(positions, columns)
    rest, row = np.divmod(rest, rows)
    output, inner = np.divmod(rest, inputs)
    inner = inner + output // (outputs // groups) * inputs
    if side == "output":
        first, entries = buckets(output * rows + row, outputs * rows)
        other = inner
    else:
        first, entries = buckets(inner * rows + (rows - 1 - row), inputs * groups * rows)
        other = output
    channels = np.flatnonzero(np.diff(first[::rows]))
    return Order(first, entries, other[entries], row[entries], column[entries], channels)


def sparse_weights(model: nn.Module) -> dict[nn.Parameter, SparseWeight]:
    """Every weight of `model` that has a mask beside it."""
    return {
        module.weight: SparseWeight(module)
        for module in model.modules()
        if isinstance(getattr(module, "mask", None), Tensor) and isinstance(module.weight, nn.Parameter)
    }
