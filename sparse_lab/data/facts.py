"""What a data set's files say of it where the config does not: its classes, channels and pixels, and which parts they
hold. No torch: it is asked for while a request is composed. What is looked at is kept for each state of a file or
folder, so that thousands of jobs cost no more than one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sparse_lab.config import DatasetConfig
from sparse_lab.data import photo_files
from sparse_lab.data.reads import PHOTOS
from sparse_lab.errors import UserError


def filled(dataset: DatasetConfig) -> DatasetConfig:
    """Return `dataset` with what is null counted from its files, and a square image's size as one number. Raise
    UserError where the files are not there, or cannot tell.
    """
    missing = [name for name in ("num_classes", "channels", "image_size") if getattr(dataset, name) is None]
    if missing and dataset.name in FACTS:
        known = FACTS[dataset.name](dataset)
        dataset = replace(dataset, **{name: known[name]() for name in missing if name in known})
    assert dataset.classes and dataset.shape
    height, width = dataset.size
    return replace(dataset, image_size=height if height == width else [height, width])


def own_parts(dataset: DatasetConfig) -> set[str]:
    """Return which of "validation" and "test" the files hold, so that nothing is drawn for it; none where they are not
    there, or are not understood: that stops the run elsewhere.
    """
    if dataset.name not in DRAWN:
        return {"test"}
    try:
        return DRAWN[dataset.name](dataset)
    except (OSError, UserError):
        return set()


def class_names(dataset: DatasetConfig) -> tuple[str, ...]:
    """Return the names of the classes by label; none where the files do not name them. Raise UserError as `filled`."""
    return tuple(photo_files.layout_of(dataset).classes()) if dataset.name in PHOTOS else ()


def _photos(dataset: DatasetConfig) -> dict[str, Callable[[], Any]]:
    return {"num_classes": lambda: len(photo_files.layout_of(dataset).classes())}


def _photo_parts(dataset: DatasetConfig) -> set[str]:
    layout = photo_files.layout_of(dataset)
    there = {"validation": layout.validation, "test": layout.test}
    return {part for part, folder in there.items() if folder is not None}


def _arrays(dataset: DatasetConfig) -> dict[str, Callable[[], Any]]:
    from sparse_lab.data import npz  # numpy, which other data sets do not wait for

    found = npz.npz_of(dataset)
    return {
        "num_classes": lambda: npz.class_count(found),
        "channels": lambda: found.shape[0],
        "image_size": lambda: list(found.shape[1:]),
    }


def _array_parts(dataset: DatasetConfig) -> set[str]:
    from sparse_lab.data import npz

    return {"validation" if part == "val" else part for part in npz.npz_of(dataset).parts} - {"train"}


# data set -> what its files can tell of num_classes, channels and image_size, each looked at when it is asked for
FACTS: dict[str, Callable[[DatasetConfig], dict[str, Callable[[], Any]]]] = {
    "folder": _photos,
    "imagenet": _photos,
    "arrays": _arrays,
}
# data sets whose test set is drawn where the files hold none -> the parts that they hold
DRAWN: dict[str, Callable[[DatasetConfig], set[str]]] = {"folder": _photo_parts, "arrays": _array_parts}
# of published data sets and of scikit-learn's digits: training images, validation's among them, and test images
COUNTS = {
    "digits": (1438, 359),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "fashion_mnist": (60_000, 10_000),
}
CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "fashion_mnist": 10}
