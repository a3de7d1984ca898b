"""Fashion-MNIST (Xiao et al. 2017): 60,000 training and 10,000 test images.

The images are 28x28 and grey; a black border of 2 pixels makes them 32x32, repeated over 3 channels.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import FashionMNIST

from sparse_lab.config import DatasetConfig
from sparse_lab.data import files
from sparse_lab.data.facts import COUNTS
from sparse_lab.data.source import ImageSet, check_size
from sparse_lab.errors import UserError
from sparse_lab.host.regular_file import MIB, opened

LARGEST = 256 * MIB  # bytes, packed and unpacked; the largest file unpacks to 47 million


def check(dataset: DatasetConfig) -> None:
    """UserError: files missing or not the official ones, or another size than 32."""
    check_size(dataset, 32)
    files.check(_files(dataset), dataset)


def counts(dataset: DatasetConfig) -> tuple[int, int, int]:
    """Training images, validation's among them; test images; validation images that the files hold."""
    return *COUNTS[dataset.name], 0


def load(dataset: DatasetConfig, seed: int) -> ImageSet:
    """Read all images from the published .gz files, the ones that an md5 is known for.

    Raises:
        UserError: as `check`; a failed download; a file that cannot be read.
    """
    check_size(dataset, 32)
    found = _files(dataset)
    md5, official = files.ready(found, dataset)
    images, labels, test_images, test_labels = (_read_idx(found.path(name)) for name in found.official)
    return ImageSet(_squares(images), labels.long(), _squares(test_images), test_labels.long(), md5, official)


def _files(dataset: DatasetConfig) -> files.FileSet:
    def download(root: Path) -> None:
        bare: FashionMNIST = object.__new__(FashionMNIST)
        bare.root = str(root)
        bare.download()

    official = dict(FashionMNIST.resources)
    return files.FileSet("Fashion-MNIST", Path(dataset.root), "FashionMNIST/raw", official, download)


def _read_idx(path: Path) -> torch.Tensor:
    """An IDX file: two zero bytes, 8 for uint8, the number of dimensions, each as big-endian int32, then the bytes."""
    try:
        with opened(path, LARGEST) as file, gzip.open(file) as unpacked:
            raw = unpacked.read(LARGEST)
        dimensions = 3 if "images" in path.name else 1
        start = 4 + 4 * dimensions
        shape = np.frombuffer(raw[4:start], dtype=">i4").tolist()
        if raw[:4] != bytes([0, 0, 8, dimensions]) or len(raw) - start != math.prod(shape):
            raise ValueError("its header does not fit its length")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(
            f"{path} cannot be read ({' '.join(str(error).split())}): replace it by the original file"
        ) from error
    return torch.from_numpy(np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape).copy())


def _squares(images: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(images, (2, 2, 2, 2))[:, None].repeat(1, 3, 1, 1)
