from __future__ import annotations

from sparse_lab.report import load
from sparse_lab.report.published import find


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


def test_an_entry_without_a_sparsity_is_never_beside_a_run() -> None:
    assert not [number for number in load() if number.method == "hrank"]
