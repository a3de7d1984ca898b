"""What stands where a tensor would stand while a network computes: a map in the blocked layout.

`BatchInnermost` is a tensor without memory of its own. Functions of torch that are handed one are answered by kernels,
or by torch on `plain()`, an unpacked copy that hangs in torch's own graph (`dispatch`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_lab.sparse_cpu.autograd import Entry, Exit, Tape, Value, as_tensor
from sparse_lab.sparse_cpu.conv import Conv
from sparse_lab.sparse_cpu.layout import Shape, block_size
from sparse_lab.sparse_cpu.ops import Norm
from sparse_lab.sparse_cpu.reading import MAP, Reading, Sizes, is_view, reread, shape_of

Pending = Value | Conv | Norm
CPU = torch.device("cpu")


class Map:
    """Memory that several readings may share: in the blocked layout, and once torch has asked for it as a tensor too.

    home: how the tensor lies in memory. What torch changes in place is changed in the tensor, which is the truth then.
    base: the map that this one is a part of, and which of its channels: their tensors are one.
    """

    def __init__(
        self, tape: Tape, pending: Pending, home: Reading = MAP, base: tuple[Map, slice] | None = None
    ) -> None:
        self.tape = tape
        self.home = home
        self.is_seen = base is not None  # has the tensor, or may have, other readers than this?
        self._base = base
        self._pending = pending
        self._plain: Tensor | None = None
        self._version = -1

    @property
    def pending(self) -> Pending:
        """How the map is made; others may still join in."""
        if self._base is not None and self._base[0].is_unpacked:
            self.plain()
        # of a tensor made in inference mode nobody knows whether it was changed
        if self._plain is not None and (self._plain.is_inference() or self._plain._version != self._version):
            self._pending = entry(self.tape, self._plain, self.home, self._pending.shape)
            self._note(self._plain)
        return self._pending

    def _note(self, plain: Tensor) -> None:
        self._plain, self._version = plain, -1 if plain.is_inference() else plain._version

    @property
    def is_unpacked(self) -> bool:
        return self._plain is not None

    @property
    def sizes(self) -> Sizes:
        return self._pending.shape.sizes

    def value(self) -> Value:
        """The map, computed now if it was not before."""
        pending = self.pending
        if isinstance(pending, Value):
            return pending
        self._pending = pending.value()
        return self._pending

    def plain(self) -> Tensor:
        """The tensor, contiguous as `home` reads it."""
        if self._plain is None and self._base is not None:
            self._plain, self._version = self._base[0].part(self._base[1])
        if self._plain is None:
            self.is_seen = True
            value = self.value()
            if value.edge is None:
                self._note(as_tensor(value, self.home))
            else:
                with torch.enable_grad():
                    self._note(Exit.apply(value.edge, self.tape, value, self.home))
            self._first = self._version
        assert self._plain is not None
        return self._plain

    def part(self, channels: slice) -> tuple[Tensor, int]:
        """These channels of the tensor, a view; and its version before anybody changed it."""
        whole = self.plain()
        place = self.home.index((1,))
        with torch.set_grad_enabled(self.tape.recording):
            return whole.narrow(place, channels.start, channels.stop - channels.start), self._first

    def replace(self, pending: Pending) -> None:
        """Become another map in place: nobody has seen the tensor."""
        self._pending = pending


def entry(tape: Tape, tensor: Tensor, reading: Reading, shape: Shape | None = None) -> Value:
    """The map that a tensor sees by `reading`."""
    if shape is None:
        sizes = _sizes_of(tensor, reading)
        shape = Shape(*sizes, block_size(sizes[0]))
    return Entry(tape, tensor, reading, shape).value()


def _sizes_of(tensor: Tensor, reading: Reading) -> Sizes:
    found = {group[0]: size for group, size in zip(reading, tensor.shape, strict=True)}
    return tuple(found.get(axis, 1) for axis in range(4))  # type: ignore[return-value]


class BatchInnermost(Tensor):
    """A map as the network sees it, by `reading`."""

    map: Map
    reading: Reading
    _view: Tensor | None
    _known: tuple[Any, ...]
    read_shape: tuple[int, ...]  # its shape, without asking torch

    @staticmethod
    def __new__(cls, map: Map, reading: Reading | None = None) -> BatchInnermost:
        reading = map.home if reading is None else reading
        shape = shape_of(reading, map.sizes)
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=map.tape.kind, device=CPU)
        made.map, made.reading, made._view, made.read_shape = map, reading, None, shape
        return made

    @property
    def tape(self) -> Tape:
        return self.map.tape

    @property
    def sizes(self) -> Sizes:
        """(N, C, H, W), however it is read."""
        return self.map.sizes

    def value(self) -> Value:
        return self.map.value()

    def plain(self) -> Tensor:
        """As torch has it: a view of the map's tensor, the same one each time."""
        if self._view is None:
            whole = self.map.plain()
            with torch.set_grad_enabled(self.tape.recording):
                self._view = reread(whole, self.map.home, self.reading, self.sizes)
                if self._view is whole:
                    self._view = whole.view_as(whole)
            self._known = _lies(self._view)
        return self._view

    @property
    def is_plain(self) -> bool:
        """Has torch made another tensor of it in place, of another shape or with other memory?"""
        return self._view is not None and self._known != _lies(self._view)

    def read_as(self, reading: Reading) -> BatchInnermost:
        """The same memory, read otherwise; a copy where torch would have to make one."""
        if is_view(reading, self.map.home, self.sizes):
            return BatchInnermost(self.map, reading)
        return BatchInnermost(Map(self.tape, self.map.value(), reading))

    def copied(self) -> BatchInnermost:
        """Memory of its own, contiguous as it is read."""
        return BatchInnermost(Map(self.tape, self.map.value(), self.reading))

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = first_map((args, kwargs))
        assert found is not None
        return found.tape.answer(found.tape, function, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Where Python is not asked: in compiled or scripted parts of a network."""
        from torch.utils._pytree import tree_map

        found = first_map((args, kwargs))
        if found is not None and found.tape.recording and found.value().needs_gradient:
            raise NotImplementedError(
                f"compute=sparse cannot follow gradients through scripted code ({function}): use compute=dense"
            )
        args, kwargs = tree_map(lambda one: one.plain() if isinstance(one, BatchInnermost) else one, (args, kwargs))
        return function(*args, **(kwargs or {}))


def _lies(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.data_ptr()


def first_map(found: Any) -> BatchInnermost | None:
    """The first map among arguments, in lists and dicts too."""
    if isinstance(found, BatchInnermost):
        return found
    if isinstance(found, dict):
        found = found.values()
    elif not isinstance(found, tuple | list):
        return None
    return next((one for part in found if (one := first_map(part)) is not None), None)
