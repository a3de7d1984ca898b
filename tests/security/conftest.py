"""Hostile files, and how to see that one of them was run."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


class Bomb:
    """Whoever unpickles it runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


class Traps:
    """Writes files that leave a marker when they are unpickled. `sprung`: has one been?"""

    def __init__(self, folder: Path) -> None:
        self.marker = folder / "marker"

    @property
    def sprung(self) -> bool:
        return self.marker.exists()

    def bomb(self) -> Bomb:
        return Bomb(self.marker)

    def write(self, path: Path, how: str) -> None:
        """how: 'zip' and 'legacy' by torch.save, 'pickle' alone."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"state_dict": {"weight": torch.zeros(1)}, "network": self.bomb(), "format": "sparse_lab network 1"}
        plain = path.with_name(f"{path.name}.trap")  # torch looks at some names
        if how == "pickle":
            plain.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, plain, _use_new_zipfile_serialization=how == "zip")
        self.prove(plain)
        plain.rename(path)

    def prove(self, path: Path) -> None:
        """The file does what it is made for, where nobody is careful."""
        try:
            torch.load(path, weights_only=False)
        except Exception:
            pickle.loads(path.read_bytes())
        assert self.sprung, "the trap does not work"
        self.marker.unlink()


@pytest.fixture
def traps(tmp_path: Path) -> Traps:
    return Traps(tmp_path)


@pytest.fixture
def small(small: tuple[str, ...]) -> tuple[str, ...]:
    """One epoch of each phase."""
    return (*small, "training.epochs=1", "training.finetune.epochs=1", "training.regrow.epochs=1")
