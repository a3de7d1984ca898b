"""Positions in and out of their code, and its length against the entropy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lab.coding.rice_coding import decode, encode


@settings(deadline=None, max_examples=200, derandomize=True, database=None)
@given(st.sets(st.integers(0, 2**36), max_size=60))
def test_positions_come_back(positions) -> None:
    wanted = np.array(sorted(positions), dtype=np.int64)
    bits, code = encode(wanted)
    assert np.array_equal(decode(code, bits, len(wanted)), wanted)


@pytest.mark.parametrize("density", [0.5, 0.1, 0.01, 0.001])
def test_the_code_is_near_the_entropy(density) -> None:
    rng = np.random.default_rng(0)
    positions = np.flatnonzero(rng.random(2_000_000) < density)
    entropy = -(density * math.log2(density) + (1 - density) * math.log2(1 - density)) * 2_000_000 / 8
    assert len(encode(positions)[1]) <= 1.05 * entropy


def test_what_does_not_ascend_and_what_is_cut_short_is_refused() -> None:
    with pytest.raises(ValueError, match="ascend"):
        encode(np.array([3, 3]))
    bits, code = encode(np.arange(0, 4000, 40))
    for wrong in (code[:-1], code + b"\1", code[:3]):
        with pytest.raises(ValueError):
            decode(wrong, bits, 100)
