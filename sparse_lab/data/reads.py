"""Which files a data set is read from. No torch: a finished run is looked up by what they hold."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

from sparse_lab.config import DatasetConfig
from sparse_lab.data import fingerprint, photo_files
from sparse_lab.errors import UserError

# the folder of a published data set below dataset.root, and the publisher's md5 of each file that is read of it
PUBLISHED: dict[str, tuple[str, dict[str, str]]] = {
    "cifar10": (
        "cifar-10-batches-py",
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
        },
    ),
    "cifar100": (
        "cifar-100-python",
        {
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        },
    ),
    "fashion_mnist": (
        "FashionMNIST/raw",
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
}
# SHA-256 of the digits that scikit-learn has brought so far
DIGITS = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"

Files = Callable[[DatasetConfig], Iterable[str]]

PHOTOS = ("imagenet", "folder")
MADE = {"digits", "synthetic"}  # data sets without files below dataset.root
OWN: dict[str, Files] = {}  # registered data sets that are read from files -> the names of these below dataset.root

_known: dict[tuple[object, ...], str] = {}


def fingerprint_of(dataset: DatasetConfig, outputs: Path) -> str:
    """Return the hash of what a run on this data set would read; '' where the data set's name says it all: the
    publisher's own files, or none. Also '' where the files are not there: what dataset.download fetches is his.

    What was found is kept in outputs/fingerprints. Within a process it is looked at once, until `look_again`.
    """
    asked = (dataset.name, Path(dataset.root).resolve(), dataset.file, dataset.verify, outputs)
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
        folder, official = PUBLISHED[dataset.name]
        if dataset.verify:
            return ""  # others are refused
        base = Path(dataset.root) / folder
        seen = fingerprint.of_files(base, ((name, os.stat(base / name)) for name in official), store, "md5")
        return "" if seen == fingerprint.of_contents(official) else seen
    if dataset.name == "digits":
        digits = hashlib.sha256(digits_file().read_bytes()).hexdigest()
        return "" if digits == DIGITS else digits
    if dataset.name in PHOTOS:
        layout = photo_files.layout_of(dataset)
        found = ((name, os.stat(layout.base / name)) for name in photo_files.names(layout))
        return fingerprint.of_files(layout.base, found, store)
    if dataset.name == "arrays":
        from sparse_lab.data import npz  # numpy, which other data sets do not wait for

        path = npz.file_of(dataset)
        return fingerprint.of_files(path, [("", os.stat(path))], store)  # whatever it is called
    if dataset.name in OWN:
        base = Path(dataset.root)
        return fingerprint.of_files(base, ((name, os.stat(base / name)) for name in own_files(dataset)), store)
    return ""


def own_files(dataset: DatasetConfig) -> list[str]:
    """Return the files below dataset.root that a registered data set is read from. Raise UserError where one lacks."""
    found = sorted({str(name) for name in OWN[dataset.name](dataset)})
    for name in found:
        if not (Path(dataset.root) / name).is_file():
            raise UserError(
                f"{dataset.name} is not in {dataset.root}: {name} is missing; put it there, or point to another root "
                "with paths.data=DIR"
            )
    return found


def digits_file() -> Path:
    """Return where scikit-learn keeps them. It is not imported: that takes longer than a short run."""
    return Path(str(metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")))
