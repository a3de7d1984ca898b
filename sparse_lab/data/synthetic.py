"""Random images with random labels, for benchmarks and pipeline tests: nothing can be learned from them."""

from __future__ import annotations

import math

import torch

from sparse_lab.config import DatasetConfig
from sparse_lab.data.room import check_room
from sparse_lab.data.seeding import generator
from sparse_lab.data.source import ImageSet, md5_of_tensors
from sparse_lab.data.split import validation_count

TRAIN = 1024
TEST = 256


def check(dataset: DatasetConfig) -> None:
    """UserError: more images than the memory holds. Nothing else can be missing."""
    count = sum(counts(dataset))
    check_room(f"dataset=synthetic: {count:,} images {dataset.shape}", count * math.prod(dataset.shape))


def counts(dataset: DatasetConfig) -> tuple[int, int, int]:
    """Training images, validation's among them; test images; validation images that the files hold."""
    return _pool(dataset.train_limit or TRAIN, dataset.validation), TEST, 0


def load(dataset: DatasetConfig, seed: int) -> ImageSet:
    """Images by seed: 1,024 (or dataset.train_limit) are left to train on after the split; 256 to test on."""
    train = _images(_pool(dataset.train_limit or TRAIN, dataset.validation), dataset, "train", seed)
    test = _images(TEST, dataset, "test", seed)
    return ImageSet(*train, *test, {"synthetic": md5_of_tensors([*train, *test])}, official=True)


def _pool(wanted: int, validation: float) -> int:
    count = max(2, int(wanted / (1 - validation)) - 1)
    while count - validation_count(count, validation) < wanted:
        count += 1
    return count


def _images(count: int, dataset: DatasetConfig, part: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = generator("synthetic", part, seed)
    shape = (count, *dataset.shape)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=source)
    return images, torch.randint(0, dataset.classes, (count,), generator=source)
