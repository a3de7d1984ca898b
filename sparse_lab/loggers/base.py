"""What every dashboard is told about a run, and what it must be able to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class RunInfo:
    """A run, as its dashboards know it. `step`: optimizer steps that an earlier start of the run has done.

    config: what matters in the run's config, plain values; nothing of the environment is in it.
    """

    name: str
    hash: str
    group: str
    project: str
    config: dict[str, Any]
    folder: Path
    outputs: Path
    mlflow_uri: str | None = None
    step: int = 0


class RunLogger(Protocol):
    """One dashboard. Made in the main thread (where its SDK is imported), used in a thread of its own.

    Whatever it raises leaves it out from there on; `close` may follow an `open` that failed.
    """

    def open(self, about: RunInfo) -> None:
        """Find the run of an earlier start, or make a new one."""

    def log(self, row: dict[str, float], step: int) -> None:
        """One row of figures after `step` optimizer steps."""

    def summary(self, figures: dict[str, float], step: int) -> None:
        """The figures that the run ends with."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[float]], step: int) -> None:
        """A table of the run's end."""

    def close(self, failed: bool) -> None:
        """The run is over."""


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result
