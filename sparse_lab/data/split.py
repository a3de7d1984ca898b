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
    held: int = 0,
) -> Parts:
    """Draw the three parts.

    Args:
        train_count, test_count: sizes of the data set's own training and test sets.
        validation: share of the training images held out.
        seed: draws the permutation; a smaller `train_limit` gives a subset of a larger one.
        train_limit: at most so many training images, counted after the split.
        eval_limit: at most so many validation images, and at most so many test images.
        held: the last so many training images are the validation set by the files' own word; 0: it is drawn.

    Raises:
        UserError: fewer than two training images.
    """
    test = _limited("test", test_count, eval_limit, seed)
    if held:
        train = torch.randperm(train_count - held, generator=generator("split", seed))
        own = _limited("validation", held, eval_limit, seed) + (train_count - held)
        return Parts(train=train[:train_limit], validation=own, test=test)
    drawn = validation_count(train_count, validation)
    order = torch.randperm(train_count, generator=generator("split", seed))
    return Parts(train=order[drawn:][:train_limit], validation=order[:drawn][:eval_limit], test=test)


def _limited(part: str, count: int, limit: int | None, seed: int) -> torch.Tensor:
    if limit is None or limit >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=generator(part, seed))[:limit]


def drawn_test(labels: torch.Tensor, share: float, name: str) -> torch.Tensor:
    """Draw the test set of a data set that has none of its own: bool, of the shape of `labels`.

    Of each class the rounded share, and never all of it. The draw knows no seed of a run: runs of several seeds are
    tested on the same images, so that what differs between them is the seeds' doing. `name` tells data sets apart.
    """
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator(name, label))
        mask[members[order[: min(round(share * len(members)), len(members) - 1)]]] = True
    return mask


def drawn_test_count(labels: torch.Tensor, share: float) -> int:
    """How many images `drawn_test` draws."""
    return sum(min(round(share * members), members - 1) for members in labels.unique(return_counts=True)[1].tolist())
