"""Images and labels of one's own in an .npz file (see `npz`), as they are: uint8 as pixels in 0..255, other numbers as
float32, which nobody scales but `mean` and `std`.

A file without a test set gets one drawn (`split.drawn_test`): the same for all seeds.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from sparse_lab.config import DatasetConfig
from sparse_lab.data import files, npz, saying
from sparse_lab.data.npz import Header, Npz, Pair
from sparse_lab.data.photo_files import shown
from sparse_lab.data.room import check_room
from sparse_lab.data.source import ImageSet
from sparse_lab.data.split import drawn_test, drawn_test_count
from sparse_lab.errors import UserError


def check(dataset: DatasetConfig) -> None:
    """UserError: no such file, or none of images and labels; other channels or another size than its images have; more
    than the memory holds; labels outside num_classes.
    """
    found = npz.npz_of(dataset)
    needed = sum(math.prod(images.shape) * _width(images) for _, images, _ in found.parts.values())
    check_room(f"{shown(found.path)}: its images, of which a part is a copy,", 2 * needed)
    for keys, _, _ in found.parts.values():
        _labels(found.path, keys[1], dataset.classes)


def counts(dataset: DatasetConfig) -> tuple[int, int, int]:
    """Training images, validation's among them; test images; validation images that the file holds. UserError: as
    `check`.
    """
    found = npz.npz_of(dataset)
    number = {part: images.shape[0] for part, (_, images, _) in found.parts.items()}
    train, held = number["train"], number.get("val", 0)
    if "test" in number:
        return train + held, number["test"], held
    test = drawn_test_count(_labels(found.path, found.parts["train"][0][1], dataset.classes), dataset.test)
    return train - test + held, test, held


def load(dataset: DatasetConfig, seed: int) -> ImageSet:
    """Read all images.

    Raises:
        UserError: as `check`; values that are no numbers; no test image is drawn.
    """
    check(dataset)
    found = npz.npz_of(dataset)
    parts = _read(found, dataset.classes)
    images, labels = parts["train"]
    if "test" in parts:
        test_images, test_labels = parts["test"]
    else:
        tested = drawn_test(labels, dataset.test, "arrays")
        if not tested.any():
            raise UserError(
                f"{shown(found.path)}: dataset.test draws no test image of {len(labels):,}: raise it, or save "
                "test_images and test_labels"
            )
        test_images, test_labels, images, labels = images[tested], labels[tested], images[~tested], labels[~tested]
    own = parts.get("val", (images[:0], labels[:0]))
    return ImageSet(
        torch.cat([images, own[0]]) if len(own[0]) else images,
        torch.cat([labels, own[1]]),
        test_images,
        test_labels,
        {found.path.name: files.md5_of(found.path)},
        official=True,
        held=len(own[1]),
    )


Part = tuple[torch.Tensor, torch.Tensor]


@lru_cache(maxsize=1)
def _read(found: Npz, classes: int) -> dict[str, Part]:
    """Images and labels of each part; those of the last run are kept, for the next one of a sweep."""
    parts = {
        part: (_images(found, keys), _labels(found.path, keys[1], classes))
        for part, (keys, _, _) in found.parts.items()
    }
    counts = " + ".join(f"{len(labels):,} {part}" for part, (_, labels) in parts.items())
    saying.say(
        f"arrays: {counts} images of {classes:,} classes, each {saying.shape(found.shape)}, read as "
        f"[N, {', '.join(found.order)}] {_said_type(parts['train'][0])}"
    )
    return parts


def _said_type(images: torch.Tensor) -> str:
    return "float32, values as they are" if images.is_floating_point() else "uint8"


def _width(header: Header) -> int:
    return 1 if header.dtype == np.uint8 else 4


def _images(found: Npz, keys: Pair) -> torch.Tensor:
    """uint8 or float32 [N, C, H, W]."""
    values = npz.array(found.path, keys[0])
    if found.order == "HW":
        values = values[:, None]
    elif found.order == "HWC":
        values = values.transpose(0, 3, 1, 2)
    with np.errstate(over="ignore"):  # said below
        kind = np.uint8 if values.dtype == np.uint8 else np.float32
        images = torch.from_numpy(np.ascontiguousarray(values, dtype=kind))
    if images.is_floating_point() and not (finite := images.flatten(1).isfinite().all(1)).all():
        bad = (~finite).nonzero().flatten()
        more = f" (and {len(bad) - 1:,} more)" if len(bad) > 1 else ""
        raise UserError(f"{shown(found.path)}: {keys[0]}[{int(bad[0])}]{more} holds values that are no float32 numbers")
    return images


def _labels(path: Path, key: str, classes: int) -> torch.Tensor:
    labels = npz.array(path, key).reshape(-1)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise UserError(
            f"{shown(path)}: {key} goes from {low} to {high}, but dataset.num_classes={classes} allows 0 to "
            f"{classes - 1}"
        )
    return torch.from_numpy(labels.astype(np.int64))
