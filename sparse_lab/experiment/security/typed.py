"""What launchers and sweepers are given, whoever says it: of the kinds that files may give them."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from sparse_lab.errors import UserError
from sparse_lab.experiment.security.allowed import kind_of
from sparse_lab.experiment.security.leaves import leaves


def check_typed(config: DictConfig) -> None:
    """Refuse a composed config of which a launcher or a sweeper could not use a value. Raises UserError.

    What only a job knows is not looked at.
    """
    for part in ("launcher", "sweeper"):
        for path, value, _ in leaves(config.hydra[part], part):
            plain: Any = getattr(value, "name", value)  # of an enumeration, such as a search's direction
            if path.startswith("sweeper.params.") or plain is None:
                continue  # overrides, which are read as such
            kind = kind_of(tuple(path.split(".")))
            if kind is not None and not kind.takes(plain):
                raise UserError(f"hydra.{path}={plain}: it takes {kind.said}")
