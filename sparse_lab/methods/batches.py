"""The batches that scores look at, out of whatever a user's loop iterates over."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sized
from typing import Any

import torch
from torch import Tensor

from sparse_lab.errors import SparseLabError
from sparse_lab.sparsity.scores import Batches

NONE = "this score looks at data, and no batch came: give batches=, a loader of (inputs, targets)"
Source = Iterable[Any] | Callable[[], Iterable[Any]]


class GivenBatches:
    """Batches of (inputs, targets): a DataLoader, a list, or a function that makes either. Raises SparseLabError where
    there are none, or they are something else.
    """

    def __init__(self, source: Source | None) -> None:
        self.source = source

    def shape(self) -> tuple[int, ...] | None:
        """Return the shape of one input, of batches that need not be drawn for it."""
        if not isinstance(self.source, (list, tuple)) or not self.source:
            return None
        return tuple(_checked(self.source[0])[0].shape[1:])

    def fixed(self, count: int) -> Batches:
        found = [_checked(batch) for batch in itertools.islice(self._all(), count)]
        if not found:
            raise SparseLabError(NONE)
        return found

    def balanced(self, per_class: int) -> Batches:
        """Return one batch, of the first images of each class that come."""
        inputs, targets = [], []
        seen: dict[int, int] = {}
        for images, labels in map(_checked, self._all()):
            if labels.dim() != 1 or labels.is_floating_point():
                raise SparseLabError(
                    "per_class counts images of each class: targets must be class numbers, one an image"
                )
            if len(images) != len(labels):
                raise SparseLabError(f"batches: {len(images)} inputs, and {len(labels)} targets beside them")
            for image, label in zip(images, labels, strict=True):
                number = int(label)
                if seen.setdefault(number, 0) < per_class:
                    seen[number] += 1
                    inputs.append(image)
                    targets.append(label)
        if not inputs:
            raise SparseLabError(NONE)
        return [(torch.stack(inputs), torch.stack(targets))]

    def _all(self) -> Iterable[Any]:
        found = self.source() if callable(self.source) else self.source
        if found is None or (isinstance(found, Sized) and len(found) == 0):
            raise SparseLabError(NONE)
        if not isinstance(found, Iterable):
            raise SparseLabError(f"batches={type(found).__name__}: give a loader, or a list, of (inputs, targets)")
        return found


def _checked(batch: Any) -> tuple[Tensor, Tensor]:
    pair = isinstance(batch, (list, tuple)) and len(batch) == 2
    if not pair or not all(isinstance(one, Tensor) for one in batch):
        raise SparseLabError(f"batches: (inputs, targets) of tensors each, not {type(batch).__name__}")
    return batch[0], batch[1]
