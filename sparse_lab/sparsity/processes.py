"""The processes of one run (DDP). torch is imported only where there are several."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def rank() -> int:
    """Which process of a DDP run this is; 0 everywhere else."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def are_connected() -> bool:
    """Can the processes of a DDP run ask one another? Not before its first training has begun."""
    if "torch.distributed" not in sys.modules:
        return False
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def broadcast_from_rank0(seen: T) -> T:
    """What the first process of a DDP run has `seen` on disk: the others may look too early, or while it waits.

    Before the first training nothing is agreed: the others are started by it, and find what it has found.
    """
    if not are_connected():
        return seen
    from torch import distributed

    box = [seen]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def overwrite_from_rank0(tensors: Iterable[Tensor]) -> None:
    """Give all processes of a DDP run what the first one has in these tensors."""
    if are_connected():
        from torch import distributed

        for tensor in tensors:
            distributed.broadcast(tensor, src=0)
