from __future__ import annotations

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from sparse_lab.config import DatasetConfig
from sparse_lab.data import digits
from sparse_lab.data.source import ImageSet


def source(size: int = 32, seed: int = 1) -> ImageSet:
    return digits.load(DatasetConfig(name="digits", image_size=size), seed)


def test_every_scan_is_in_exactly_one_part_and_classes_are_shared_evenly() -> None:
    read = source(8)
    seen = torch.cat([read.images, read.test_images])[:, 0].flatten(1)
    wanted = torch.from_numpy(load_digits().images * 255 / 16).round().to(torch.uint8).flatten(1)
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, wanted.tolist()))
    assert len({tuple(image) for image in wanted.tolist()}) == 1797, "no two scans are equal, so no overlap is possible"
    totals = torch.bincount(torch.from_numpy(load_digits().target))
    assert torch.bincount(read.test_labels).tolist() == [round(0.2 * total) for total in totals.tolist()]


def test_the_test_set_does_not_depend_on_the_seed() -> None:
    assert torch.equal(source(8, seed=1).test_images, source(8, seed=2).test_images)


@pytest.mark.parametrize("size", [8, 20, 32])
def test_shape_and_range(size: int) -> None:
    read = source(size)
    assert read.images.shape[1:] == (3, size, size) and read.images.dtype == torch.uint8
    assert read.images.max() == 255 or size != 8
    assert torch.equal(read.images[:, 0], read.images[:, 2])
    assert read.official and list(read.md5) == ["digits"] and read.md5 == source(8).md5


def test_upscaling_is_bilinear() -> None:
    small, large = source(8).images[0, 0], source(32).images[0, 0]
    reference = Image.fromarray(small.numpy()).resize((32, 32), Image.Resampling.BILINEAR)
    difference = torch.tensor(list(reference.getdata())).view(32, 32) - large.int()
    assert difference.abs().max() <= 2, "PIL rounds between the two directions"
