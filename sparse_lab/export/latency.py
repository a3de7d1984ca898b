"""How long networks take on this machine: one process, one after the other in turn, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

BATCHES = (1, 128)
ROUNDS = 15
SECONDS = 6.0  # after which no further round begins


def medians(candidates: Mapping[str, Callable[[Tensor], object]], images: Tensor) -> dict[str, float]:
    """Milliseconds for one call with `images` (N, 3, H, W) of each candidate, after a round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + SECONDS
    with torch.no_grad():
        for turn in range(ROUNDS + 1):
            for name, run in candidates.items():
                start = time.perf_counter()
                run(images)
                if turn:
                    times[name].append(time.perf_counter() - start)
            if turn and time.perf_counter() > end:
                break
    return {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}


def batch(images: Tensor, size: int) -> Tensor:
    """`size` images, the given ones over and over."""
    return images.repeat(-(-size // len(images)), 1, 1, 1)[:size].contiguous()


def by_batch(candidates: Mapping[str, Callable[[Tensor], object]], images: Tensor) -> dict[str, dict[str, float]]:
    """Candidate -> batch size (as text, for JSON) -> milliseconds a call."""
    found: dict[str, dict[str, float]] = {name: {} for name in candidates}
    for size in BATCHES:
        for name, milliseconds in medians(candidates, batch(images, size)).items():
            found[name][str(size)] = milliseconds
    return found
