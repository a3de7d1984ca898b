"""What is counted of logits: against scikit-learn, a plain loop in float64, and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    log_loss,
    top_k_accuracy_score,
)

from sparse_lab.errors import UserError
from sparse_lab.evaluate.metrics import BINS, Tally


def tallied(logits: torch.Tensor, labels: torch.Tensor, batch: int = 17) -> Tally:
    tally = Tally(logits.shape[1])
    for some, here in zip(logits.split(batch), labels.split(batch), strict=True):
        tally.add(some, here)
    return tally


def drawn(count: int, classes: int, seed: int, present: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are right more often than not, and labels of the first `present` classes."""
    source = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, present or classes, (count,), generator=source)
    logits = 2 * torch.randn(count, classes, generator=source)
    logits[torch.arange(count), labels] += 2.0
    return logits, labels


@pytest.mark.parametrize(("count", "classes", "present"), [(300, 10, 10), (200, 7, 5), (50, 2, 2), (400, 150, 140)])
def test_against_scikit_learn(count, classes, present):
    logits, labels = drawn(count, classes, seed=classes, present=present)
    tally, every = tallied(logits, labels), list(range(classes))
    found, predicted, shares = tally.found(), logits.argmax(1).numpy(), logits.double().softmax(1).numpy()
    assert (tally.confusion.numpy() == confusion_matrix(labels, predicted, labels=every)).all()
    assert found["images"] == count
    assert found["top1"] == pytest.approx(100 * float((predicted == labels.numpy()).mean()), abs=1e-12)
    with pytest.warns(UserWarning) if present < classes else _nothing():
        balanced = balanced_accuracy_score(labels, predicted)
    assert found["balanced_accuracy"] == pytest.approx(100 * balanced, abs=1e-10)
    assert found["loss"] == pytest.approx(log_loss(labels, shares, labels=every), rel=1e-9)
    if classes > 5:
        top5 = top_k_accuracy_score(labels, logits.numpy(), k=5, labels=every)
        assert found["top5"] == pytest.approx(100 * top5, abs=1e-12)
    else:
        assert "top5" not in found


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_calibration_error_against_a_plain_loop(classes):
    """Guo et al. 2017, equations 2, 3 and 5, number by number."""
    logits, labels = drawn(257, classes, seed=classes)
    rows = [[math.exp(one - max(row)) for one in row] for row in logits.double().tolist()]
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for row, label in zip(rows, labels.tolist(), strict=True):
        confidence = max(row) / math.fsum(row)
        number = next(one for one in range(15) if one / 15 < confidence <= (one + 1) / 15)
        bins[number].append((confidence, row.index(max(row)) == label))
    gaps = [abs(math.fsum(hit - confidence for confidence, hit in one)) for one in bins]
    found = tallied(logits, labels).found()
    assert BINS == 15 and found["calibration_error"] == pytest.approx(100 * math.fsum(gaps) / 257, abs=1e-9)
    kept = [one for one in bins if one]
    assert [one["images"] for one in found["calibration"]["bins"]] == [len(one) for one in kept]
    for said, one in zip(found["calibration"]["bins"], kept, strict=True):
        assert said["accuracy"] == pytest.approx(100 * sum(hit for _, hit in one) / len(one))
        assert said["confidence"] == pytest.approx(100 * math.fsum(confidence for confidence, _ in one) / len(one))


def test_a_network_that_knows_nothing():
    """All logits alike: loss ln K, confidence 1/K, the first class for everything, five of ten among the first five."""
    labels = torch.arange(10).repeat(3)
    found = tallied(torch.zeros(30, 10), labels).found()
    assert found["loss"] == pytest.approx(math.log(10)) and found["top1"] == found["balanced_accuracy"] == 10.0
    assert found["top5"] == 50.0 and found["calibration_error"] == pytest.approx(0.0, abs=1e-12)


def test_a_network_that_is_sure_and_right_and_one_that_is_sure_and_wrong():
    labels = torch.arange(4).repeat(5)
    sure = 1e3 * torch.nn.functional.one_hot(labels, 4).float()
    right, wrong = tallied(sure, labels).found(), tallied(sure.roll(1, 1), labels).found()
    assert (right["top1"], right["loss"], right["calibration_error"]) == (100.0, 0.0, 0.0)
    assert (wrong["top1"], wrong["loss"], wrong["calibration_error"]) == (0.0, 1000.0, 100.0)


def test_batches_do_not_matter():
    logits, labels = drawn(100, 12, seed=5)
    one, other = tallied(logits, labels, 1).found(), tallied(logits, labels, 100).found()
    assert one["calibration_error"] == pytest.approx(other["calibration_error"], rel=1e-12)
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-12) and one["top5"] == other["top5"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_answers_that_are_no_numbers_are_refused(bad):
    logits, labels = drawn(8, 3, seed=1)
    logits[5, 1] = bad
    with pytest.raises(UserError, match="1 of 8 images is NaN or infinite"):
        Tally(3).add(logits, labels)


def test_another_number_of_answers_is_refused():
    with pytest.raises(UserError, match=r"shape \[8, 3\], not 4 each"):
        Tally(4).add(*drawn(8, 3, seed=1))
