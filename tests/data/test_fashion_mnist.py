from __future__ import annotations

import dataclasses
import gzip
import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets.mnist
from torchvision.datasets import FashionMNIST

from sparse_lab.config import DatasetConfig
from sparse_lab.data import fashion_mnist
from sparse_lab.errors import UserError

NAMES = [name for name, _ in FashionMNIST.resources]


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(head + array.tobytes())


@pytest.fixture
def arrays() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes: list[tuple[int, ...]] = [(12, 28, 28), (12,), (5, 28, 28), (5,)]
    return [rng.integers(0, 10 if len(shape) == 1 else 256, shape, dtype=np.uint8) for shape in shapes]


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrays: list[np.ndarray]) -> DatasetConfig:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    resources = []
    for name, array in zip(NAMES, arrays, strict=True):
        (raw / name).write_bytes(idx(array))
        resources.append((name, hashlib.md5((raw / name).read_bytes()).hexdigest()))
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    return DatasetConfig(name="fashion_mnist", root=str(tmp_path))


def test_images_are_padded_and_repeated(dataset: DatasetConfig, arrays: list[np.ndarray]) -> None:
    fashion_mnist.check(dataset)
    source = fashion_mnist.load(dataset, seed=1)
    wanted = np.pad(arrays[0], ((0, 0), (2, 2), (2, 2)))
    assert source.images.shape == (12, 3, 32, 32) and source.test_images.shape == (5, 3, 32, 32)
    for channel in range(3):
        assert (source.images[:, channel].numpy() == wanted).all()
    assert source.labels.tolist() == arrays[1].tolist() and source.test_labels.tolist() == arrays[3].tolist()
    assert source.labels.dtype == torch.int64
    assert source.official and set(source.md5) == {f"FashionMNIST/raw/{name}" for name in NAMES}


def test_a_truncated_file_is_refused_with_and_without_verification(dataset: DatasetConfig) -> None:
    path = Path(dataset.root) / "FashionMNIST" / "raw" / NAMES[0]
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="official"):
        fashion_mnist.check(dataset)
    with pytest.raises(UserError, match="cannot be read"):
        fashion_mnist.load(dataclasses.replace(dataset, verify=False), seed=1)


@pytest.mark.parametrize("shape", [(12, 28), (13, 28, 28)])
def test_a_file_whose_header_lies_is_refused(dataset: DatasetConfig, shape: tuple[int, ...]) -> None:
    path = Path(dataset.root) / "FashionMNIST" / "raw" / NAMES[0]
    raw = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape) + bytes(12 * 28 * 28)
    path.write_bytes(gzip.compress(raw))
    with pytest.raises(UserError, match="header"):
        fashion_mnist.load(dataclasses.replace(dataset, verify=False), seed=1)


def test_torchvision_downloads_into_the_same_layout(
    dataset: DatasetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(url: str, download_root: str, filename: str, md5: str) -> None:
        shutil.copy(Path(dataset.root) / "FashionMNIST" / "raw" / filename, download_root)

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", fetch)
    elsewhere = dataclasses.replace(dataset, root=str(tmp_path / "new"))
    with pytest.raises(UserError, match=r"dataset.download=true"):
        fashion_mnist.load(elsewhere, seed=1)
    assert fashion_mnist.load(dataclasses.replace(elsewhere, download=True), seed=1).official


def test_another_size_is_refused(dataset: DatasetConfig) -> None:
    with pytest.raises(UserError, match=r"dataset\.image_size=32"):
        fashion_mnist.check(dataclasses.replace(dataset, image_size=28))
