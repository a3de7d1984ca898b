"""Ascending positions in few bits: the gaps between them, Rice coded (Golomb 1966; Rice 1979).

A gap's lower `bits` bits lie side by side, then its upper part stands as so many zeros and a one; both streams end on a
whole byte. Within 2% of the entropy of positions at random.
"""

from __future__ import annotations

import math

import numpy as np

MOST_BITS = 40


def entropy(density: float) -> float:
    """Bits that any code needs for each place, where a share of them is taken at random."""
    shares = density, 1.0 - density
    return -sum(share * math.log2(share) for share in shares if share > 0.0)


def encode(positions: np.ndarray) -> tuple[int, bytes]:
    """Bits and code of ascending, distinct positions from 0 up; the number of positions is not in it."""
    gaps = np.diff(positions, prepend=-1) - 1
    if len(gaps) and gaps.min() < 0:
        raise ValueError("positions must ascend from 0 up")
    bits = _bits(gaps)
    low = (gaps[:, None] >> np.arange(bits)) & 1
    upper = np.cumsum((gaps >> bits) + 1)
    ones = np.zeros(int(upper[-1]) if len(upper) else 0, dtype=np.uint8)
    ones[upper - 1] = 1
    return bits, np.packbits(low.astype(np.uint8).ravel()).tobytes() + np.packbits(ones).tobytes()


def _bits(gaps: np.ndarray) -> int:
    """How many lower bits make the code shortest: its length falls with each more, then rises for good."""
    length = int(gaps.sum())
    for bits in range(MOST_BITS):
        shorter = len(gaps) * (bits + 1) + int((gaps >> (bits + 1)).sum())
        if shorter >= length:
            return bits
        length = shorter
    return MOST_BITS


def decode(code: bytes, bits: int, count: int) -> np.ndarray:
    """The `count` positions (int64) that were encoded. Raises ValueError when the code holds another number of them."""
    size = -(-count * bits // 8)
    raw = np.frombuffer(code, dtype=np.uint8)
    if not 0 <= bits <= MOST_BITS or len(raw) < size:
        raise ValueError(f"no room for {count:,} positions of {bits} bits")
    ends = np.flatnonzero(np.unpackbits(raw[size:]))
    if len(ends) != count:
        raise ValueError(f"{len(ends)} positions, not {count}")
    gaps = np.diff(ends, prepend=-1) - 1
    if len(ends) and (int(ends[-1]) + 1) << bits >= 2**62:
        raise ValueError("positions beyond 64 bits")
    gaps <<= bits
    low = np.unpackbits(raw[:size], count=count * bits).reshape(count, bits)
    for place in range(bits):
        gaps += low[:, place].astype(np.int64) << place
    return np.cumsum(gaps + 1) - 1
