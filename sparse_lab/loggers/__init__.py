"""Loggers beside the records on disk: one file each, all with the same few methods (`RunLogger`), each in a thread of
its own (`LoggerThread`) so that none can block or hurt a run. Their SDKs are imported only when they are asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from sparse_lab.config import LoggerConfig
from sparse_lab.errors import UserError
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
    "chosen",
    "close_all",
    "factories",
    "left_out",
    "reason",
]


def chosen(logger: LoggerConfig) -> list[str]:
    """Names of the dashboards that are asked for."""
    return [name for name in INSTALL if getattr(logger, name)]


def check(logger: LoggerConfig) -> None:
    """Raises UserError for a dashboard whose package is not installed, and for a password in an address."""
    for name in chosen(logger):
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # no origin: a folder of that name, such as W&B's own ./wandb
            raise UserError(f"logger={name} needs the package {name}: {INSTALL[name]}")
    if logger.mlflow_uri is not None and urlsplit(logger.mlflow_uri).password:
        raise UserError(
            "logger.mlflow_uri holds a password, and would be written into the run's config: "
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )


def factories(logger: LoggerConfig, outputs: Path) -> dict[str, Callable[[], RunLogger]]:
    """How to make the dashboards that are asked for; each imports its SDK when it is made."""
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
    return {name: known[name] for name in chosen(logger)}
