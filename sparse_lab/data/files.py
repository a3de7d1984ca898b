"""Files of a published data set: are they there, are they the publisher's, and how they are fetched.

A download never leaves half a data set behind: it goes to a folder of its own beside the target, is verified there, and
only whole files are renamed into place.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from pathlib import Path, PurePosixPath

from sparse_lab.config import DatasetConfig
from sparse_lab.data import saying
from sparse_lab.errors import UserError
from sparse_lab.host.file_lock import lock as take


@dataclass(frozen=True)
class FileSet:
    """The files that a data set is read from.

    Attributes:
        title: the data set's name in messages.
        root: dataset.root.
        folder: where the files lie below root.
        official: file name to the publisher's md5.
        download: fetches the whole set into the root that it is given, in the same layout.
    """

    title: str
    root: Path
    folder: str
    official: dict[str, str]
    download: Callable[[Path], None]

    def path(self, name: str) -> Path:
        return self.root / self.folder / name

    def missing(self) -> list[str]:
        return [name for name in self.official if not self.path(name).is_file()]

    def md5(self) -> dict[str, str]:
        return {name: md5_of(self.path(name)) for name in self.official}


def verified(files: FileSet, dataset: DatasetConfig) -> tuple[dict[str, str], bool]:
    """The md5 of every file (keys relative to dataset.root), and whether they are the official ones.

    Raises:
        UserError: files are missing, or differ from the official ones while dataset.verify is true.
    """
    if missing := files.missing():
        raise UserError(
            f"{files.title} is not in {files.path('')}: {', '.join(missing)} missing; "
            "fetch it with dataset.download=true, or point to another root with paths.data=DIR"
        )
    seen = files.md5()
    foreign = [name for name, md5 in seen.items() if md5 != files.official[name]]
    if foreign and dataset.verify:
        name = foreign[0]
        more = f" (and {len(foreign) - 1} more file(s) differ)" if len(foreign) > 1 else ""
        raise UserError(
            f"{files.path(name)} has md5 {seen[name]}, the official one is {files.official[name]}{more}: delete what "
            "differs and set dataset.download=true, or accept other files with dataset.verify=false"
        )
    if foreign:
        listed = ", ".join(f"{name} {seen[name]}" for name in foreign)
        _say_once(f"warning: these {files.title} files are not the official ones: {listed}")
    return {f"{files.folder}/{name}": md5 for name, md5 in seen.items()}, not foreign


@cache
def _say_once(line: str) -> None:
    """A sweep asks for every run; a person reads it once."""
    saying.say(line)


def check(files: FileSet, dataset: DatasetConfig) -> None:
    """`verified`, but files that are still to be downloaded may be missing."""
    if not (dataset.download and files.missing()):
        verified(files, dataset)


def ready(files: FileSet, dataset: DatasetConfig) -> tuple[dict[str, str], bool]:
    """`verified`, after fetching what is missing where dataset.download allows it.

    Raises:
        UserError: as `verified`; or the download failed.
    """
    if dataset.download and files.missing():
        try:
            _fetch(files)
        except (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"downloading {files.title} into {files.root} failed: {reason}") from error
    return verified(files, dataset)


def _fetch(files: FileSet) -> None:
    name = files.folder.replace("/", "-")
    files.root.mkdir(parents=True, exist_ok=True)
    with (files.root / f".{name}.lock").open("w") as lock:
        take(lock, lock.name)
        if not files.missing():  # another process fetched them while this one waited
            return
        partial = files.root / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # left by a download that was killed
        partial.mkdir()
        try:
            files.download(partial)
            _move_into_place(files, partial)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def unpack(archive: Path, folder: Path) -> None:
    """Extract files and folders of a tar archive below `folder`; whatever else it holds is refused.

    Not by `extractall`: Python 3.11.0 to 3.11.3 have no filter for it, and ways around the later ones' went through
    links (CVE-2025-4517). Here no link is ever made, nothing that exists is written to, and of a member only its name
    and its bytes are taken: rights and owners are this process's own.

    Raises:
        tarfile.TarError: it is no tar archive, or holds a link, a device, a pipe, or a name that is no plain path.
        OSError: a name is there already, or cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            _extract(tar, member, folder)


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\0" in member.name:
        raise tarfile.ExtractError(f"{member.name!r} would land elsewhere")
    content = tar.extractfile(member) if member.isfile() else None
    if content is not None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        with content, (folder / path).open("xb") as file:
            shutil.copyfileobj(content, file)
    elif member.isdir():
        (folder / path).mkdir(parents=True, exist_ok=True)
    else:
        raise tarfile.ExtractError(f"{member.name!r} is neither a file nor a folder")


def _move_into_place(files: FileSet, partial: Path) -> None:
    for name, official in files.official.items():
        path = partial / files.folder / name
        if not path.is_file() or md5_of(path) != official:
            raise UserError(f"downloading {files.title} failed: {name} did not arrive whole; try again")
    for path in sorted((partial / files.folder).iterdir()):
        target = files.path(path.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and not target.exists():
            path.rename(target)


def md5_of(path: Path) -> str:
    """The md5 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
