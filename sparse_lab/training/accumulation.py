"""Which batches of an epoch add up to one optimizer step: `accumulate` in a row, and what is left at an epoch's end."""

from __future__ import annotations


def steps_of(batches: int, accumulate: int) -> int:
    """Return how many optimizer steps an epoch of so many batches has: its last, smaller group steps too."""
    return -(-batches // accumulate)


def group_size(batch: int, batches: int, accumulate: int) -> int:
    """Return how many batches step together with this one (from 0) of an epoch of so many."""
    return min(accumulate, batches - batch // accumulate * accumulate)


def steps_after(batch: int, batches: int, accumulate: int) -> bool:
    """Does the optimizer step after this batch (from 0) of an epoch of so many?"""
    return (batch + 1) % accumulate == 0 or batch + 1 == batches
