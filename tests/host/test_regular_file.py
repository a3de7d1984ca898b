import os
import socket
import zipfile
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import save_file

from sparse_lab.host.regular_file import check, check_tensors, opened, read_bytes, read_text


def test_a_file_is_read_as_it_is_also_through_a_link(tmp_path):
    (tmp_path / "file").write_bytes("ü\r\n".encode())
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_bytes(tmp_path / "link", 4) == "ü\r\n".encode()
    assert read_text(tmp_path / "link", 4) == "ü\r\n"
    with opened(str(tmp_path / "file"), 4) as file:
        assert file.read(2) == "ü".encode()


@pytest.mark.parametrize("kind", ["fifo", "device", "endless device", "socket"])
def test_what_is_no_file_is_refused_without_waiting(kind, tmp_path):
    path = tmp_path / "it"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    else:
        path.symlink_to("/dev/null" if kind == "device" else "/dev/zero")
    with pytest.raises(OSError):
        check(path, 100)


def test_a_folder_a_missing_file_and_a_loop_are_the_systems_own_errors(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    kinds = {tmp_path: IsADirectoryError, tmp_path / "none": FileNotFoundError, tmp_path / "loop": OSError}
    for path, kind in kinds.items():
        with pytest.raises(kind):
            read_bytes(path, 100)


def test_a_file_larger_than_its_kind_may_be_is_refused_unread(tmp_path):
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError) as error:
        check(path, 2**30)
    assert "1,099,511,627,776 bytes" in error.value.strerror and "1,073,741,824" in error.value.strerror


def test_a_file_that_grows_while_it_is_read_is_read_no_further_than_its_kind_may_go(tmp_path, monkeypatch):
    path = tmp_path / "growing"
    path.write_bytes(b"x" * 10)
    size = os.stat(path)
    path.write_bytes(b"x" * 1000)
    monkeypatch.setattr("sparse_lab.host.regular_file.os.fstat", lambda number: size)
    assert read_bytes(path, 10) == b"x" * 10


def test_a_generous_limit_takes_no_memory(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert read_bytes(tmp_path / "x", 2**50) == b"abc"


def test_an_archive_that_unpacks_to_more_than_it_has_is_refused(tmp_path):
    for how, well in ((zipfile.ZIP_STORED, True), (zipfile.ZIP_DEFLATED, False)):
        with zipfile.ZipFile(tmp_path / "tensors", "w", how) as archive:
            archive.writestr("data", b"\0" * 100_000)
        with nullcontext() if well else pytest.raises(OSError, match="unpacks to 100,000"):
            check_tensors(tmp_path / "tensors", 10**6)


def test_a_file_of_tensors_is_known_by_how_it_begins(tmp_path):
    path = tmp_path / "tensors"
    torch.save({"a": torch.zeros(2)}, path)
    check_tensors(path, 10**6)
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    check_tensors(path, 10**6)
    save_file({"a": torch.zeros(2)}, path)
    check_tensors(path, 10**6)
    for other in (b"", b"no tensors", b"\0" * 100):
        path.write_bytes(other)
        with pytest.raises(OSError, match="no file of tensors"):
            check_tensors(path, 10**6)
