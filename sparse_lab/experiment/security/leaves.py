"""A composed config, value by value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparse_lab.errors import UserError

DEEPEST = 60  # a config that refers to itself has no end


def leaves(node: DictConfig | ListConfig, path: str = "", depth: int = 0) -> Iterator[tuple[str, Any, bool]]:
    """(path, value, is it an interpolation) of everything below `node` that is no container, or is a `_target_`."""
    if depth > DEEPEST:
        raise UserError(f"{path[:80]}... is nested too deep: does the config refer to itself?")
    keys: Iterable[Any] = node.keys() if isinstance(node, DictConfig) else range(len(node))
    for key in list(keys):
        where = f"{path}.{key}".lstrip(".")
        if OmegaConf.is_missing(node, key):
            continue
        interpolated = OmegaConf.is_interpolation(node, key)
        try:
            value = node[key]
        except OmegaConfBaseException:  # known only once a job runs: its number, its folder
            value = None
        if isinstance(value, (DictConfig, ListConfig)) and key != "_target_":
            yield from leaves(value, where, depth + 1)
        else:
            yield where, value, interpolated
