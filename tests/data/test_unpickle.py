from __future__ import annotations

import builtins
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_lab.data import unpickle
from sparse_lab.errors import UserError


class Call:
    """Pickles into a call of `function` when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_come_out_as_pickle_reads_them(tmp_path: Path, protocol: int, order: Any) -> None:
    pixels = np.asarray(np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8), order=order)
    content = {"data": pixels, "labels": [1, 2, 3], "batch_label": "training batch 1 of 5"}
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    read = unpickle.load(path)
    assert (read["data"] == pickle.loads(path.read_bytes())["data"]).all()
    assert read["labels"] == [1, 2, 3]


def test_python_2_strings_as_in_the_published_files(tmp_path: Path) -> None:
    path = tmp_path / "batch"
    # PROTO 2, EMPTY_DICT, SHORT_BINSTRING "data", SHORT_BINSTRING ff 00, SETITEM, STOP
    path.write_bytes(b"\x80\x02}U\x04dataU\x02\xff\x00s.")
    assert unpickle.load(path) == {"data": b"\xff\x00"}


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_foreign_call_is_refused_and_never_run(tmp_path: Path, protocol: int) -> None:
    marker, path = tmp_path / "ran", tmp_path / "batch"
    path.write_bytes(pickle.dumps({"data": Call(os.system, f"touch {marker}")}, protocol=protocol))
    with pytest.raises(UserError, match=r"system.*nothing was run") as caught:
        unpickle.load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists(), "the control: an unrestricted reader does run it"


@pytest.mark.parametrize(
    "call",
    [
        Call(eval, "1 + 1"),
        Call(getattr, {}, "keys"),
        Call(np.fromfile, "batch"),
        Call(builtins.__import__, "os"),
        Call(np.dtype, "O"),
        np.zeros(3, dtype=np.int64),
        np.array([{}], dtype=object),
    ],
    ids=["eval", "getattr", "fromfile", "import", "dtype", "int64", "object"],
)
def test_nothing_but_byte_arrays_is_admitted(tmp_path: Path, call: Any) -> None:
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps({"data": call}))
    with pytest.raises(UserError, match="cannot be read"):
        unpickle.load(path)


def test_bytes_go_through_no_codec_but_latin1(tmp_path: Path) -> None:
    path = tmp_path / "batch"
    path.write_bytes(b"\x80\x02}U\x04datac_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86Rs.")
    with pytest.raises(UserError, match="rot13"):
        unpickle.load(path)


@pytest.mark.parametrize("raw", [b"", b"no pickle", pickle.dumps([1, 2]), b"\x80\x02}q\x00(U\x04da"])
def test_what_is_no_dictionary_is_refused_in_one_line(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "batch"
    path.write_bytes(raw)
    with pytest.raises(UserError, match="cannot be read") as caught:
        unpickle.load(path)
    assert "\n" not in str(caught.value)
