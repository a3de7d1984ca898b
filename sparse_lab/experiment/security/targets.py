"""What a config may start. Hydra calls whatever a `_target_` names, so names outside these lists are refused, wherever
they come from: a launcher's options, a callback, what is typed.

Some values run code without a `_target_`: a dotted name that a plugin looks up, a storage whose content is unpickled.
"""

from __future__ import annotations

import difflib
from typing import Any

from omegaconf import DictConfig

from sparse_lab.errors import UserError
from sparse_lab.experiment.security.leaves import leaves

LAUNCHERS = tuple(
    f"hydra_plugins.sparse_lab_launchers.{name}Launcher" for name in ("Basic", "Joblib", "Ray", "Slurm", "Local")
)
SEARCHED = ("params", "search_space")
MAPPINGS = dict.fromkeys(SEARCHED, "a sweep's keys stand by themselves, as in -m seed=1,2") | {
    "sampler": "choose one, as in hydra/sweeper/sampler=tpe"
}
SWEEPERS = (
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper",
)
SAMPLERS = tuple(f"optuna.samplers.{name}Sampler" for name in ("TPE", "Random", "Grid", "CmaEs", "NSGAII", "MOTPE"))
TARGETS = frozenset({*LAUNCHERS, *SWEEPERS, *SAMPLERS})
DATABASES = ("sqlite:///", "mysql://", "mysql+pymysql://", "postgresql://", "postgresql+psycopg2://")


def check_targets(config: DictConfig) -> None:
    """Refuse a composed config that would start anything unknown. Raises UserError with one line.

    Args:
        config: everything that Hydra composed, its own node `hydra` with it where there is one.
    """
    for path, value, interpolated in leaves(config):
        if path.rsplit(".", 1)[-1] == "_target_":
            _check_target(path, value, interpolated)
    if "hydra" in config:
        check_searchpath(config.hydra.get("searchpath") or [])
        _check_sweeper(config.hydra.sweeper)


def check_searchpath(entries: Any) -> None:
    """Only folders: `pkg://` would import the package that it names. Raises UserError."""
    for entry in [entries] if isinstance(entries, str) else entries:
        if not str(entry).startswith("file://"):
            raise UserError(f"hydra.searchpath={entry}: only folders are searched: use --config-dir DIR")


def _check_target(path: str, value: Any, interpolated: bool) -> None:
    if interpolated:
        raise UserError(f"{path} is put together from other values: write the name itself")
    if str(value) in TARGETS:
        return
    close = difflib.get_close_matches(str(value), TARGETS, n=1, cutoff=0.0)[0]
    raise UserError(f"{path}={value} is not among what sparse_lab starts; the nearest that is: {close}")


def _check_sweeper(sweeper: DictConfig | None) -> None:
    if sweeper is None:
        raise UserError("hydra.sweeper is null: choose one, as in hydra/sweeper=basic")
    for group, remedy in MAPPINGS.items():
        value = sweeper.get(group)
        if value is not None and not isinstance(value, DictConfig):
            raise UserError(f"hydra.sweeper.{group}={value}: {remedy}")
    if sweeper.get("custom_search_space"):
        raise UserError(
            "hydra.sweeper.custom_search_space names a function to call: put the search into hydra.sweeper.params"
        )
    for group in SEARCHED:
        for key in sweeper.get(group) or {}:
            if str(key).lstrip("+~").startswith("hydra"):
                raise UserError(f"hydra.sweeper.{group}.{key}: a sweep goes over a run's keys, not over Hydra's own")
    storage = sweeper.get("storage")
    if storage is None:
        return
    if not str(storage).startswith(DATABASES):
        raise UserError(
            f"hydra.sweeper.storage={storage}: what other kinds of storage hold is unpickled: use sqlite:///FILE"
        )
    if str((sweeper.get("sampler") or {}).get("_target_")).endswith("CmaEsSampler"):
        raise UserError(
            "hydra.sweeper.storage with the CMA-ES sampler, whose state would be unpickled: use sampler=tpe"
        )
