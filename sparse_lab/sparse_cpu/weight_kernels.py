"""Kept weights in the order in which other kernels walk through them."""

from __future__ import annotations

import numpy as np

from sparse_lab.sparse_cpu.kernel import KERNEL, kernel


@kernel(**KERNEL)
def buckets(bucket, number):
    """Stable counting sort: where each bucket begins, and the indices in order."""
    first = np.zeros(number + 1, np.int64)
    for one in bucket:
        first[one + 1] += 1
    first = np.cumsum(first)
    place = first[:-1].copy()
    entries = np.empty(len(bucket), np.int64)
    for index in range(len(bucket)):
        one = bucket[index]
        entries[place[one]] = index
        place[one] += 1
    return first, entries
