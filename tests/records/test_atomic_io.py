"""Files are replaced whole, and damage to what carries a checksum is found."""

from __future__ import annotations

import hashlib
import json
import zipfile

import pytest
import torch

from sparse_lab.records.atomic_io import append_checksum, atomic_write, damaged, verify_checksum, write_record


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"weight": torch.arange(1000.0), "step": 3}, path)
    return path


def test_a_sealed_checkpoint_is_read_by_torch_and_by_zipfile(archive):
    bare = archive.read_bytes()
    assert verify_checksum(archive) is None
    append_checksum(archive)
    assert verify_checksum(archive) is True
    loaded = torch.load(archive, weights_only=True)
    assert torch.equal(loaded["weight"], torch.arange(1000.0)) and loaded["step"] == 3
    comment = zipfile.ZipFile(archive).comment.decode()
    assert comment == f"sparse_lab sha256 {hashlib.sha256(bare).hexdigest()}"


def test_every_flipped_bit_and_every_cut_is_found(archive):
    append_checksum(archive)
    sealed = archive.read_bytes()
    for place in range(0, len(sealed), 97):
        archive.write_bytes(sealed[:place] + bytes([sealed[place] ^ 4]) + sealed[place + 1 :])
        assert verify_checksum(archive) is not True, place
        archive.write_bytes(sealed[:place])
        assert verify_checksum(archive) is not True, place
    for place in range(4, len(sealed) - 90, 97):  # the archive itself, its seal still there
        archive.write_bytes(sealed[:place] + bytes([sealed[place] ^ 4]) + sealed[place + 1 :])
        assert verify_checksum(archive) is False, place
    archive.write_bytes(sealed[:-1])
    assert verify_checksum(archive) is False


def test_only_an_archive_without_a_comment_is_sealed(archive, tmp_path):
    append_checksum(archive)
    with pytest.raises(ValueError, match="zip archive"):
        append_checksum(archive)
    (tmp_path / "text").write_text("no archive, but long enough to look at its end")
    with pytest.raises(ValueError, match="zip archive"):
        append_checksum(tmp_path / "text")
    assert verify_checksum(tmp_path / "text") is None


def test_what_fails_half_way_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_record_that_was_changed_is_damaged_however_it_is_laid_out(tmp_path):
    record = {"name": "run ±", "levels": [{"test": 91.234567890123}, {"test": None}], "kept": 2**60, "share": 1e-7}
    write_record(tmp_path / "r.json", record)
    text = (tmp_path / "r.json").read_text()
    read = json.loads(text)
    assert not damaged(read) and {**record, "checksum": read["checksum"]} == read
    assert not damaged(json.loads(json.dumps(dict(reversed(read.items())), ensure_ascii=False)))
    assert damaged(json.loads(text.replace("91.234567890123", "91.234567890124")))
    assert damaged({**read, "extra": 1})
    assert not damaged(record), "a record from before there were checksums"
