"""Schedules against closed forms."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_lab.sparsity.schedules import Constant, Cubic, Iterative, OneShot, Regrowth, Schedule

EVERY_KIND: list[Schedule] = [
    OneShot(0.9, at=5),
    Constant(0.9),
    Iterative(0.9, 0.2, every=10),
    Cubic(0.9, begin=0, end=100, every=10),
    Regrowth(0.99, 0.9, steps=3, every=10),
]


def _due(schedule: Schedule, steps: int) -> list[int]:
    return [step for step in range(steps) if schedule.due(step)]


def test_one_shot() -> None:
    schedule = OneShot(0.98, at=7)
    assert _due(schedule, 100) == [7]
    assert [schedule.sparsity(step) for step in (0, 6, 7, 8, 99)] == [0.0, 0.0, 0.98, 0.98, 0.98]
    assert _due(OneShot(0.98), 100) == [0]


def test_constant() -> None:
    schedule = Constant(0.97)
    assert _due(schedule, 50) == [0]
    assert {schedule.sparsity(step) for step in range(50)} == {0.97}


@pytest.mark.parametrize(
    ("share", "rounds", "target"),
    [
        (0.2, 20, 0.9885),  # 1 - 0.8^20 = 0.98847: the paper's point, written with two decimals of a percent
        (0.2, 20, 1 - 0.8**20),
        (0.4, 10, 0.9940),
        (0.4, 10, 1 - 0.6**10),
        (0.3, 15, 0.9953),
        (0.5, 3, 0.875),
        (0.2, 1, 0.2),
    ],
)
def test_iterative_takes_as_many_rounds_as_the_closed_form(share: float, rounds: int, target: float) -> None:
    schedule = Iterative(target, share, every=40)
    assert schedule.rounds() == rounds
    assert _due(schedule, 40 * (rounds + 5)) == [40 * k for k in range(rounds)]
    for k in range(1, rounds):
        for step in (40 * (k - 1), 40 * k - 1):
            assert schedule.sparsity(step) == pytest.approx(1 - (1 - share) ** k, abs=1e-12)
    assert schedule.sparsity(40 * (rounds - 1) - 1) < target or rounds == 1
    for step in (40 * (rounds - 1), 40 * rounds - 1, 40 * rounds + 1000):
        assert schedule.sparsity(step) == target


def test_the_last_round_takes_only_what_is_left() -> None:
    schedule = Iterative(0.9, 0.2, every=1)  # log 0.1 / log 0.8 = 10.3
    assert schedule.rounds() == 11
    assert schedule.sparsity(9) == pytest.approx(1 - 0.8**10)
    assert schedule.sparsity(10) == 0.9


def test_iterative_from_a_sparse_start() -> None:
    schedule = Iterative(0.99, 0.5, every=1, initial=0.92)  # 0.08 -> 0.04 -> 0.02 -> 0.01
    assert schedule.rounds() == 3
    assert [schedule.sparsity(step) for step in range(3)] == pytest.approx([0.96, 0.98, 0.99])
    already = Iterative(0.9, 0.5, every=1, initial=0.9)
    assert (already.rounds(), already.sparsity(0)) == (1, 0.9)


@given(st.floats(0.01, 0.9999), st.floats(0.05, 0.9), st.integers(1, 9))
def test_iterative_climbs_by_at_most_its_share_and_ends_exactly(target: float, share: float, every: int) -> None:
    schedule = Iterative(target, share, every)
    ends = [schedule.sparsity(k * every) for k in range(schedule.rounds())]
    assert ends[-1] == target
    remaining = 1.0
    for end in ends:
        assert end <= target
        # the last round may take a little more, so that a rounded target costs no round of its own
        assert remaining * (1 - share) * 0.85 <= 1 - end < remaining
        remaining = 1 - end


def test_cubic_is_zhu_and_guptas_formula() -> None:
    schedule = Cubic(0.98, begin=100, end=500, every=50, initial=0.2)
    assert _due(schedule, 1000) == [100, 150, 200, 250, 300, 350, 400, 450, 500]
    assert schedule.sparsity(0) == schedule.sparsity(99) == 0.0
    assert schedule.sparsity(100) == pytest.approx(0.2)
    assert schedule.sparsity(300) == pytest.approx(0.98 - 0.78 * 0.5**3)
    assert schedule.sparsity(400) == pytest.approx(0.98 - 0.78 * 0.25**3)
    assert schedule.sparsity(500) == schedule.sparsity(501) == schedule.sparsity(10_000) == 0.98


def test_cubic_is_due_at_its_end_even_off_the_beat() -> None:
    schedule = Cubic(0.9, begin=3, end=20, every=7)
    assert _due(schedule, 100) == [3, 10, 17, 20]
    assert schedule.sparsity(20) == 0.9


@pytest.mark.parametrize("at", [0, 4])
def test_a_cubic_of_no_length_goes_straight_to_the_target(at: int) -> None:
    """begin and end are fractions of a run: in a short one they may fall on the same step."""
    schedule = Cubic(0.9, begin=at, end=at, every=100)
    assert _due(schedule, 20) == [at]
    assert schedule.sparsity(at) == 0.9


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_regrowth_goes_down_in_equal_steps_to_exactly_its_end(steps: int) -> None:
    schedule = Regrowth(0.9885, 0.9685, steps, every=30)
    assert _due(schedule, 30 * (steps + 4)) == [30 * k for k in range(steps)]
    for k in range(steps):
        assert schedule.sparsity(30 * k) == pytest.approx(0.9885 - 0.02 * (k + 1) / steps, abs=1e-12)
        assert schedule.sparsity(30 * k) == schedule.sparsity(30 * k + 29)
    assert schedule.sparsity(30 * (steps - 1)) == schedule.sparsity(10_000) == 0.9685
    later = Regrowth(0.9885, 0.9685, steps, every=30, begin=40)
    assert _due(later, 40 + 30 * (steps + 4)) == [40 + 30 * k for k in range(steps)]
    assert {later.sparsity(step) for step in range(40)} == {0.9885}
    assert [later.sparsity(step + 40) for step in range(200)] == [schedule.sparsity(step) for step in range(200)]


@pytest.mark.parametrize("schedule", EVERY_KIND, ids=lambda schedule: type(schedule).__name__)
def test_schedules_are_frozen_and_have_no_memory(schedule: Schedule) -> None:
    forwards = [(schedule.due(step), schedule.sparsity(step)) for step in range(120)]
    backwards = [(schedule.due(step), schedule.sparsity(step)) for step in reversed(range(120))]
    assert forwards == backwards[::-1]
    assert forwards[-1] == (False, 0.9)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.target = 0.5  # type: ignore[attr-defined]
