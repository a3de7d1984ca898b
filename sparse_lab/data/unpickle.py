"""Read CIFAR's batch files without running anything that a file might ask for.

The files are pickles, and a pickle can name any function to be called. numpy's own reconstruction is not harmless
either (a forged dtype can make it read foreign memory), so the few names that a saved array uses are answered by
stand-ins, which keep a shape and bytes and nothing else. Every other name is refused.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sparse_lab.errors import UserError
from sparse_lab.host.regular_file import GIB, opened

LARGEST = GIB  # bytes; CIFAR's largest file has 155 million


class _Dtype:
    """Stands in for numpy.dtype; CIFAR's pixels are bytes, so no other type is accepted."""

    def __init__(self, name: str | bytes, *flags: Any) -> None:
        if name not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"it holds an array of type {name!r}, not of bytes")

    def __setstate__(self, state: Any) -> None:
        """Byte order and field names: nothing that a byte has."""


class _Array:
    """Stands in for an array: `_reconstruct` makes an empty one, which its state then fills."""

    def __init__(self, *ignored: Any) -> None:
        self.values = np.empty(0, dtype=np.uint8)

    def __setstate__(self, state: Any) -> None:
        _version, shape, _dtype, fortran, raw = state
        self._fill(raw, shape, "F" if fortran else "C")

    def _fill(self, raw: bytes, shape: tuple[int, ...], order: Literal["C", "F"]) -> None:
        self.values = np.frombuffer(raw, dtype=np.uint8).reshape(shape, order=order)


class _Buffer(_Array):
    """Stands in for an array as pickle protocol 5 writes it."""

    def __init__(self, raw: bytes, _dtype: _Dtype, shape: tuple[int, ...], order: Literal["C", "F"]) -> None:
        self._fill(raw, shape, order)


class _Encoded:
    """Stands in for codecs.encode, by which Python 3 writes bytes in the old pickle protocol of the published files."""

    def __new__(cls, text: str, encoding: str) -> bytes:  # type: ignore[misc]
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
        return text.encode("latin1")


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.numeric", "_frombuffer"): _Buffer,
    ("_codecs", "encode"): _Encoded,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no image file needs; nothing was run")
        return _KNOWN[module, name]


def load(path: Path) -> dict[str, Any]:
    """The dictionary in a pickle file: text keys, byte arrays as uint8 ndarrays, and builtin values.

    Raises:
        UserError: the file is truncated, is no such dictionary, or names anything but a byte array.
    """
    try:
        with opened(path, LARGEST) as file:
            content = _Unpickler(file, encoding="bytes").load()
        return {_text(key): value.values if isinstance(value, _Array) else value for key, value in content.items()}
    except Exception as error:  # a foreign or cut pickle can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} cannot be read ({reason}): replace it by the original file") from error


def _text(key: str | bytes) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else key
