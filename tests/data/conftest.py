"""Tiny data sets in the layouts of the real ones, made on the fly."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, CIFAR100

from sparse_lab.config import DatasetConfig

CIFAR10_FILES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def write_batch(path: Path, count: int, seed: int, classes: int = 10, key: str = "labels", protocol: int = 2) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
    content = {"data": pixels, key: rng.integers(0, classes, count).tolist(), "filenames": ["x.png"] * count}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=protocol))


def write_cifar10(root: Path) -> None:
    for seed, name in enumerate(CIFAR10_FILES):
        write_batch(root / "cifar-10-batches-py" / name, count=8, seed=seed)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DatasetConfig:
    """A folder of 40 + 8 images whose md5s pass for the official ones."""
    write_cifar10(tmp_path / "data")
    lists = [[name, md5(tmp_path / "data" / "cifar-10-batches-py" / name)] for name in CIFAR10_FILES]
    monkeypatch.setattr(CIFAR10, "train_list", lists[:-1])
    monkeypatch.setattr(CIFAR10, "test_list", lists[-1:])
    return DatasetConfig(name="cifar10", root=str(tmp_path / "data"))


@pytest.fixture
def cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DatasetConfig:
    for seed, (name, attribute) in enumerate([("train", "train_list"), ("test", "test_list")]):
        path = tmp_path / "cifar-100-python" / name
        write_batch(path, count=30, seed=seed, classes=100, key="fine_labels")
        monkeypatch.setattr(CIFAR100, attribute, [[name, md5(path)]])
    return DatasetConfig(name="cifar100", root=str(tmp_path), num_classes=100)
