"""A downloaded archive writes into its own folder and nowhere else, by the download's own code."""

from __future__ import annotations

import io
import os
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from torchvision.datasets import CIFAR10

from sparse_lab import data
from sparse_lab.config import DatasetConfig, TrainingConfig
from sparse_lab.data import files
from sparse_lab.errors import UserError


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    if kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        made.devmajor, made.devminor = 1, 3
    return made


def archive(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for one in members:
            content = b"evil" if one.isreg() else b""
            one.size = len(content)
            tar.addfile(one, io.BytesIO(content))
    return path


def named(name: str) -> tarfile.TarInfo:
    """A file whose name stands in a PAX header, where any bytes are possible."""
    made = member("placeholder")
    made.pax_headers = {"path": name}
    return made


LINK = "cifar-10-batches-py/link"
HOSTILE = {
    "an absolute path": [member("OUTSIDE/escaped")],
    "an absolute folder": [member("OUTSIDE/escaped", tarfile.DIRTYPE)],
    "a path upwards": [member("../escaped")],
    "a path upwards further in": [member("cifar-10-batches-py/../../escaped")],
    "a link upwards, and a file through it": [member(LINK, tarfile.SYMTYPE, "../.."), member(f"{LINK}/escaped")],
    "an absolute link, and a file through it": [member(LINK, tarfile.SYMTYPE, "OUTSIDE"), member(f"{LINK}/escaped")],
    "a hard link to a file outside": [member(LINK, tarfile.LNKTYPE, "../secret"), member(LINK)],
    "a link that stays inside": [member(LINK, tarfile.SYMTYPE, "elsewhere")],
    "a device": [member("cifar-10-batches-py/device", tarfile.CHRTYPE)],
    "a pipe": [member("cifar-10-batches-py/pipe", tarfile.FIFOTYPE)],
    "a member twice": [member("cifar-10-batches-py/batches.meta"), member("cifar-10-batches-py/batches.meta")],
    "a file where a folder is": [member("cifar-10-batches-py", tarfile.DIRTYPE), member("cifar-10-batches-py")],
    "a folder where a file is": [member("cifar-10-batches-py"), member("cifar-10-batches-py", tarfile.DIRTYPE)],
    "a name cut by a NUL": [named("cifar-10-batches-py/cut\0off")],
    "the folder itself as a file": [member(".")],
}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(tmp_path):
    """(folder, address) of a web server on this machine."""
    folder = tmp_path.with_name(f"{tmp_path.name}-site")
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        serving.join()


@pytest.fixture
def publish(site, tmp_path, monkeypatch):
    """publish(members) makes the archive that the data set's URL names, with its md5, and gives the data set."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder, address = site

    def published(members: list[tarfile.TarInfo]) -> DatasetConfig:
        for one in members:
            one.name, one.linkname = (text.replace("OUTSIDE", str(tmp_path)) for text in (one.name, one.linkname))
        path = archive(folder / "cifar-10-python.tar.gz", *members)
        monkeypatch.setattr(CIFAR10, "url", f"{address}/{path.name}")
        monkeypatch.setattr(CIFAR10, "tgz_md5", files.md5_of(path))
        return DatasetConfig(name="cifar10", root=str(tmp_path / "data"), download=True)

    return published


@pytest.fixture(params=["a Python with filters", "a Python without"])
def filters(request, monkeypatch):
    """Python 3.11.0 to 3.11.3 know nothing of extraction filters."""
    if request.param == "a Python without":
        for name in ("data_filter", "tar_filter", "fully_trusted_filter"):
            monkeypatch.delattr(tarfile, name, raising=False)


@pytest.mark.parametrize("what", HOSTILE)
def test_what_would_land_elsewhere_is_refused(what, publish, tmp_path, filters):
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "secret").write_text("mine")
    dataset = publish(HOSTILE[what])
    with pytest.raises(UserError, match=r"downloading CIFAR-10 into .* failed") as caught:
        data.build(dataset, TrainingConfig(), seed=1)
    assert "\n" not in str(caught.value)
    there = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if not path.name.endswith(".lock")}
    assert there == {"secret", "data", "data/secret"}
    assert {(tmp_path / one).read_text() for one in ("secret", "data/secret")} == {"mine"}


def test_an_archive_that_is_not_the_published_one_is_not_unpacked(publish, tmp_path, monkeypatch):
    dataset = publish([member("cifar-10-batches-py/data_batch_1")])
    monkeypatch.setattr(CIFAR10, "tgz_md5", "c58f30108f718f92721af3b95e74349a")
    monkeypatch.setattr(files, "unpack", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(UserError, match=r"downloading CIFAR-10 into .* failed"):
        data.build(dataset, TrainingConfig(), seed=1)


def test_files_and_folders_are_unpacked_without_rights_of_their_own(tmp_path, filters):
    folder, inside = member("folder", tarfile.DIRTYPE), member("folder/file")
    folder.mode, inside.mode = 0o777, 0o4777
    files.unpack(archive(tmp_path / "good.tar.gz", folder, inside, member("no/folder/first")), tmp_path / "here")
    assert (tmp_path / "here" / "folder" / "file").read_bytes() == b"evil"
    assert (tmp_path / "here" / "no" / "folder" / "first").read_bytes() == b"evil"
    assert os.stat(tmp_path / "here" / "folder" / "file").st_mode & 0o7133 == 0
    assert os.stat(tmp_path / "here" / "folder").st_mode & 0o7022 == 0


def test_a_link_that_was_there_is_not_written_through(tmp_path, filters):
    (tmp_path / "here").mkdir()
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "here" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(FileExistsError):
        files.unpack(archive(tmp_path / "good.tar.gz", member("link")), tmp_path / "here")
    assert (tmp_path / "secret").read_text() == "mine"


def test_a_large_file_arrives_as_it_was(tmp_path, filters):
    content = os.urandom(3_000_000)
    (tmp_path / "source").write_bytes(content)
    with tarfile.open(tmp_path / "good.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "source", "folder/file")
    files.unpack(tmp_path / "good.tar.gz", tmp_path / "here")
    assert (tmp_path / "here" / "folder" / "file").read_bytes() == content
