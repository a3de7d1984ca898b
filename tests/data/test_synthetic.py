from __future__ import annotations

import pytest
import torch

from sparse_lab.config import DatasetConfig, TrainingConfig
from sparse_lab.data import build, synthetic


@pytest.mark.parametrize("validation", [0.001, 0.1, 0.37, 0.5, 0.9])
@pytest.mark.parametrize(("limit", "wanted"), [(None, 1024), (1, 1), (7, 7), (3000, 3000)])
def test_as_many_training_images_as_asked_for(validation: float, limit: int | None, wanted: int) -> None:
    dataset = DatasetConfig(name="synthetic", image_size=8, validation=validation, train_limit=limit)
    assert build(dataset, TrainingConfig(), seed=1).train.count == wanted


def test_images_and_labels_fill_their_ranges_by_seed() -> None:
    dataset = DatasetConfig(name="synthetic", image_size=16, num_classes=7)
    first, again, other = (synthetic.load(dataset, seed) for seed in (1, 1, 2))
    assert first.labels.unique().tolist() == list(range(7))
    assert first.images.unique().numel() == 256
    assert first.test_images.shape == (256, 3, 16, 16)
    assert torch.equal(first.images, again.images) and first.md5 == again.md5
    assert first.md5 != other.md5
