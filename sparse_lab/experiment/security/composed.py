"""All that is looked at in a composed config: when a request is read, and once more when one of its jobs starts."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from sparse_lab.errors import UserError
from sparse_lab.experiment.security.launching import check_launching
from sparse_lab.experiment.security.logging_setup import check_logging
from sparse_lab.experiment.security.secrets import check_config
from sparse_lab.experiment.security.targets import check_targets
from sparse_lab.experiment.security.typed import check_typed
from sparse_lab.experiment.security.writes import check_writes


def check_composed(config: DictConfig) -> None:
    """Refuse what Hydra composed where it would start, run, write or hold what it must not. Raises UserError."""
    for part in ("launcher", "sweeper"):
        if OmegaConf.is_missing(config.hydra, part) or config.hydra[part] is None:
            raise UserError(f"hydra/{part}=null: jobs need one: choose another, or leave it out")
        if not isinstance(config.hydra[part], DictConfig):
            raise UserError(f"hydra.{part}={config.hydra[part]}: it is chosen, as in hydra/{part}=basic")
    check_targets(config)
    check_logging(config)
    check_launching(config)
    check_config(config)
    check_writes(config)
    check_typed(config)
