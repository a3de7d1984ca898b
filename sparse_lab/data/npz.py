"""Images and labels in an .npz file: which arrays it holds, by their headers alone. No torch, and no pickle: an array
of objects is refused before anything of it is read.
"""

from __future__ import annotations

import math
import os
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from sparse_lab.config import DatasetConfig
from sparse_lab.data.photo_files import shown
from sparse_lab.errors import UserError
from sparse_lab.host.regular_file import GIB, opened

Pair = tuple[str, str]  # of keys: images, labels
# how the arrays may be called: for training, for validation, for testing; the last two need not be there
SPELLINGS: tuple[tuple[Pair, ...], ...] = (
    (("images", "labels"), ("val_images", "val_labels"), ("test_images", "test_labels")),
    (("train_images", "train_labels"), ("val_images", "val_labels"), ("test_images", "test_labels")),  # MedMNIST
    (("x_train", "y_train"), ("x_val", "y_val"), ("x_test", "y_test")),  # Keras
    (("X_train", "y_train"), ("X_val", "y_val"), ("X_test", "y_test")),
    (("X", "y"),),
    (("x", "y"),),
)
KNOWN = (
    "images, labels (+ val_images, val_labels, test_images, test_labels), train_images ..., x_train, y_train ..., X, y"
)
IMAGES = ("uint8", "float16", "float32", "float64", "int16", "uint16")  # values of 16 bits are exact in float32
LARGEST = 2**14 * GIB  # bytes of a file: what the memory holds is looked at before anything is read
LONGEST = 2**17  # bytes of a header
FEW = 4  # channels of what is clearly no row or column of pixels


@dataclass(frozen=True)
class Header:
    """shape, dtype: of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True, eq=False)
class Npz:
    """A file whose arrays can be images and labels; there is one for each state of the file.

    parts: of train, and of val and test where they are there, the keys and headers of both. order: of an image's axes,
    CHW, HWC or HW. shape: (channels, height, width).
    """

    path: Path
    parts: dict[str, tuple[Pair, Header, Header]]
    order: str
    shape: tuple[int, int, int]


def file_of(dataset: DatasetConfig) -> Path:
    """Return the file of dataset=arrays: a relative name is looked for in paths.data, then in the working directory.
    Raise UserError where there is none, or one in each.
    """
    if dataset.file is None:
        raise UserError("no file is named: say which .npz file, as in dataset.file=X.npz")
    places = dict.fromkeys((Path(dataset.root) / dataset.file, Path(dataset.file)))
    found = [path for path in places if path.is_file()]
    if not found:
        raise UserError(f"dataset.file={shown(dataset.file)} is neither in {shown(dataset.root)} (paths.data) nor here")
    if len(found) > 1 and not found[0].samefile(found[1]):
        raise UserError(f"dataset.file={shown(dataset.file)} is in {shown(dataset.root)} and here: give the whole path")
    return found[0]


def npz_of(dataset: DatasetConfig) -> Npz:
    """Return what the file of dataset=arrays holds. Raise UserError where it is no .npz file of images and labels, or
    where dataset.channels and dataset.image_size are not those of its images.
    """
    path = file_of(dataset)
    size = None if dataset.image_size is None else dataset.size
    return _npz(str(path), _state(path), dataset.channels, size)


def class_count(npz: Npz) -> int:
    """Return how many labels the training images have. Raise UserError where they are not 0 to that number."""
    return _class_count(str(npz.path), _state(npz.path), npz.parts["train"][0][1])


def array(path: Path, key: str) -> np.ndarray:
    """Return an array. Raise UserError where it cannot be read."""
    try:
        with opened(path, LARGEST) as opened_file, np.load(opened_file, allow_pickle=False) as file:
            found: np.ndarray = file[key]
            return found
    except Exception as error:  # zip, zlib and numpy each have errors of their own for what is damaged
        raise UserError(f"{shown(path)}: {key} cannot be read ({_reason(error)}): save the file again") from None


def _state(path: Path) -> tuple[int, ...]:
    about = os.stat(path)
    return about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns


@lru_cache(maxsize=16)
def _npz(path: str, state: tuple[int, ...], channels: int | None, size: tuple[int, int] | None) -> Npz:
    """Looked at once for each state of the file: a sweep asks for every job."""
    headers = _headers(Path(path))
    parts = {}
    for part, (images, labels) in _pairs(path, headers).items():
        _check_images(path, images, headers[images])
        _check_labels(path, labels, headers[labels], headers[images].shape[0])
        parts[part] = ((images, labels), headers[images], headers[labels])
    keys, first, _ = parts["train"]
    for other, about, _ in parts.values():
        if (about.shape[1:], about.dtype) != (first.shape[1:], first.dtype):
            raise UserError(
                f"{shown(path)}: {other[0]} is {_said(about)} and {keys[0]} {_said(first)}: save them alike"
            )
    order = _order(f"{shown(path)}: {keys[0]} {_said(first)}", first.shape, channels, size)
    return Npz(Path(path), parts, order, _shape(order, first.shape))


def _headers(path: Path) -> dict[str, Header]:
    found, member = {}, ""
    try:
        with opened(path, LARGEST) as file, zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                member = f"{entry.filename}: "
                with archive.open(entry) as inner:
                    found[entry.filename.removesuffix(".npy")] = header = _header(inner)
                room = header.dtype.itemsize * math.prod(header.shape)
                whole = min(header.shape, default=0) >= 0 and 0 <= entry.file_size - room < LONGEST
                if not header.dtype.hasobject and not whole:
                    raise ValueError("it is not as long as its header says")
    except Exception as error:  # as in `array`
        raise UserError(
            f"{shown(path)} is no .npz file, or a damaged one ({shown(member)}{_reason(error)}): save it with "
            "numpy.savez"
        ) from None
    return found


def _header(file: Any) -> Header:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an array of version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return Header(tuple(shape), dtype)


def _pairs(path: str, headers: dict[str, Header]) -> dict[str, Pair]:
    """The keys of each part that is there."""
    for spelling in SPELLINGS:
        there = [pair for pair in spelling if pair[0] in headers or pair[1] in headers]
        if spelling[0] in there and headers.keys() == {key for pair in there for key in pair}:
            return {part: pair for part, pair in zip(("train", "val", "test"), spelling, strict=False) if pair in there}
    raise UserError(
        f"{shown(path)} holds {shown(', '.join(sorted(headers)) or 'nothing')}: its arrays are to be called {KNOWN}; "
        "images and labels of each part, and nothing else"
    )


def _check_images(path: str, key: str, header: Header) -> None:
    said = f"{shown(path)}: {key} is {_said(header)}"
    if header.dtype.hasobject:
        raise UserError(f"{said}: an array of Python objects, which would have to be unpickled; save plain numbers")
    if header.dtype.name not in IMAGES:
        raise UserError(f"{said}: images are {', '.join(IMAGES)}; as in images.astype('float32')")
    if len(header.shape) not in (3, 4) or 0 in header.shape:
        raise UserError(f"{said}: images are [N, H, W], [N, C, H, W] or [N, H, W, C]")


def _check_labels(path: str, key: str, header: Header, count: int) -> None:
    said = f"{shown(path)}: {key} is {_said(header)}"
    if header.dtype.hasobject:
        raise UserError(f"{said}: an array of Python objects, which would have to be unpickled; save whole numbers")
    if len(header.shape) == 2 and header.shape[1] > 1:
        raise UserError(f"{said}: one label an image, not one-hot or several; as in labels.argmax(1)")
    if header.dtype.kind not in "iu":
        raise UserError(f"{said}: labels are whole numbers; as in labels.astype('int64')")
    if header.shape not in ((count,), (count, 1)):
        raise UserError(f"{said}: {count:,} images need as many labels")


def _said(header: Header) -> str:
    return f"{header.dtype.name} {list(header.shape)}"


def _order(said: str, shape: tuple[int, ...], channels: int | None, size: tuple[int, int] | None) -> str:
    """How an image's axes lie, where only one way is possible: what the config says of channels and size, then a clear
    number of channels (1 to 4, fewer than rows and columns), then square images.
    """
    ways = ["HW"] if len(shape) == 3 else ["CHW", "HWC"]
    fits = [way for way in ways if _fits(_shape(way, shape), channels, size)]
    if not fits:
        wanted = f"dataset.channels={channels} dataset.image_size={list(size) if size else None}".replace(
            "None", "null"
        )
        raise UserError(f"{said} does not fit {wanted}: null takes the file's own")
    tells = (
        lambda found: found[0] <= FEW < min(found[1:]),
        lambda found: found[1] == found[2],
    )
    for tell in tells:
        if len(fits) > 1 and any(tell(_shape(way, shape)) for way in fits):
            fits = [way for way in fits if tell(_shape(way, shape))]
    if len(fits) > 1:
        raise UserError(f"{said} could be [N, C, H, W] or [N, H, W, C]: give dataset.channels or dataset.image_size")
    return fits[0]


def _fits(found: tuple[int, int, int], channels: int | None, size: tuple[int, int] | None) -> bool:
    return channels in (None, found[0]) and size in (None, found[1:])


def _shape(order: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    axes = dict(zip(order, shape[1:], strict=True))
    return axes.get("C", 1), axes["H"], axes["W"]


@lru_cache(maxsize=16)
def _class_count(path: str, state: tuple[int, ...], key: str) -> int:
    labels = array(Path(path), key).reshape(-1)
    low, high = int(labels.min()), int(labels.max())
    said = f"{shown(path)}: {key} goes from {low} to {high}"
    if low == 1:
        raise UserError(
            f"{said}: labels begin at 0; save labels - 1, or say dataset.num_classes={high + 1} for a class 0"
        )
    if low != 0:
        raise UserError(f"{said}: labels are 0 to the number of classes - 1")
    if high == 0:
        raise UserError(f"{said}: all images are of one class; it takes two at least")
    if len(there := np.unique(labels)) != high + 1:
        lacks = int(np.setdiff1d(np.arange(min(high + 1, len(there) + 1)), there)[0])
        raise UserError(
            f"{said}, but no training image has {lacks}: number the labels without gaps, or say "
            f"dataset.num_classes={high + 1}"
        )
    return high + 1


def _reason(error: BaseException) -> str:
    return shown(" ".join(str(error).split())[:200]) or type(error).__name__
