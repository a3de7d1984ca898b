"""Ratios are of the same round; the break-even lies where the ratio crosses 1."""

from __future__ import annotations

import pytest

from sparse_lab.bench.cells import TRAINING, Cell, Measured, Spread

WORK = ("vgg16", TRAINING, 128)


def _measured(ratios: dict[float, float], dense: float = 6.0) -> Measured:
    measured = Measured()
    measured.add(Cell(*WORK, "dense"), 1, dense)
    for sparsity, ratio in ratios.items():
        measured.add(Cell(*WORK, "sparse", "erk", sparsity), 1, dense / ratio)
    return measured


def test_a_ratio_is_the_median_over_rounds_in_which_both_were_measured():
    measured, sparse = Measured(), Cell(*WORK, "sparse", "erk", 99.0)
    # a disturbance in round 2 slows both; only sparse arithmetic came to its turn in round 4
    for turn, seconds in enumerate((4.0, 40.0, 4.4), start=1):
        measured.add(sparse.rival("dense"), turn, seconds)
    for turn, seconds in enumerate((1.0, 8.0, 1.0, 100.0), start=1):
        measured.add(sparse, turn, seconds)
    assert measured.ratio(sparse) == Spread(pytest.approx(4.4), 4.0, 5.0, 3)
    assert measured.time(sparse) == Spread(4.5, 1.0, 100.0, 4)
    assert measured.ratio(sparse, "bf16") is None


def test_the_best_dense_candidate_is_the_fastest_at_the_same_work():
    measured, sparse = _measured({90.0: 2.0}), Cell(*WORK, "sparse", "erk", 90.0)
    assert measured.best_dense(sparse) == "dense"
    measured.add(sparse.rival("compile"), 1, 7.0)
    measured.add(sparse.rival("bf16"), 1, 2.0)
    measured.add(Cell("vgg16", TRAINING, 1, "onnxruntime"), 1, 0.001)  # other work
    assert measured.best_dense(sparse) == "bf16"
    assert measured.break_even(*WORK, "erk") == "not up to 90%"  # 2 times float32, 2/3 of bf16


def test_break_even_is_interpolated_in_logarithms():
    # half as fast where 10% are kept, twice as fast where 1% are: as fast where 10^-1.5 are
    assert _measured({90.0: 0.5, 99.0: 2.0}).break_even(*WORK, "erk") == f"at {100 - 100 * 10**-1.5:.4g}%"
    assert _measured({95.0: 1.5, 99.0: 2.0}).break_even(*WORK, "erk") == "at 95% or below"
    assert _measured({95.0: 0.5, 99.0: 0.9}).break_even(*WORK, "erk") == "not up to 99%"
    # what counts is the sparsity from which on it stays faster
    assert _measured({80.0: 1.2, 90.0: 0.5, 99.0: 2.0}).break_even(*WORK, "erk").startswith("at 96.8")
    assert _measured({}).break_even(*WORK, "erk") == "not measured"
