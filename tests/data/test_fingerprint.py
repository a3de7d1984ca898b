"""A data set is known by what its files hold, whatever they are called above and wherever they lie."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from sparse_lab import data
from sparse_lab.config import DatasetConfig
from sparse_lab.data import cifar, fashion_mnist, fingerprint, photo_files, reads
from sparse_lab.data.fingerprint import of_files

FILES = {"train/a/1.png": b"one", "train/b/2.png": b"two", "val/a/3.png": b"three", "val/b/deep/4.JPEG": b"four"}


def lay(base: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(content)
    return base


def expected(files: dict[str, bytes], algorithm: str = "sha256") -> str:
    lines = (f"{name}\0{hashlib.new(algorithm, content).hexdigest()}\n" for name, content in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def photos(base: Path) -> list[tuple[str, os.stat_result]]:
    found = (Path(folder) / name for folder, _, names in os.walk(base) for name in names)
    return [(path.relative_to(base).as_posix(), path.stat()) for path in found]


def look(base: Path, store: Path) -> str:
    return of_files(base, photos(base), store)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose content was read."""
    found: list[str] = []
    real = fingerprint._Kept._read_chunk

    def read(self: fingerprint._Kept, chunk: list[tuple[str, str]]) -> list[str]:
        found.extend(name for name, _ in chunk)
        return real(self, chunk)

    monkeypatch.setattr(fingerprint._Kept, "_read_chunk", read)
    return found


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written in a test has lain there for long."""
    monkeypatch.setattr(fingerprint, "RACY", -1e6)


@pytest.mark.usefixtures("still")
def test_it_is_the_hash_of_names_and_contents_and_nothing_is_read_twice(tmp_path: Path, opened: list[str]) -> None:
    base, store = lay(tmp_path / "data", FILES), tmp_path / "store"
    assert look(base, store) == expected(FILES) and sorted(opened) == sorted(FILES)
    assert look(base, store) == expected(FILES) and len(opened) == 4
    # one file more: it alone is read
    assert look(lay(base, {"train/a/5.png": b"five"}), store) == expected(FILES | {"train/a/5.png": b"five"})
    assert opened[4:] == ["train/a/5.png"]
    # elsewhere it is the same, and where nothing can be kept as well
    shutil.copytree(base, tmp_path / "moved")
    (tmp_path / "file").touch()
    assert look(tmp_path / "moved", tmp_path / "file" / "store") == look(base, store)


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize("change", ["content", "content and times", "renamed", "removed", "moved to another class"])
def test_every_change_shows(tmp_path: Path, change: str) -> None:
    base, store = lay(tmp_path / "data", FILES), tmp_path / "store"
    before, path = look(base, store), base / "train/a/1.png"
    if change.startswith("content"):
        times = path.stat()
        path.write_bytes(b"eno")  # as long as it was
        if "times" in change:
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif change == "renamed":
        path.rename(path.with_name("9.png"))
    elif change == "removed":
        path.unlink()
    else:
        path.rename(base / "train/b/1.png")
    here = {name: (base / name).read_bytes() for name, _ in photos(base)}
    assert look(base, store) == expected(here) != before


def test_what_changed_just_now_is_read_again(tmp_path: Path, opened: list[str]) -> None:
    """A file could change twice within the time that its metadata tell apart."""
    base, store = lay(tmp_path / "data", FILES), tmp_path / "store"
    look(base, store)
    look(base, store)
    assert len(opened) == 8


@pytest.mark.usefixtures("still")
def test_a_damaged_store_is_not_believed(tmp_path: Path, opened: list[str]) -> None:
    base, store = lay(tmp_path / "data", FILES), tmp_path / "store"
    look(base, store)
    [summary], [table] = store.glob("*.json"), store.glob("*.tsv")
    record = json.loads(summary.read_text())
    summary.write_text(json.dumps({**record, "fingerprint": "f" * 64}))
    table.write_text(table.read_text().replace(table.read_text()[:64], "0" * 64))
    assert look(base, store) == expected(FILES) and len(opened) == 8


@pytest.mark.usefixtures("still")
def test_odd_names(tmp_path: Path, opened: list[str]) -> None:
    odd = {
        f"train/a/{name}.png": name.encode("utf-8", "surrogateescape") for name in ("a\tb", "a\nb", "é\u2028", "\udcff")
    }
    base, store = lay(tmp_path / "data", {**odd, "val/a/x.png": b""}), tmp_path / "store"
    first = look(base, store)
    lay(base, {"train/a/later.png": b"later"})
    assert first == expected({**odd, "val/a/x.png": b""}) and look(base, store) != first and len(opened) == 6


def test_a_long_reading_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fingerprint, "FIRST_LINE", -1.0)
    monkeypatch.setattr(fingerprint, "CHUNK", 1)
    base = lay(tmp_path / "data", FILES)
    look(base, tmp_path / "store")
    assert capsys.readouterr().err == f"reading {base} to know it by its content: 1 of 4 files\n"


def test_photos_are_those_that_torchvision_reads(tmp_path: Path) -> None:
    assert photo_files.SUFFIXES == IMG_EXTENSIONS
    other = {"train/a/notes.txt": b"", "train/b/x.JPEG.part": b"", "train/labels.csv": b""}
    base = lay(tmp_path, {**FILES, **other})
    (base / "val/a/folder.png").mkdir()
    listed = [ImageFolder(str(base / part)).samples for part in ("train", "val")]
    theirs = [(Path(path).relative_to(base).as_posix(), label) for samples in listed for path, label in samples]
    ours = photo_files.listed(photo_files.Layout(base, "train", test="val"))
    assert [*ours["train"], *ours["val"]] == theirs and sorted(name for name, _ in theirs) == sorted(FILES)


def test_published_files_are_those_that_are_read() -> None:
    for name, module in (("cifar10", cifar), ("cifar100", cifar), ("fashion_mnist", fashion_mnist)):
        files = module._files(DatasetConfig(name=name))
        assert reads.PUBLISHED[name] == (files.folder, files.official)


@pytest.fixture
def outputs(tmp_path: Path) -> Iterator[Path]:
    data.look_again()
    yield tmp_path / "outputs"
    data.look_again()


def test_what_is_the_publishers_needs_no_fingerprint_and_other_files_have_one(
    tmp_path: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert data.fingerprint_of(DatasetConfig(name="digits"), outputs) == ""
    assert data.fingerprint_of(DatasetConfig(name="synthetic"), outputs) == ""
    cifar10 = DatasetConfig(name="cifar10", root=str(tmp_path), verify=False)
    assert data.fingerprint_of(cifar10, outputs) == "", "nothing is there"
    folder, names = reads.PUBLISHED["cifar10"]
    files = {name: name.encode() for name in names}
    lay(tmp_path / folder, files)
    assert data.fingerprint_of(cifar10, outputs) == expected(files, "md5")
    data.look_again()
    md5s = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setitem(reads.PUBLISHED, "cifar10", (folder, md5s))
    assert data.fingerprint_of(cifar10, outputs) == "", "they are the publisher's after all"
    assert data.fingerprint_of(DatasetConfig(name="cifar10", root=str(tmp_path)), outputs) == "", "others are refused"


def test_within_a_process_it_is_looked_at_once(tmp_path: Path, outputs: Path) -> None:
    dataset = DatasetConfig(name="imagenet", root=str(lay(tmp_path / "data", FILES)))
    first = data.fingerprint_of(dataset, outputs)
    lay(tmp_path / "data", {"train/a/1.png": b"new"})
    assert data.fingerprint_of(dataset, outputs) == first
    data.look_again()
    assert data.fingerprint_of(dataset, outputs) != first


def test_digits_that_are_others_than_they_were_have_one(
    tmp_path: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "digits.csv.gz").write_bytes(b"other")
    monkeypatch.setattr(reads, "digits_file", lambda: tmp_path / "digits.csv.gz")
    assert data.fingerprint_of(DatasetConfig(name="digits"), outputs) == hashlib.sha256(b"other").hexdigest()
