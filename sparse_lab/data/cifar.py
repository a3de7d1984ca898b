"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): 50,000 training and 10,000 test images of 32x32 pixels.

torchvision knows where they are published and the md5 of each file; the files themselves are read by `unpickle`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import download_url

from sparse_lab.config import DatasetConfig
from sparse_lab.data import files, unpickle
from sparse_lab.data.facts import COUNTS
from sparse_lab.data.source import ImageSet, check_size
from sparse_lab.errors import UserError


def check(dataset: DatasetConfig) -> None:
    """UserError: files missing or not the official ones, or a size that CIFAR does not have."""
    check_size(dataset, 32)
    files.check(_files(dataset), dataset)


def counts(dataset: DatasetConfig) -> tuple[int, int, int]:
    """Training images, validation's among them; test images; validation images that the files hold."""
    return *COUNTS[dataset.name], 0


def load(dataset: DatasetConfig, seed: int) -> ImageSet:
    """Read all images.

    Raises:
        UserError: as `check`; a failed download; a file that cannot be read as a CIFAR batch.
    """
    check_size(dataset, 32)
    found = _files(dataset)
    md5, official = files.ready(found, dataset)
    kind = _kind(dataset)
    images, labels = _read([found.path(name) for name, _ in kind.train_list])
    test_images, test_labels = _read([found.path(name) for name, _ in kind.test_list])
    return ImageSet(images, labels, test_images, test_labels, md5, official)


def _kind(dataset: DatasetConfig) -> type[CIFAR10]:
    return CIFAR100 if dataset.name == "cifar100" else CIFAR10


def _files(dataset: DatasetConfig) -> files.FileSet:
    kind = _kind(dataset)

    def download(root: Path) -> None:
        # Not by CIFAR10.download, which unpacks as its version likes to: older ones write wherever the archive says.
        download_url(kind.url, str(root), kind.filename, kind.tgz_md5)
        files.unpack(root / kind.filename, root)

    title = "CIFAR-100" if kind is CIFAR100 else "CIFAR-10"
    official = {name: md5 for name, md5 in [*kind.train_list, *kind.test_list]}
    return files.FileSet(title, Path(dataset.root), kind.base_folder, official, download)


def _read(paths: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    batches = [_read_one(path) for path in paths]
    images = torch.from_numpy(np.concatenate([images for images, _ in batches]))
    labels = torch.tensor([label for _, labels in batches for label in labels], dtype=torch.int64)
    return images, labels


def _read_one(path: Path) -> tuple[np.ndarray, list[int]]:
    content = unpickle.load(path)
    pixels, labels = content.get("data"), content.get("labels", content.get("fine_labels"))
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != 3072:
        raise UserError(f"{path} is no CIFAR batch: its 'data' is not an array of N x 3072 bytes")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(type(label) is int for label in labels):
        raise UserError(f"{path} is no CIFAR batch: it needs a list of {len(pixels)} whole numbers as labels")
    return pixels.reshape(-1, 3, 32, 32), labels
