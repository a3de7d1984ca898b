"""Exact counts a layer, against water-filling by bisection, RigL's iterative ERK, and numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_lab.errors import SparseLabError
from sparse_lab.models import build
from sparse_lab.sparsity.distributions import distribute, share_out

NETWORKS = ("vgg16", "resnet34", "resnet50")
DENSITIES = (0.5, 0.2, 0.01, 1e-3, 1e-4)


def _water_filling(total: int, claims: Sequence[float], least: Sequence[int], most: Sequence[int]) -> list[float]:
    """x_i = clamp(scale * claim_i) with sum x = total, the scale found by bisection."""

    def at(scale: float) -> list[float]:
        return [min(max(scale * c, low), high) for c, low, high in zip(claims, least, most, strict=True)]

    low, high = 0.0, max(top / claim for top, claim in zip(most, claims, strict=True)) + 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) < total else (low, middle)
    return at(high)


@st.composite
def _problems(draw: st.DrawFn, smallest_claim: float) -> tuple[int, list[float], list[int], list[int]]:
    number = draw(st.integers(1, 7))
    most = draw(st.lists(st.integers(0, 60), min_size=number, max_size=number))
    least = [draw(st.integers(0, high)) for high in most]
    claim = st.one_of(st.floats(smallest_claim, 100.0), st.sampled_from([smallest_claim, 1.0, 2.0]))
    claims = draw(st.lists(claim, min_size=number, max_size=number))
    return draw(st.integers(sum(least), sum(most))), claims, least, most


@given(_problems(smallest_claim=0.01))
def test_shares_are_within_one_of_water_filling(problem: tuple[int, list[float], list[int], list[int]]) -> None:
    total, claims, least, most = problem
    counts = share_out(total, claims, least, most)
    assert sum(counts) == total
    assert all(low <= count <= high for low, count, high in zip(least, counts, most, strict=True))
    for count, ideal in zip(counts, _water_filling(total, claims, least, most), strict=True):
        assert abs(count - ideal) < 1 + 1e-6


@given(_problems(smallest_claim=0.0))
def test_shares_add_up_within_bounds_whatever_the_claims(
    problem: tuple[int, list[float], list[int], list[int]],
) -> None:
    total, claims, least, most = problem
    counts = share_out(total, claims, least, most)
    assert sum(counts) == total
    assert all(low <= count <= high for low, count, high in zip(least, counts, most, strict=True))


@given(st.lists(st.floats(0.1, 50.0), min_size=1, max_size=8), st.integers(0, 500))
def test_where_nothing_saturates_shares_are_proportional(claims: list[float], total: int) -> None:
    counts = share_out(total, claims, [0] * len(claims), [10_000] * len(claims))
    assert sum(counts) == total
    for count, claim in zip(counts, claims, strict=True):
        assert abs(count - total * claim / math.fsum(claims)) < 1 + 1e-6


@pytest.mark.parametrize(
    ("total", "claims", "least", "most", "expected"),
    [
        (11, [5, 3, 2], [0, 0, 0], [99, 99, 99], [6, 3, 2]),  # 5.5, 3.3, 2.2: the largest remainder
        (10, [1, 1, 1], [0, 0, 0], [99, 99, 99], [4, 3, 3]),  # equal remainders: by index
        (30, [10, 1, 1], [0, 0, 0], [12, 99, 99], [12, 9, 9]),  # 25 does not fit in 12: 18 shared out again
        (10, [98, 1, 1], [0, 2, 3], [99, 99, 99], [5, 2, 3]),  # floors come out of the big one
        (12, [8, 1, 1], [0, 4, 0], [6, 99, 99], [6, 4, 2]),  # both bounds at once
        (0, [0, 0], [0, 0], [0, 0], [0, 0]),  # nothing to share, nowhere to put it
        (9, [0, 0], [0, 0], [6, 12], [3, 6]),  # no claims: by size
        (0, [], [], [], []),
    ],
)
def test_shares_by_hand(
    total: int, claims: list[float], least: list[int], most: list[int], expected: list[int]
) -> None:
    assert share_out(total, claims, least, most) == expected


@pytest.mark.parametrize("total", [2, 11])
def test_what_cannot_fit_is_refused(total: int) -> None:
    with pytest.raises(ValueError, match=f"{total} does not fit between 3 and 10"):
        share_out(total, [1.0, 1.0], [1, 2], [5, 5])


# conv 2 -> 4 3x3: 72 weights; conv 4 -> 8 1x1: 32; linear 8 -> 10: 80
HAND = {"conv": (4, 2, 3, 3), "point": (8, 4, 1, 1), "linear": (10, 8)}


def _allocate(name: str, kept: int, shapes: dict[str, tuple[int, ...]]) -> list[int]:
    weights = {layer: torch.empty(shape, device="meta") for layer, shape in shapes.items()}
    alive = {layer: torch.ones(1, dtype=torch.bool).expand(shape) for layer, shape in shapes.items()}
    counts = distribute(name, kept, weights, {}, alive)
    assert list(counts) == list(shapes)
    return list(counts.values())


@pytest.mark.parametrize(
    ("name", "kept", "expected"),
    [
        # sums of dims 12, 14, 18 (of 44)
        ("erk", 22, [6, 7, 9]),
        # times 3: 36, 42, 54, but point has only 32; the other 100 go 12 : 18
        ("erk", 132, [40, 32, 60]),
        # point full; 118 go 12 : 18 = 47.2, 70.8
        ("erk", 150, [47, 32, 71]),
        # point and linear full
        ("erk", 176, [64, 32, 80]),
        ("erk", 3, [1, 1, 1]),
        # 72 * 6/8, 32 * 12/32, 80 * 18/80 = 54, 12, 18 (of 84)
        ("er", 42, [27, 6, 9]),
        ("uniform", 46, [18, 8, 20]),
        ("uniform", 184, [72, 32, 80]),
    ],
)
def test_three_layers_by_hand(name: str, kept: int, expected: list[int]) -> None:
    assert _allocate(name, kept, HAND) == expected


@cache
def _shapes(network: str, classes: int = 10, image_size: int = 32) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = build(network, classes, image_size=image_size)
    kinds = (nn.Conv2d, nn.Linear)
    return {name: tuple(module.weight.shape) for name, module in model.named_modules() if isinstance(module, kinds)}


def _erk_as_rigl_does(shapes: Sequence[tuple[int, ...]], density: float) -> list[float]:
    """Raise layers to dense, the densest first, until none would pass 1 (Evci et al. 2020). Ideal counts, float64."""
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / math.prod(shape) for shape in shapes]
    dense: set[int] = set()
    while True:
        free = [i for i in range(len(shapes)) if i not in dense]
        rest = density * math.fsum(sizes) - math.fsum(sizes[i] for i in dense)
        scale = rest / math.fsum(raw[i] * sizes[i] for i in free)
        highest = max(free, key=lambda i: raw[i])
        if scale * raw[highest] <= 1:
            return [float(sizes[i]) if i in dense else scale * raw[i] * sizes[i] for i in range(len(shapes))]
        dense.add(highest)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("network", NETWORKS)
def test_erk_on_real_networks(network: str, density: float) -> None:
    shapes = _shapes(network)
    sizes = [math.prod(shape) for shape in shapes.values()]
    kept = round(density * sum(sizes))
    counts = _allocate("erk", kept, shapes)
    assert sum(counts) == kept
    assert all(0 < count <= size for count, size in zip(counts, sizes, strict=True))
    ideals = _erk_as_rigl_does(list(shapes.values()), kept / sum(sizes))
    assert min(ideals) >= 1
    for count, ideal in zip(counts, ideals, strict=True):
        assert abs(count - ideal) < 1 + 1e-6
    claims = [sum(shape) for shape in shapes.values()]
    scales = [(count / c, 1 / c) for count, c, size in zip(counts, claims, sizes, strict=True) if count < size]
    for scale, step in scales:
        assert abs(scale - scales[0][0]) < step + scales[0][1]


@pytest.mark.parametrize(("density", "clamped"), [(0.5, 0.430), (0.2, 0.196)])
def test_clamping_alone_would_miss_the_target(density: float, clamped: float) -> None:
    """The trap that sharing out again is there for; the numbers are those of ImageNet's ResNet-50."""
    shapes = list(_shapes("resnet50", classes=1000, image_size=224).values())
    sizes = [math.prod(shape) for shape in shapes]
    scale = density * sum(sizes) / sum(map(sum, shapes))
    reached = sum(min(size, scale * sum(shape)) for shape, size in zip(shapes, sizes, strict=True)) / sum(sizes)
    assert reached == pytest.approx(clamped, abs=6e-4)


@pytest.mark.parametrize("name", ["uniform", "er", "erk"])
@pytest.mark.parametrize("spare", [0, 1, 10, 200])
def test_no_layer_is_emptied_at_the_very_end(name: str, spare: int) -> None:
    shapes = _shapes("resnet50")
    kept = len(shapes) + spare
    counts = _allocate(name, kept, shapes)
    assert sum(counts) == kept
    assert min(counts) >= 1


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("density", DENSITIES)
def test_uniform_is_the_same_density_everywhere(network: str, density: float) -> None:
    sizes = [math.prod(shape) for shape in _shapes(network).values()]
    kept = round(density * sum(sizes))
    counts = _allocate("uniform", kept, _shapes(network))
    assert sum(counts) == kept
    floored = {i for i, size in enumerate(sizes) if kept / sum(sizes) * size < 1}
    # weights reserved for floors come from all the others, so these may be a little further off
    slack = 1 + 1e-6 + len(floored)
    for i, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        assert count == 1 if i in floored else abs(count - kept / sum(sizes) * size) < slack


def _tensors(values: dict[str, list[float]]) -> dict[str, Tensor]:
    return {name: torch.tensor(numbers) for name, numbers in values.items()}


def _all_alive(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}


def test_lamp_and_global_by_hand() -> None:
    # LAMP: a: 1/5, 1; b (scale drops out): 1/14, 4/13, 1
    weights = _tensors({"a": [1.0, -2.0], "b": [10.0, 20.0, -30.0]})
    magnitudes = {name: weight.abs() for name, weight in weights.items()}
    alive = _all_alive(weights)
    assert distribute("lamp", 3, weights, magnitudes, alive) == {"a": 1, "b": 2}
    assert distribute("lamp", 4, weights, magnitudes, alive) == {"a": 2, "b": 2}
    assert distribute("global", 4, weights, magnitudes, alive) == {"a": 1, "b": 3}
    assert distribute("global", 3, weights, magnitudes, alive) == {"a": 1, "b": 2}, "a is not emptied"


def test_lamp_ranks_lamp_scores_whatever_the_scores_say() -> None:
    weights = _tensors({"a": [1.0, -2.0], "b": [10.0, 20.0, -30.0]})
    upside_down = {name: -weight.abs() for name, weight in weights.items()}
    assert distribute("lamp", 4, weights, upside_down, _all_alive(weights)) == {"a": 2, "b": 2}


def test_lamp_does_not_count_what_is_dead() -> None:
    weights = _tensors({"a": [1.0, -2.0, 0.0], "b": [10.0, 0.0, -30.0]})
    alive = {"a": torch.tensor([True, True, False]), "b": torch.tensor([True, False, True])}
    assert distribute("lamp", 4, weights, {}, alive) == {"a": 2, "b": 2}


def test_lamp_tells_a_living_zero_from_a_dead_one() -> None:
    """Weights that have just regrown at zero are alive; they go before what is dead, wherever they stand."""
    weights = _tensors({"a": [0.0, 0.0, 3.0], "b": [5.0, 0.0]})
    alive = {"a": torch.tensor([False, False, True]), "b": torch.tensor([True, True])}
    assert distribute("lamp", 3, weights, {}, alive) == {"a": 1, "b": 2}


@pytest.mark.parametrize("name", ["uniform", "er", "erk"])
def test_a_layer_keeps_no_more_than_is_alive_in_it(name: str) -> None:
    weights = {layer: torch.ones(shape) for layer, shape in HAND.items()}
    alive = _all_alive(weights)
    alive["linear"] = torch.arange(80).reshape(10, 8) < 5
    counts = distribute(name, 60, weights, {}, alive)
    assert counts["linear"] == 5
    assert sum(counts.values()) == 60


def test_unknown_allocation_names_the_nearest() -> None:
    with pytest.raises(SparseLabError, match=r"unknown distribution 'erkk'; did you mean 'erk'\?"):
        _allocate("erkk", 22, HAND)


@pytest.mark.parametrize("name", ["global", "lamp", "uniform", "er", "erk"])
def test_fewer_weights_than_layers_are_refused(name: str) -> None:
    weights = {layer: torch.ones(shape) for layer, shape in HAND.items()}
    with pytest.raises(SparseLabError, match="2 kept weights would empty a layer"):
        distribute(name, 2, weights, weights, _all_alive(weights))
