"""Lightning callbacks: for the runner, and for anybody's Trainer."""

from __future__ import annotations

from sparse_lab.callbacks.sparsify import (
    CyclicSparsityCallback,
    DropAndGrowCallback,
    DyReLUPhasingCallback,
    PruneCallback,
    RegrowCallback,
    Sparsify,
)

__all__ = [
    "CyclicSparsityCallback",
    "DropAndGrowCallback",
    "DyReLUPhasingCallback",
    "PruneCallback",
    "RegrowCallback",
    "Sparsify",
]
