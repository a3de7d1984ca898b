from __future__ import annotations

import dataclasses
import fcntl
import shutil
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch

from sparse_lab.config import DatasetConfig
from sparse_lab.data import cifar, files
from sparse_lab.errors import UserError


@pytest.fixture
def remote(cifar10: DatasetConfig, tmp_path: Path) -> tuple[Path, DatasetConfig]:
    """The files move away, to where a download would bring them from; the config now allows downloads."""
    source = tmp_path / "remote"
    shutil.move(cifar10.root, source)
    return source, dataclasses.replace(cifar10, download=True)


def serve(monkeypatch: pytest.MonkeyPatch, fetch: Callable[[Path], None]) -> None:
    def download(url: str, root: str, filename: str, md5: str) -> None:
        assert url.endswith("cifar-10-python.tar.gz") and md5 == "c58f30108f718f92721af3b95e74349a"
        fetch(Path(root))
        tarfile.open(Path(root) / filename, "w").close()  # what it would hold is there already

    monkeypatch.setattr(cifar, "download_url", download)


def copy_from(source: Path) -> Callable[[Path], None]:
    def fetch(root: Path) -> None:
        shutil.copytree(source, root, dirs_exist_ok=True)

    return fetch


def leftovers(root: Path) -> list[str]:
    return [path.name for path in root.rglob("*") if not path.name.endswith(".lock")]


def test_a_download_lands_in_place_whole(remote: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source, dataset = remote
    serve(monkeypatch, copy_from(source))
    cifar.check(dataset)  # nothing is there yet, but build may fetch it
    assert not Path(dataset.root).exists()
    fetched = cifar.load(dataset, seed=1)
    reference = cifar.load(dataclasses.replace(dataset, root=str(source), download=False), seed=1)
    assert fetched.official and torch.equal(fetched.images, reference.images)
    assert not list(Path(dataset.root).glob("*.partial"))


def test_files_that_are_there_are_not_fetched_again(cifar10: DatasetConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(root: Path) -> None:
        raise AssertionError("downloaded again")

    serve(monkeypatch, never)
    assert cifar.load(dataclasses.replace(cifar10, download=True), seed=1).official


def test_only_what_is_missing_is_filled_in(remote: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source, dataset = remote
    shutil.copytree(source, dataset.root)
    kept = Path(dataset.root) / "cifar-10-batches-py" / "data_batch_1"
    inode = kept.stat().st_ino
    kept.with_name("test_batch").unlink()
    serve(monkeypatch, copy_from(source))
    assert cifar.load(dataset, seed=1).official
    assert kept.stat().st_ino == inode


@pytest.mark.parametrize("failure", [URLError("no route\nto host"), RuntimeError("corrupted"), KeyboardInterrupt()])
def test_an_interrupted_download_leaves_nothing(remote: Any, monkeypatch: pytest.MonkeyPatch, failure: Any) -> None:
    source, dataset = remote

    def half(root: Path) -> None:
        (root / "cifar-10-batches-py").mkdir()
        for path in sorted((source / "cifar-10-batches-py").iterdir())[:3]:
            (root / "cifar-10-batches-py" / path.name).write_bytes(path.read_bytes()[:1000])
        raise failure

    serve(monkeypatch, half)
    with pytest.raises((UserError, KeyboardInterrupt)) as caught:
        cifar.load(dataset, seed=1)
    if isinstance(caught.value, UserError):
        assert "downloading CIFAR-10" in str(caught.value) and "\n" not in str(caught.value)
    assert leftovers(Path(dataset.root)) == []
    with pytest.raises(UserError, match="missing"):
        cifar.load(dataclasses.replace(dataset, download=False), seed=1)


def test_a_download_that_ends_early_without_an_error_is_refused(remote: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source, dataset = remote

    def cut(root: Path) -> None:
        shutil.copytree(source, root, dirs_exist_ok=True)
        path = root / "cifar-10-batches-py" / "data_batch_4"
        path.write_bytes(path.read_bytes()[:1000])

    serve(monkeypatch, cut)
    with pytest.raises(UserError, match="data_batch_4 did not arrive whole"):
        cifar.load(dataclasses.replace(dataset, verify=False), seed=1)
    assert leftovers(Path(dataset.root)) == []


def test_what_a_killed_download_left_is_never_used(remote: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source, dataset = remote
    partial = Path(dataset.root) / ".cifar-10-batches-py.partial"
    shutil.copytree(source, partial)
    stale = partial / "cifar-10-batches-py" / "stale"
    stale.write_text("half a file")
    with pytest.raises(UserError, match="missing"):
        cifar.load(dataclasses.replace(dataset, download=False), seed=1)
    serve(monkeypatch, copy_from(source))
    assert cifar.load(dataset, seed=1).official
    assert "stale" not in leftovers(Path(dataset.root)) and not partial.exists()


def test_a_root_that_cannot_be_written_is_one_line(remote: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source, dataset = remote
    serve(monkeypatch, copy_from(source))
    Path(dataset.root).write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"downloading CIFAR-10 into .* failed"):
        cifar.load(dataset, seed=1)


def test_a_second_process_waits_and_then_takes_what_the_first_fetched(tmp_path: Path) -> None:
    calls: list[Path] = []
    wanted = {"one": "0cc175b9c0f1b6a831c399e269772661"}  # md5 of "a"
    dataset = DatasetConfig(root=str(tmp_path), download=True)
    pack = files.FileSet("Pack", tmp_path, "pack", wanted, calls.append)
    lock = (tmp_path / ".pack.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    waiting = threading.Thread(target=files.ready, args=(pack, dataset))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive() and not calls
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "one").write_text("a")
    lock.close()
    waiting.join(5)
    assert not waiting.is_alive() and not calls
