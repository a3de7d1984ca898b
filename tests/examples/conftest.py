"""The plugins of examples/, given to the command in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sparse_lab.cli.main import main
from sparse_lab.experiment import plugins

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def examples() -> Iterator[Path]:
    yield EXAMPLES
    plugins.forget()


@pytest.fixture
def start(examples: Path, tmp_path: Path, small: tuple[str, ...]) -> Callable[..., int]:
    """start("method=...", example="own_method") -> the exit status of a small run under tmp_path."""

    def command(*words: str, example: str) -> int:
        request = ["--plugin", str(examples / example / "plugin.py"), *small, f"paths.outputs={tmp_path}", *words]
        return main(request)

    return command


@pytest.fixture
def results(tmp_path: Path) -> Callable[[], dict[str, dict[str, Any]]]:
    """The results of the runs under tmp_path, by name."""
    return lambda: {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("runs/*/result.json")}
