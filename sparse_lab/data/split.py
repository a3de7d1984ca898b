"""Who trains, who validates, who tests: index tensors drawn by seed, disjoint by construction."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparse_lab.data.seeding import generator
from sparse_lab.errors import UserError


@dataclass(frozen=True)
class Parts:
    """Indices (int64, 1-D). `train` and `validation` point into the training images, `test` into the test images."""

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor


def validation_count(count: int, share: float) -> int:
    """How many of `count` training images are held out: the rounded share, but at least one image on either side."""
    if count < 2:
        raise UserError(
            f"{count} training image(s) cannot be split into training and validation: at least 2 are needed"
        )
    return min(max(round(count * share), 1), count - 1)


def split(
    train_count: int,
    test_count: int,
    validation: float,
    seed: int,
    train_limit: int | None = None,
    eval_limit: int | None = None,
) -> Parts:
    """Draw the three parts.

    Args:
        train_count, test_count: sizes of the data set's own training and test sets.
        validation: share of the training images held out.
        seed: draws the permutation; a smaller `train_limit` gives a subset of a larger one.
        train_limit: at most so many training images, counted after the split.
        eval_limit: at most so many validation images, and at most so many test images.

    Raises:
        UserError: fewer than two training images.
    """
    held = validation_count(train_count, validation)
    order = torch.randperm(train_count, generator=generator("split", seed))
    test = torch.arange(test_count)
    if eval_limit is not None and eval_limit < test_count:
        test = torch.randperm(test_count, generator=generator("test", seed))[:eval_limit]
    return Parts(train=order[held:][:train_limit], validation=order[:held][:eval_limit], test=test)
