"""What a data set's files say of it where the config does not: its classes, channels and pixels. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sparse_lab.config import DatasetConfig

# name -> what the files say: num_classes, channels, image_size, those that they can tell
FACTS: dict[str, Callable[[DatasetConfig], dict[str, Any]]] = {}


def filled(dataset: DatasetConfig) -> DatasetConfig:
    """Return `dataset` with what is null counted from its files, and a square image's size as one number. Raise
    UserError where the files are not there, or cannot tell.
    """
    missing = [name for name in ("num_classes", "channels", "image_size") if getattr(dataset, name) is None]
    if missing and dataset.name in FACTS:
        known = FACTS[dataset.name](dataset)
        dataset = replace(dataset, **{name: known[name] for name in missing if name in known})
    assert dataset.classes and dataset.shape
    height, width = dataset.size
    return replace(dataset, image_size=height if height == width else [height, width])
