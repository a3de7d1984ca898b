"""Cycles of density and the moves that follow them, against closed forms, exact fractions and numpy."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_lab.errors import SparseLabError
from sparse_lab.sparsity.mask_updates import move_to
from sparse_lab.sparsity.masks import Masks, num_kept
from sparse_lab.sparsity.schedules import Cyclic, DropFraction

LENGTHS = [(10,), (1,), (7, 13), (50, 100), (8, 0, 8), (0, 5), (5, 0), (0, 0), (1, 1, 1), (12, 30, 5, 9)]


def _positions(lengths: tuple[int, ...], last: int) -> list[Fraction]:
    """Where in its cycle every step from 0 to `last` is; at a boundary and after the end: 0."""
    walk = [Fraction(k, length) for length in lengths for k in range(length)]
    return (walk + [Fraction(0)] * (last + 1))[: last + 1]


def _due(lengths: tuple[int, ...], every: int) -> set[int]:
    """Each cycle's multiples of `every`, and the end of each cycle."""
    steps, begin = set(), 0
    for length in lengths:
        steps |= {begin + k for k in range(every, length, every)}
        begin += length
        steps |= {begin} if length else set()
    return steps


@pytest.mark.parametrize("multiplier", [1.0, 2.0, 3.0, 7.5])
@pytest.mark.parametrize("target", [0.9, 0.999, 0.9999])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_densities_at_every_step(lengths: tuple[int, ...], target: float, multiplier: float) -> None:
    cosine = Cyclic(target, lengths, multiplier, every=3)
    triangular = Cyclic(target, lengths, multiplier, every=3, shape="triangular")
    lowest = 1 - Fraction(target)
    highest = Fraction(multiplier) * lowest
    assert cosine.end == triangular.end == sum(lengths)
    for step, p in enumerate(_positions(lengths, sum(lengths) + 20)):
        up = lowest + (highest - lowest) * 2 * min(p, 1 - p)
        assert abs(1 - Fraction(triangular.sparsity(step)) - up) < Fraction(1, 10**15)
        # (1 - cos 2 pi p) / 2 is sin^2 pi p
        wave = float(lowest) + float(highest - lowest) * math.sin(math.pi * float(p)) ** 2
        assert 1.0 - cosine.sparsity(step) == pytest.approx(wave, abs=1e-15)


@pytest.mark.parametrize("shape", ["cosine", "triangular"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_boundaries_and_everything_after_are_exactly_the_target(lengths: tuple[int, ...], shape: str) -> None:
    schedule = Cyclic(0.99987, lengths, 3.0, every=2, shape=shape)
    ends = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
    for step in [*ends, *range(schedule.end, schedule.end + 50), 10**9]:
        assert schedule.sparsity(step) == 0.99987


@pytest.mark.parametrize("shape", ["cosine", "triangular"])
def test_the_middle_of_a_cycle_is_the_multiple(shape: str) -> None:
    schedule = Cyclic(0.9999, (50, 100), 3.0, every=1, shape=shape)
    for middle in (25, 100):
        assert 1 - schedule.sparsity(middle) == pytest.approx(3e-4, rel=1e-9)
    for rise, fall in ((10, 40), (1, 49), (60, 140), (75, 125)):
        assert schedule.sparsity(rise) == pytest.approx(schedule.sparsity(fall), abs=1e-15)
    assert all(schedule.sparsity(step + 1) < schedule.sparsity(step) for step in [*range(25), *range(50, 100)])
    assert all(schedule.sparsity(step + 1) > schedule.sparsity(step) for step in [*range(25, 50), *range(100, 150)])


@pytest.mark.parametrize("every", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_due_steps(lengths: tuple[int, ...], every: int) -> None:
    schedule = Cyclic(0.99, lengths, 3.0, every=every)
    found = {step for step in range(-5, sum(lengths) + 200) if schedule.due(step)}
    assert found == _due(lengths, every)


def test_due_steps_by_hand() -> None:
    schedule = Cyclic(0.99, (10, 7), 3.0, every=4)
    assert [step for step in range(40) if schedule.due(step)] == [4, 8, 10, 14, 17]
    # EAST's own: 352 steps an epoch, 50 and 100 epochs, every 100 steps
    schedule = Cyclic(0.9999, (17_600, 35_200), 3.0, every=100)
    assert sum(schedule.due(step) for step in range(88_000)) == 176 + 352
    assert [schedule.due(step) for step in (0, 100, 17_600, 52_800, 52_900)] == [False, True, True, True, False]


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=5),
    st.floats(0.5, 0.9999),
    st.floats(1.0, 2.0),
    st.integers(1, 50),
    st.sampled_from(["cosine", "triangular"]),
)
def test_cycles_whatever_the_numbers(
    lengths: list[int], target: float, multiplier: float, every: int, shape: str
) -> None:
    schedule = Cyclic(target, tuple(lengths), multiplier, every, shape)
    steps = range(sum(lengths) + 5)
    assert {step for step in steps if schedule.due(step)} == _due(tuple(lengths), every)
    for step in steps:
        density = 1 - schedule.sparsity(step)
        assert (1 - target) * (1 - 1e-12) - 1e-15 <= density <= (1 - target) * multiplier * (1 + 1e-12) + 1e-15
    assert schedule.sparsity(schedule.end) == target
    assert not sum(lengths) or schedule.due(schedule.end)


@pytest.mark.parametrize(("first", "last", "end"), [(0.5, 0.005, 88_000), (0.3, 0.0, 66), (0.1, 0.1, 10)])
def test_drop_fractions(first: float, last: float, end: int) -> None:
    cosine = DropFraction(100, 0, end, first, last)
    line = DropFraction(100, 0, end, first, last, shape="linear")
    constant = DropFraction(100, 0, end, first, last, shape="constant")
    for step in np.unique(np.linspace(0, end, 301).astype(int)).tolist():
        # (1 + cos pi p) / 2 is cos^2 pi p / 2
        wave = last + (first - last) * math.cos(math.pi * step / end / 2) ** 2
        assert cosine.fraction(step) == pytest.approx(wave, abs=1e-15)
        straight = Fraction(first) + (Fraction(last) - Fraction(first)) * Fraction(step, end)
        assert line.fraction(step) == pytest.approx(float(straight), abs=1e-15)
        assert constant.fraction(step) == pytest.approx(first, abs=1e-16)
    for beyond in (end, end + 1, 10 * end):
        assert cosine.fraction(beyond) == pytest.approx(last, abs=1e-16)
        assert line.fraction(beyond) == pytest.approx(last, abs=1e-16)


@pytest.mark.parametrize(
    ("every", "begin", "end", "wanted"),
    [
        (100, 0, 500, [100, 200, 300, 400]),
        (100, 100, 501, [200, 300, 400, 500]),
        (100, 150, 420, [200, 300, 400]),
        (4000, 52_800, 88_000, [56_000, 60_000, 64_000, 68_000, 72_000, 76_000, 80_000, 84_000]),
        (1000, 0, 900, []),
        (1, 3, 4, []),
        (1, 3, 6, [4, 5]),
    ],
)
def test_when_connections_are_dropped_and_grown(every: int, begin: int, end: int, wanted: list[int]) -> None:
    schedule = DropFraction(every, begin, end, 0.5)
    assert [step for step in range(100_000) if schedule.due(step)] == wanted


def _net(seed: int = 0) -> nn.Sequential:
    """Layers of 54, 144, 16, 128, 64 and 20 weights; the small ones saturate early. Their dims add up to a prime
    number, so that shares hardly ever end in the same fraction.
    """
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 2, 3),
        nn.Conv2d(2, 8, 3),
        nn.Conv2d(8, 2, 1),
        nn.Linear(2, 64),
        nn.Linear(64, 1),
        nn.Linear(4, 5),
    )


def _erk(kept: int, masks: Masks) -> list[int]:
    """Clamped shares in proportion to the sum of dims, exact, whole by the largest remainder (ties: first layer)."""
    claims = [Fraction(sum(weight.shape)) for weight in masks.weights().values()]
    sizes = [weight.numel() for weight in masks.weights().values()]
    return _clamped(kept, claims, sizes)


def _clamped(kept: int, claims: list[Fraction], sizes: list[int]) -> list[int]:
    def at(scale: Fraction) -> list[Fraction]:
        return [min(max(scale * claim, Fraction(1)), Fraction(size)) for claim, size in zip(claims, sizes, strict=True)]

    bends = sorted({Fraction(bound) / claim for claim, size in zip(claims, sizes, strict=True) for bound in (1, size)})
    low = max((bend for bend in bends if sum(at(bend)) <= kept), default=bends[0])
    high = min((bend for bend in bends if sum(at(bend)) > kept), default=low)
    ideal = at(low)
    if high > low:
        ideal = at(low + (kept - sum(ideal)) * (high - low) / (sum(at(high)) - sum(ideal)))
    counts = [math.floor(value) for value in ideal]
    for index in sorted(range(len(counts)), key=lambda i: (counts[i] - ideal[i], i))[: kept - sum(counts)]:
        counts[index] += 1
    return counts


def _check_move(old: Tensor, new: Tensor, count: int, drop: Tensor, grow: Tensor) -> None:
    """numpy: a layer that grows keeps all and adds the largest; one that shrinks keeps the largest; ties: lowest
    index.
    """
    before, after = old.numpy().ravel(), new.numpy().ravel()
    assert after.sum() == count
    if count >= before.sum():
        assert (after >= before).all()
        candidates = np.flatnonzero(~before)
        ranked = candidates[np.argsort(-grow.numpy().ravel()[candidates], kind="stable")]
        wanted = set(np.flatnonzero(before)) | set(ranked[: count - before.sum()])
    else:
        assert (after <= before).all()
        candidates = np.flatnonzero(before)
        wanted = set(candidates[np.argsort(-drop.numpy().ravel()[candidates], kind="stable")][:count])
    assert set(np.flatnonzero(after)) == wanted


def _scores(masks: Masks, seed: int, ties: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    drop = {name: torch.randn(w.shape, generator=generator).abs() for name, w in masks.weights().items()}
    grow = {name: torch.randn(w.shape, generator=generator).abs() for name, w in masks.weights().items()}
    if ties:
        drop, grow = ({name: score.mul(2).round() for name, score in both.items()} for both in (drop, grow))
    return drop, grow


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shape", ["cosine", "triangular"])
@pytest.mark.parametrize(("target", "multiplier"), [(0.9, 3.0), (0.95, 9.0), (0.7, 3.3), (0.8, 5.0)])
def test_every_move_of_two_cycles(target: float, multiplier: float, shape: str, ties: bool) -> None:
    masks = Masks(_net())
    total = 54 + 144 + 16 + 128 + 64 + 20
    assert masks.total() == total
    start, _ = _scores(masks, 99, ties)
    alive = {name: torch.ones_like(mask) for name, mask in masks.masks().items()}
    first = move_to(masks, num_kept(target, total), start, start, "erk")
    assert all(torch.equal(mask, alive[name]) for name, mask in masks.masks().items()), "only answers, changes nothing"
    masks.set(first)
    schedule = Cyclic(target, (20, 31), multiplier, every=3, shape=shape)
    sizes = [mask.numel() for mask in alive.values()]
    saturated = False
    for step in range(schedule.end + 10):
        if not schedule.due(step):
            continue
        kept = round((1 - schedule.sparsity(step)) * total)
        drop, grow = _scores(masks, step, ties)
        old = {name: mask.clone() for name, mask in masks.masks().items()}
        new = move_to(masks, kept, drop, grow, "erk")
        counts = _erk(kept, masks)
        assert sum(counts) == kept
        for (name, mask), count in zip(new.items(), counts, strict=True):
            assert mask.any()
            _check_move(old[name], mask, count, drop[name], grow[name])
        saturated |= any(count == size for count, size in zip(counts, sizes, strict=True))
        masks.set(new)
        assert masks.kept() == kept
    assert masks.kept() == num_kept(target, total)
    assert saturated == (multiplier * (1 - target) > 0.45)


@pytest.mark.parametrize(("kept", "counts"), [(6, [1] * 6), (426, [54, 144, 16, 128, 64, 20])])
def test_the_ends_of_what_a_network_can_hold(kept: int, counts: list[int]) -> None:
    masks = Masks(_net())
    drop, grow = _scores(masks, 0, ties=True)
    masks.set(move_to(masks, 6, drop, grow, "erk"))
    masks.set(move_to(masks, kept, drop, grow, "erk"))
    assert list(masks.kept_by_layer().values()) == counts
    with pytest.raises(SparseLabError, match="would empty a layer"):
        move_to(masks, 5, drop, grow, "erk")


@given(st.data())
def test_moves_are_exact_whatever_the_numbers(data: st.DataObject) -> None:
    masks = Masks(_net())
    ties = data.draw(st.booleans())
    rule = data.draw(st.sampled_from(["erk", "uniform", "er"]))
    drop, grow = _scores(masks, data.draw(st.integers(0, 5)), ties)
    # any masks at all, not only those that an distribution gave
    density = data.draw(st.sampled_from([0.02, 0.3, 0.9]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 5)))
    masks.set({name: torch.rand(mask.shape, generator=generator) < density for name, mask in masks.masks().items()})
    shapes = [tuple(weight.shape) for weight in masks.weights().values()]
    sizes = [math.prod(shape) for shape in shapes]
    claims = {
        "erk": [Fraction(sum(shape)) for shape in shapes],
        "uniform": [Fraction(size) for size in sizes],
        "er": [size * Fraction(shape[0] + shape[1], shape[0] * shape[1]) for shape, size in zip(shapes, sizes)],  # noqa: B905
    }[rule]
    for kept in data.draw(st.lists(st.integers(6, 426), min_size=1, max_size=4)):
        old = {name: mask.clone() for name, mask in masks.masks().items()}
        new = move_to(masks, kept, drop, grow, rule)
        for (name, mask), count in zip(new.items(), _clamped(kept, claims, sizes), strict=True):
            # two shares that end in the same fraction differ by float64's last bit; the sum is exact all the same
            assert abs(int(mask.sum()) - count) <= 1
            _check_move(old[name], mask, int(mask.sum()), drop[name], grow[name])
        assert sum(int(mask.sum()) for mask in new.values()) == kept
        masks.set(new)


def test_what_grows_starts_at_zero_with_no_momentum() -> None:
    net = _net()
    masks = Masks(net)
    weights = masks.weights()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    drop, grow = _scores(masks, 0, ties=False)
    masks.set(move_to(masks, 60, drop, grow, "erk"), optimizer)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    masks.enforce(optimizer)
    old = {name: mask.clone() for name, mask in masks.masks().items()}
    kept = {name: weight.detach()[old[name]].clone() for name, weight in weights.items()}
    masks.set(move_to(masks, 150, drop, grow, "erk"), optimizer)
    for name, weight in weights.items():
        grown = masks[name] & ~old[name]
        assert grown.any() == (masks.kept_by_layer()[name] > int(old[name].sum()))
        assert not weight[grown].any()
        assert not optimizer.state[weight]["momentum_buffer"][grown].any()
        assert torch.equal(weight.detach()[old[name]], kept[name])
        assert (optimizer.state[weight]["momentum_buffer"][old[name]] == 1).all()
