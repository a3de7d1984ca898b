"""Hydra writes only below paths.outputs, whoever says where, and only under names of its own."""

from __future__ import annotations

import os
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparse_lab.errors import UserError

OWN = ".hydra"  # the folder's name that Hydra takes by itself; nobody else's files lie there
SQLITE = "sqlite:///"


def check_writes(config: DictConfig) -> None:
    """Refuse a composed config with which Hydra would write elsewhere. Raises UserError with one line.

    What only a job knows is looked at once more when it starts.
    """
    hydra, outputs = config.hydra, real("paths.outputs", str(config.paths.outputs))
    if hydra.output_subdir not in (None, OWN):
        raise UserError(f"hydra.output_subdir={hydra.output_subdir}: Hydra's files go to {OWN}, or nowhere (null)")
    name = str(hydra.job.name)
    if not name.isprintable() or "/" in name or ".." in name:
        raise UserError(f"hydra.job.name={name!r} is part of a file's name: no slashes, no two dots")
    folders = {key: _known(hydra, key) for key in ("run.dir", "sweep.dir", "launcher.submitit_folder")}
    sweep, subdir = folders["sweep.dir"], _known(hydra, "sweep.subdir")
    if sweep is not None and subdir is not None:
        folders["sweep.subdir"] = os.path.join(sweep, subdir)
    storage = _known(hydra, "sweeper.storage") or ""
    if storage.startswith(SQLITE):
        folders["sweeper.storage"] = storage.removeprefix(SQLITE)
    for key, folder in folders.items():
        if folder is not None and not real(f"hydra.{key}", folder).is_relative_to(outputs):
            raise UserError(f"hydra.{key}={folder}: Hydra writes below paths.outputs ({outputs}) alone")


def _known(hydra: DictConfig, key: str) -> str | None:
    try:
        value = OmegaConf.select(hydra, key)
    except OmegaConfBaseException:
        return None
    return None if value is None else str(value)


def real(key: str, path: str) -> Path:
    """Return the whole path of what `key` names, links followed. Raise UserError where it leads nowhere."""
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself is a RuntimeError before Python 3.13
        raise UserError(f"{key}={path}: {error}: name another folder") from None
