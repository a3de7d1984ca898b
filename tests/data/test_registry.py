from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from sparse_lab.config import AugmentConfig, DatasetConfig, TrainingConfig
from sparse_lab.data import build, check, expected_images, names
from sparse_lab.data.batches import Batches
from sparse_lab.errors import UserError

SMALL = DatasetConfig(name="synthetic", image_size=8, train_limit=100)


def test_known_names() -> None:
    made = {"digits", "cifar10", "cifar100", "imagenet", "fashion_mnist", "synthetic"}
    assert set(names()) == made | {"folder", "arrays"}


@pytest.mark.parametrize("use", [check, lambda dataset: build(dataset, TrainingConfig(), seed=1)])
def test_an_unknown_name_gets_the_nearest_and_all_others(use: Any) -> None:
    with pytest.raises(UserError, match=r"'cifar_10'.*did you mean 'cifar10'.*imagenet"):
        use(DatasetConfig(name="cifar_10"))


def test_only_training_is_shuffled_augmented_and_cut_and_the_test_set_is_never_limited() -> None:
    training = TrainingConfig(batch_size=8, limit_batches=3, augment=AugmentConfig(crop_padding=2))
    data = build(dataclasses.replace(SMALL, validation=0.5), training, seed=1)
    assert isinstance(data.train, Batches) and isinstance(data.test, Batches)
    assert (len(data.train), len(data.validation), len(data.test)) == (3, 3, 32)
    for loader in (data.validation, data.test):
        first = next(iter(loader))[0]
        loader.set_epoch(1)
        assert torch.equal(first, next(iter(loader))[0])
    assert torch.equal(torch.cat([labels for _, labels in data.test]), data.test.labels)
    assert (data.num_classes, data.shape, data.official) == (10, (3, 8, 8), True)


def test_validation_images_are_never_trained_on() -> None:
    data = build(SMALL, TrainingConfig(), seed=1)
    train, validation = ({image.tobytes() for image in part.images.numpy()} for part in (data.train, data.validation))  # type: ignore[attr-defined]
    assert (len(train), len(validation)) == (100, 11)
    assert not train & validation


def test_the_seed_changes_the_split_of_files_that_stay(cifar10: DatasetConfig) -> None:
    one, two, again = (build(cifar10, TrainingConfig(), seed=seed).train.labels for seed in (1, 2, 1))
    assert torch.equal(one, again) and not torch.equal(one, two)


def test_labels_beyond_num_classes_are_refused(cifar100: DatasetConfig) -> None:
    assert build(cifar100, TrainingConfig(), seed=1).num_classes == 100
    with pytest.raises(UserError, match=r"labels from \d+ to \d\d, but dataset.num_classes=10"):
        build(dataclasses.replace(cifar100, num_classes=10), TrainingConfig(), seed=1)


def test_a_batch_that_devices_cannot_share_is_refused() -> None:
    with pytest.raises(UserError, match="batch_size=128 does not divide over 3 devices"):
        build(SMALL, TrainingConfig(), seed=1, world_size=3)


def test_the_package_imports_without_torch() -> None:
    code = "import sys, sparse_lab.data; sparse_lab.data.names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


EXPECTED = [
    {"name": "synthetic", "image_size": 8},
    {"name": "synthetic", "image_size": 8, "train_limit": 100, "eval_limit": 7},
    {"name": "digits", "image_size": 8},
    {"name": "digits", "image_size": 8, "validation": 0.5, "train_limit": 64, "eval_limit": 300},
    {"name": "arrays", "file": "drawn.npz", "image_size": [8, 8], "channels": 1},
    {"name": "arrays", "file": "whole.npz", "image_size": [8, 8], "channels": 1, "train_limit": 20},
]


@pytest.mark.parametrize("settings", EXPECTED, ids=str)
@pytest.mark.parametrize("limit", [None, 2])
def test_how_many_images_there_will_be_is_known_before_they_are_read(settings, limit, tmp_path: Any) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (90, 8, 8), dtype=np.uint8), rng.integers(0, 10, 90)
    np.savez(tmp_path / "drawn.npz", images=images, labels=labels)
    parts = {f"{part}_{word}": of[:40] for part in ("train", "val", "test") for word, of in
             (("images", images), ("labels", labels))}  # fmt: skip
    np.savez(tmp_path / "whole.npz", **parts)
    dataset, training = (
        DatasetConfig(root=str(tmp_path), **settings),
        TrainingConfig(batch_size=16, limit_batches=limit),
    )
    assert expected_images(dataset, training) == build(dataset, training, seed=1).images


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100), ("digits", 10), ("synthetic", 0)])
def test_too_few_classes_for_known_labels_are_refused_before_files_are_looked_for(name: str, classes: int) -> None:
    dataset = DatasetConfig(name=name, root="nowhere", num_classes=7)
    if classes:
        with pytest.raises(UserError, match=f"labels from 0 to {classes - 1}, but dataset.num_classes=7"):
            check(dataset)
    else:
        check(dataset)
