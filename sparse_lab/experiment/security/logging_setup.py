"""Python's logging setup calls what `()` and `class` name, imports what `ext://` names, and writes files."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sparse_lab.errors import UserError

LOGGING_CLASSES = frozenset(
    {
        "logging.Formatter",
        "logging.StreamHandler",
        "logging.FileHandler",
        "logging.NullHandler",
        "colorlog.ColoredFormatter",
        "rich.logging.RichHandler",
    }
)
STREAMS = frozenset({"ext://sys.stdout", "ext://sys.stderr"})
LOG_FILE = "${hydra.runtime.output_dir}/${hydra.job.name}.log"


def check_logging(config: DictConfig) -> None:
    """Refuse what Hydra would set up for its own lines and for a job's. Raises UserError with one line."""
    for name in ("job_logging", "hydra_logging"):
        _check(config.hydra, name)


def _check(hydra: DictConfig, name: str) -> None:
    if OmegaConf.is_interpolation(hydra, name):
        raise UserError(f"hydra.{name} is put together from other values: write it out")
    job = str(hydra.job.name or "")
    plain = OmegaConf.to_container(hydra[name], resolve=False) if hydra.get(name) is not None else {}
    for path, key, value in _plain_leaves(plain, f"hydra.{name}"):
        if key in ("()", "."):
            raise UserError(f"{path}: logging must not call functions of a config's choice: remove it")
        if key == "class" and str(value) not in LOGGING_CLASSES:
            known = difflib.get_close_matches(str(value), LOGGING_CLASSES, n=1, cutoff=0.0)[0]
            raise UserError(f"{path}={value} is not among the logging classes known here; the nearest that is: {known}")
        if not isinstance(value, str):
            continue
        if "://" in value and key != "format" and value not in STREAMS:
            raise UserError(f"{path}={value}: logging goes to ext://sys.stdout or ext://sys.stderr")
        if key == "filename" and (value != LOG_FILE or "/" in job or ".." in job):
            raise UserError(f"{path}={value}: a log file is {LOG_FILE}, or none")
        if "${" in value and value != LOG_FILE:
            raise UserError(f"{path}={value} is put together from other values: write it out")


def _plain_leaves(node: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """(path, key, value) of every entry below, containers as well."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield f"{path}.{key}", key, value
        if isinstance(value, (dict, list)):
            yield from _plain_leaves(value, f"{path}.{key}")
