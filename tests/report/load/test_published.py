from __future__ import annotations

import itertools

import pytest

from sparse_lab.report import load
from sparse_lab.report.load.published import find, verdict


def top1(
    method: str, sparsity: float, model: str = "vgg16", dataset: str = "cifar10", width: float = 1.0
) -> float | None:
    number = find(load(), method=method, model=model, dataset=dataset, sparsity=sparsity, width=width)
    return number.top1 if number else None


def test_numbers_stand_under_our_names() -> None:
    assert top1("iterative_regrow", 0.9685) == 92.64
    assert top1("oneshot_regrow", 0.9639) == 92.77
    assert top1("oneshot_regrow", 0.9296) == 92.90
    assert top1("bidirectional_iterative", 0.9685) is None
    assert top1("iterative_regrow_random", 0.9685) is None


def test_the_start_of_a_regrowth_is_a_number_of_the_one_way_method() -> None:
    assert top1("iterative", 0.9885) == 91.73
    assert top1("iterative", 1 - 0.8**20) == 91.73  # the 20 rounds that the paper's point comes from
    assert top1("iterative_regrow", 0.9885) is None


def test_lists_of_points_and_single_entries_are_both_read() -> None:
    assert top1("east", 0.9999, "resnet34") == 62.12
    assert top1("dense", 0.0, "resnet50", "cifar100") == 78.23
    number = find(load(), method="east", model="resnet34", dataset="cifar10", sparsity=0.9999, width=1.0)
    assert number is not None and number.std == 0.90 and "second-hand" in number.source


def test_a_number_may_stand_under_several_of_our_names() -> None:
    assert top1("rigl", 0.999, "resnet34") == top1("rigl_itop", 0.999, "resnet34") == 85.71
    assert top1("set", 0.9995, "resnet34") == top1("set_itop", 0.9995, "resnet34") == 70.84
    assert top1("rigl_itop", 0.99, "resnet50") == 92.75 and top1("rigl_itop", 0.9995, "resnet34", "cifar100") == 38.44
    assert top1("synflow_itop", 0.99, "resnet34") is None
    assert all(isinstance(number.method, str) for number in load())


def test_nothing_else_matches() -> None:
    assert top1("oneshot", 0.99) == 91.03
    assert top1("oneshot", 0.99 + 4.9e-5) == 91.03
    assert top1("oneshot", 0.99 + 6e-5) is None
    assert top1("oneshot", 0.99, width=0.25) is None
    assert top1("oneshot", 0.99, width=float("nan")) is None
    assert top1("oneshot", 0.99, model="resnet34") is None
    assert top1("oneshot", 0.99, dataset="cifar100") is None


CHANNELS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


@pytest.mark.parametrize(
    ("rates", "top1"),
    [
        ([0.95] + [0.5] * 6 + [0.9] * 4 + [0.8] * 2, 92.34),
        ([0.21] * 7 + [0.75] * 5 + [0.0], 93.73),
        ([0.3] * 7 + [0.75] * 5 + [0.0], 93.56),
        ([0.45] * 7 + [0.78] * 5 + [0.0], 93.10),
    ],
)
def test_hranks_numbers_stand_where_its_rates_lead(rates: list[float], top1: float) -> None:
    """Weights of VGG16 that are left: each layer's filters times 3x3 times the filters left before it."""
    left = [int(channels * (1 - rate)) for channels, rate in zip(CHANNELS, rates, strict=True)]
    kept = sum(9 * before * after for before, after in itertools.pairwise([3, *left])) + 10 * left[-1]
    number = find(load(), method="hrank", model="vgg16", dataset="cifar10", sparsity=1 - kept / 14_715_584, width=1.0)
    assert number is not None and number.top1 == top1


@pytest.mark.parametrize(
    ("difference", "std", "said"),
    [
        (0.17, 0.17, "within one published std"),
        (-0.17, 0.17, "within one published std"),
        (0.1701, 0.17, "above"),
        (-0.18, 0.17, "below"),
        (0.0, 0.0, "within one published std"),
        (0.01, 0.0, "above"),
        (0.01, None, "above (no std given)"),
        (-3.0, None, "below (no std given)"),
        (0.0, None, "equal (no std given)"),
    ],
)
def test_verdict(difference: float, std: float | None, said: str) -> None:
    assert verdict(difference, std) == said
