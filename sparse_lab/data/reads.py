"""Which files a data set is read from. No torch: a finished run is looked up by what they hold."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from sparse_lab.config import DatasetConfig
from sparse_lab.data import fingerprint
from sparse_lab.errors import UserError

# the folder of a published data set below dataset.root, and what is read of it
PUBLISHED = {
    "cifar10": ("cifar-10-batches-py", (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")),
    "cifar100": ("cifar-100-python", ("train", "test")),
    "fashion_mnist": (
        "FashionMNIST/raw",
        tuple(f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")),
    ),
}
# SHA-256 of the digits that scikit-learn has brought so far
DIGITS = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

_known: dict[tuple[object, ...], str] = {}


def fingerprint_of(dataset: DatasetConfig, outputs: Path) -> str:
    """Return the hash of what a run on this data set would read; '' where the data set's name says it all: the
    publisher's own files (dataset.verify refuses others), or none. Also '' where the files are not there.

    What was found is kept in outputs/fingerprints. Within a process it is looked at once, until `look_again`.
    """
    asked = (dataset.name, Path(dataset.root).resolve(), dataset.verify, outputs)
    if asked not in _known:
        try:
            _known[asked] = _fingerprint(dataset, outputs / "fingerprints")
        except (OSError, UserError):  # what is missing or cannot be read stops the run elsewhere, with its own line
            return ""
    return _known[asked]


def look_again() -> None:
    """The files may have changed since they were looked at."""
    _known.clear()


def _fingerprint(dataset: DatasetConfig, store: Path) -> str:
    if dataset.name in PUBLISHED:
        folder, names = PUBLISHED[dataset.name]
        base = Path(dataset.root) / folder
        files = ((name, os.stat(base / name)) for name in names)
        return "" if dataset.verify else fingerprint.of_files(base, files, store)
    if dataset.name == "digits":
        found = hashlib.sha256(digits_file().read_bytes()).hexdigest()
        return "" if found == DIGITS else found
    if dataset.name == "imagenet":
        base = photo_folder(dataset)
        return fingerprint.of_files(base, photos(base), store)
    return ""


def digits_file() -> Path:
    """Return where scikit-learn keeps them. It is not imported: that takes longer than a short run."""
    return Path(str(metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")))


def photo_folder(dataset: DatasetConfig) -> Path:
    """Return the folder that holds train/ and val/. Raise UserError where there is none."""
    root = Path(dataset.root)
    for base in (root, root / "imagenet"):
        if (base / "train").is_dir() and (base / "val").is_dir():
            return base
    raise UserError(
        f"imagenet is not in {root / 'imagenet'}: no train/ and val/ there; put one folder a class into each "
        "(it cannot be downloaded without an account), or point to another root with paths.data=DIR"
    )


def photos(base: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yield (name below base, stat) of each photo in train/CLASS and val/CLASS, at any depth, as torchvision's
    ImageFolder finds them.
    """
    left = [(f"{part}/{entry.name}", entry.path) for part in ("train", "val") for entry in _folders(base / part)]
    while left:
        name, path = left.pop()
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir():
                    left.append((f"{name}/{entry.name}", entry.path))
                elif entry.name.lower().endswith(PHOTO_SUFFIXES):
                    yield f"{name}/{entry.name}", entry.stat()


def _folders(path: Path) -> list[os.DirEntry[str]]:
    with os.scandir(path) as entries:
        return [entry for entry in entries if entry.is_dir()]
