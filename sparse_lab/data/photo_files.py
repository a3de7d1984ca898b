"""Photos in class folders: which parts there are, which classes, and which files. No torch: a request is composed, and
a finished run looked up, by what lies there.

DIR/train/CLASS/... with DIR/val/ or DIR/test/ beside it, or class folders alone. Links are followed. What begins with a
dot is no class and no photo (.ipynb_checkpoints, ._1.jpg); other files than photos are left where they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from sparse_lab.config import DatasetConfig
from sparse_lab.errors import UserError
from sparse_lab.records.atomic_io import printable

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
VALIDATION = ("val", "valid", "validation")  # what its folder may be called
# names that a folder of class folders is given; taken for classes, they would be what is learned
NO_CLASSES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"}
LAYOUT = "train/ with val/ or test/ beside it and a folder a class in each, or a folder a class and nothing above them"

Named = tuple[str, int]  # a photo's name below the base, and its label


@dataclass(frozen=True)
class Layout:
    """Where the photos lie: the folders below `base` that hold class folders. train: "" where these lie in `base`
    itself. validation, test: None where there is none.
    """

    base: Path
    train: str
    validation: str | None = None
    test: str | None = None

    def parts(self) -> list[str]:
        """Those that are there."""
        return [part for part in (self.train, self.validation, self.test) if part is not None]

    def classes(self) -> list[str]:
        """Sorted names of the classes. Raise UserError for fewer than two."""
        found = class_folders(self.base / self.train)
        if len(found) < 2:
            held = f"only the class folder {shown(found[0])}/" if found else _without_classes(self.base / self.train)
            raise UserError(f"{shown(self.base / self.train)} holds {held}: it takes two at least, one folder a class")
        return list(found)


def shown(path: Path | str) -> str:
    """A path in a message: its odd characters must not break the line."""
    return str(printable(str(path)))


def layout_of(dataset: DatasetConfig) -> Layout:
    """Return where the photos of a data set lie. Raise UserError where they lie in no way that is known."""
    return _imagenet(Path(dataset.root)) if dataset.name == "imagenet" else _folder(Path(dataset.root))


def _imagenet(root: Path) -> Layout:
    """The published `val` is the test set."""
    for base in (root, root / "imagenet"):
        if (base / "train").is_dir() and (base / "val").is_dir():
            return Layout(base, "train", test="val")
    raise UserError(
        f"imagenet is not in {root / 'imagenet'}: no train/ and val/ there; put one folder a class into each "
        "(it cannot be downloaded without an account), or point to another root with paths.data=DIR"
    )


def _folder(root: Path) -> Layout:
    if not root.is_dir():
        raise UserError(f"{shown(root)} is no folder: point dataset=folder to your photos with paths.data=DIR")
    validation = [part for part in VALIDATION if (root / part).is_dir()]
    test = "test" if (root / "test").is_dir() else None
    if (root / "train").is_dir() and (validation or test):
        if len(validation) > 1:
            raise UserError(f"{shown(root)} holds {' and '.join(f'{one}/' for one in validation)}: keep one of them")
        held = validation[0] if validation else None
        return Layout(root, "train", held, test) if test else Layout(root, "train", None, held)
    found = class_folders(root)
    if not found:
        raise UserError(f"{shown(root)} holds no folders; dataset=folder takes {LAYOUT} (paths.data=DIR)")
    parts = [name for name in found if name.lower() in NO_CLASSES and class_folders(root / name)]
    if parts:
        raise UserError(
            f"{shown(root)} holds {', '.join(f'{part}/' for part in parts)} with folders in it, and "
            f"that is no class; dataset=folder takes {LAYOUT}"
        )
    return Layout(root, "")


def class_folders(folder: Path) -> tuple[str, ...]:
    """Sorted names of the folders in a folder, but for those that begin with a dot. Raise UserError where it cannot be
    read.
    """
    try:
        about = folder.stat()
        return _class_folders(str(folder), (about.st_ino, about.st_nlink, about.st_mtime_ns, about.st_ctime_ns))
    except OSError as error:
        raise UserError(f"{shown(folder)} cannot be read ({error.strerror})") from None


@lru_cache(maxsize=64)
def _class_folders(folder: str, about: tuple[int, ...]) -> tuple[str, ...]:
    """Looked at once for each state of the folder: a sweep asks for every job."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_dir(entry):
                found.append(entry.name)
            elif entry.is_symlink() and not _is_file(entry):
                raise UserError(f"{shown(entry.path)} is a link that leads nowhere: remove it")
    return tuple(sorted(found))


def listed(layout: Layout) -> dict[str, list[Named]]:
    """Return the photos of each part in torchvision's order: by class, then by folder and name. Raise UserError where
    the parts have other classes, a class has no photo, or a photo no class.
    """
    classes = layout.classes()
    for part in layout.parts():
        _check_classes(layout, part, set(classes))
    return {part: list(_part(layout, part, classes)) for part in layout.parts()}


def _check_classes(layout: Layout, part: str, classes: set[str]) -> None:
    """UserError: a part has not the classes of the training photos."""
    found = set(class_folders(layout.base / part))
    if not found:
        folder = layout.base / part
        first = shown(min(classes))
        raise UserError(
            f"{shown(folder)} holds {_without_classes(folder)}: put its photos into a folder a class, as in "
            f"{layout.train}/ ({part}/{first}/... for those of {layout.train}/{first}/)"
        )
    if different := found ^ classes:
        one = min(different)
        where = layout.train if one in classes else part
        raise UserError(
            f"{shown(layout.base)}: {layout.train}/ and {part}/ hold different classes, for instance {shown(one)!r}, "
            f"which is in {where}/ alone"
        )


def _without_classes(folder: Path) -> str:
    """What lies in a folder without class folders."""
    with _scanned(folder) as entries:
        photos = sum(_is_photo(entry.name) for entry in entries)
    return f"{photos:,} photo{'' if photos == 1 else 's'} and no class folders" if photos else "no class folders"


def names(layout: Layout) -> list[str]:
    """The names of all photos below the base. Raise UserError as `listed`."""
    return [name for part in listed(layout).values() for name, _ in part]


def _part(layout: Layout, part: str, classes: list[str]) -> Iterator[Named]:
    folder = layout.base / part
    with _scanned(folder) as entries:
        stray = sorted(entry.name for entry in entries if _is_photo(entry.name) and not _is_dir(entry))
    if stray:
        more = f" (and {len(stray) - 1:,} more)" if len(stray) > 1 else ""
        raise UserError(
            f"{shown(folder / stray[0])}{more} lies beside the class folders: move it into one, or out of there"
        )
    for label, name in enumerate(classes):
        below = f"{part}/{name}" if part else name
        photos = sorted(_photos(layout.base, below), key=os.path.split)
        if not photos:
            raise UserError(
                f"{shown(layout.base / below)} holds no photo: fill the class, or delete its folder from every part "
                f"(a photo ends in {' '.join(SUFFIXES)})"
            )
        yield from ((photo, label) for photo in photos)


def _photos(base: Path, below: str) -> Iterator[str]:
    """Names below the base of the photos in a class folder, at any depth; what two links lead to is there once."""
    seen: set[tuple[int, int]] = set()
    above = tuple(_identity(folder) for folder in (base, (base / below).parent))
    left: list[tuple[str, tuple[tuple[int, int], ...]]] = [(below, above)]
    while left:
        name, above = left.pop()
        here = _identity(base / name)
        if here in above:
            raise UserError(f"{shown(base / name)} is a link to a folder that it lies in: remove it")
        if here in seen:
            continue
        seen.add(here)
        with _scanned(base / name) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):
                if entry.name.startswith("."):
                    continue
                if _is_dir(entry):
                    left.append((f"{name}/{entry.name}", (*above, here)))
                elif _is_photo(entry.name):
                    if not _is_file(entry):
                        what = (
                            "a pipe, a device or a socket" if _leads_somewhere(entry) else "a link that leads nowhere"
                        )
                        raise UserError(f"{shown(base / name / entry.name)} is {what}: remove it")
                    about = entry.stat()
                    if (about.st_dev, about.st_ino) not in seen:
                        seen.add((about.st_dev, about.st_ino))
                        yield f"{name}/{entry.name}"


def _scanned(folder: Path) -> AbstractContextManager[Iterator[os.DirEntry[str]]]:
    try:
        return os.scandir(folder)
    except OSError as error:
        raise UserError(f"{shown(folder)} cannot be read ({error.strerror})") from None


def _identity(folder: Path) -> tuple[int, int]:
    about = folder.stat()
    return about.st_dev, about.st_ino


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _leads_somewhere(entry: os.DirEntry[str]) -> bool:
    return os.path.exists(entry.path)


def _is_photo(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")
