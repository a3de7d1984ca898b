"""A sweep small enough to take seconds, and the command as its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def small(small: tuple[str, ...], tmp_path: Path) -> list[str]:
    """Under out/; one epoch behind each mask change."""
    own = ("dataset.train_limit=64", "training.batch_size=32", "training.finetune.epochs=1", "training.regrow.epochs=1")
    return [*small, *own, f"paths.outputs={tmp_path / 'out'}"]


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """command("-m", ...) -> the ended process, started in a folder of its own."""

    def start(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sparse_lab", *argv],
            capture_output=True, text=True, cwd=tmp_path, timeout=400, env={**os.environ, **environment},
        )  # fmt: skip

    return start


@pytest.fixture
def outcomes(tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    """What the jobs of the only sweep under out/ left, in the order of their numbers."""

    def read() -> list[dict[str, Any]]:
        files = sorted(path for path in (tmp_path / "out" / "sweeps").glob("*/*.json") if path.stem.isdigit())
        return [json.loads(path.read_text()) for path in files]

    return read


@pytest.fixture
def results(tmp_path: Path) -> Callable[[], dict[str, int]]:
    """Run -> when its result was written, in ns."""

    def read() -> dict[str, int]:
        found = (tmp_path / "out" / "runs").glob("*/result.json")
        return {path.parent.name: path.stat().st_mtime_ns for path in found}

    return read
