"""Loggers beside the records on disk: one file each, all with the same few methods (`RunLogger`), each in a thread of
its own (`LoggerThread`) so that none can block or hurt a run. Their SDKs are imported only when they are asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path

from sparse_lab.errors import SparseLabError
from sparse_lab.loggers.base import RunInfo, RunLogger
from sparse_lab.loggers.thread import LoggerThread, close_all, left_out, reason

INSTALL = {
    "wandb": "pip install wandb",
    "tensorboard": "pip install 'sparse_lab[tensorboard]'",
    "mlflow": "pip install 'sparse_lab[mlflow]'",
    "trackio": "pip install 'sparse_lab[trackio]'",
}

__all__ = [
    "INSTALL",
    "LoggerThread",
    "RunInfo",
    "RunLogger",
    "check",
    "close_all",
    "factories",
    "left_out",
    "reason",
]


def check(names: Iterable[str]) -> None:
    """Raise SparseLabError for a logger whose package is not installed."""
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # no origin: a folder of that name, such as W&B's own ./wandb
            raise SparseLabError(f"logger={name} needs the package {name}: {INSTALL[name]}")


def factories(names: Iterable[str], outputs: Path) -> dict[str, Callable[[], RunLogger]]:
    """How to make these loggers; each imports its SDK when it is made."""
    from sparse_lab.loggers.mlflow import Mlflow
    from sparse_lab.loggers.tensorboard import Tensorboard
    from sparse_lab.loggers.trackio import Trackio
    from sparse_lab.loggers.wandb import Wandb

    known: dict[str, Callable[[], RunLogger]] = {
        "wandb": Wandb,
        "tensorboard": Tensorboard,
        "mlflow": Mlflow,
        "trackio": lambda: Trackio(outputs),
    }
    return {name: known[name] for name in names}
