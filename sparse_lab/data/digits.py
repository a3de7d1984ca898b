"""scikit-learn's digits: 1,797 scans of 8x8 pixels in 10 classes (Alpaydin and Kaynak 1998, test part)."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

from sparse_lab.config import DatasetConfig
from sparse_lab.data.facts import COUNTS
from sparse_lab.data.reads import digits_file
from sparse_lab.data.room import check_room
from sparse_lab.data.source import ImageSet, md5_of_tensors
from sparse_lab.data.split import drawn_test

SCANS = 1797
TEST_SHARE = 0.2


def check(dataset: DatasetConfig) -> None:
    """UserError: more images than the memory holds. Nothing can be missing: the scans come with scikit-learn."""
    # as floats while they are scaled, then as bytes
    needed = SCANS * (4 * math.prod(dataset.size) + math.prod(dataset.shape))
    check_room(f"dataset=digits: {SCANS:,} images {dataset.shape}", needed)


def counts(dataset: DatasetConfig) -> tuple[int, int, int]:
    """Training images, validation's among them; test images; validation images that the files hold."""
    return *COUNTS[dataset.name], 0


def load(dataset: DatasetConfig, seed: int) -> ImageSet:
    """All scans, scaled to dataset.image_size and repeated over dataset.channels.

    A fifth of each class is the test set, the same for every run whatever its seed.
    """
    images, labels, md5 = _scaled(dataset.size, dataset.shape[0])
    test = drawn_test(labels, TEST_SHARE, "digits")
    return ImageSet(images[~test], labels[~test], images[test], labels[test], {"digits": md5}, official=True)


@functools.lru_cache(maxsize=2)
def _scaled(size: tuple[int, int], channels: int) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Images, labels and the MD5 of what was read: to read and scale them takes longer than a small run's epoch."""
    scans = np.loadtxt(digits_file(), delimiter=",")  # a row a scan: 64 pixels of 0..16, then the label
    grey = torch.from_numpy(scans[:, :-1]).float().view(-1, 1, 8, 8) * (255 / 16)
    labels = torch.from_numpy(scans[:, -1]).long()
    scaled = torch.nn.functional.interpolate(grey, size=size, mode="bilinear", align_corners=False)
    return scaled.round().to(torch.uint8).repeat(1, channels, 1, 1), labels, md5_of_tensors([grey, labels])
