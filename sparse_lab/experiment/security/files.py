"""Config files that are not ours: a folder given by --config-dir is what people pass around.

Each is looked at as it stands in its file, before Hydra follows its defaults list; and what it sets below `hydra` once
more as it came out, for a value may be an interpolation. What is typed has no part in this, so that no file can pass
for the command line.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparse_lab.errors import UserError
from sparse_lab.experiment.security.allowed import KeyPath, Kind, kind_of
from sparse_lab.experiment.security.interpolations import check_interpolations
from sparse_lab.experiment.security.leaves import DEEPEST
from sparse_lab.experiment.security.reading import check_file
from sparse_lab.experiment.security.servers import check_server, sets_server

SHOWN = reprlib.Repr()
SHOWN.maxstring = SHOWN.maxother = 80


@dataclass(frozen=True)
class Setting:
    """What a file sets below hydra. file: its name in the folder."""

    file: str
    path: KeyPath
    kind: Kind


class CheckedRepository(CachingConfigRepository):
    """Config files as Hydra reads them; one that is not ours is checked before anything in it is followed."""

    def load_config(self, config_path: str) -> ConfigResult | None:
        if ".." in config_path.split("/") or config_path.startswith("/"):
            raise UserError(f"{config_path}.yaml: a defaults list names files of its own folder alone")
        known = f"config_path={config_path}" in self.cache
        if not known:
            for source in self.get_sources():
                if source.scheme() == "file" and source.provider != "main":
                    check_file(Path(source.path), config_path)
        try:
            found = super().load_config(config_path)
        except AssertionError:  # Hydra's own, of a group's name
            raise UserError(f"the defaults list of {config_path}.yaml holds a name that is no text") from None
        if found is not None and not known and is_foreign(found):
            self._check(config_path, found)
        return found

    def _check(self, file: str, found: ConfigResult) -> None:
        if self.get_schema_source().is_config(file):
            raise UserError(f"{file}.yaml would take the place of one of Hydra's or sparse_lab's own: rename it")
        if not isinstance(found.config, DictConfig):
            raise UserError(f"{file}.yaml is no mapping of keys to values")
        check_interpolations(f"{file}.yaml", OmegaConf.to_container(found.config, resolve=False))
        for default in found.defaults_list or []:
            check_interpolations(f"the defaults list of {file}.yaml", list(vars(default).values()))


def is_foreign(found: ConfigResult) -> bool:
    """Is it from a folder beside ours? What is part of an installed package is code that somebody chose to install."""
    return found.provider != "main" and found.path.startswith("file://")


def check_files(loader: ConfigLoaderImpl, overrides: list[Override]) -> list[Setting]:
    """What the files that these overrides choose set below `hydra`. Raises UserError for what they may not.

    Raises what Hydra raises for files that cannot be found, read or put together.
    """
    repository = CheckedRepository(loader.repository)
    found = create_defaults_list(repository, "config", overrides, prepend_hydra=True, skip_missing=False)
    settings: list[Setting] = []
    for default in found.defaults:
        loaded = loader._load_single_config(default, repository)
        if is_foreign(loaded) or _misplaced(default, loaded):
            plain = OmegaConf.to_container(loaded.config, resolve=False)
            assert isinstance(plain, dict)
            file = f"{default.config_path}.yaml"
            logger = plain.get("logger")
            check_server(file, logger.get("mlflow_uri") if isinstance(logger, dict) else logger)
            if "hydra" in plain:
                settings += _checked(file, plain["hydra"])
    return settings


def check_settings(config: DictConfig, settings: list[Setting]) -> None:
    """Do they still fit as they came out, with interpolations resolved? Raises UserError with one line."""
    for setting in settings:
        node: Any = config.hydra
        try:
            for key in setting.path:
                node = node[key]
            value = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        except OmegaConfBaseException:
            raise UserError(f"{_name(setting.file, setting.path)} refers to what no run has: write it out") from None
        if value is not None and not setting.kind.fits(getattr(value, "name", value)):
            raise _unfit(setting.file, setting.path, value, setting.kind)


def _misplaced(default: ResultDefault, loaded: ConfigResult) -> bool:
    """Does another file put it at another place than its own? Its keys mean something else there."""
    group = str(default.config_path).rpartition("/")[0].replace("/", ".")
    own = loaded.header.get("package") or "_group_"
    return (default.package or "") != ("" if own == "_global_" else own.replace("_group_", group))


def _checked(file: str, node: Any) -> Iterator[Setting]:
    if not isinstance(node, dict):
        raise _refused(file, (), node)
    for path, value in _settings(node):
        if value is None or (value in ({}, []) and path[0] == "launcher" and len(path) > 1):
            if kind_of(path) is None and (path[0] != "launcher" or len(path) == 1):
                raise _refused(file, path, value)
            continue
        kind = kind_of(path)
        if kind is None:
            raise _refused(file, path, value)
        if not (isinstance(value, str) and "${" in value) and not kind.fits(value):
            raise _unfit(file, path, value, kind)
        if path[:2] == ("sweeper", "params") and sets_server(path[2]):
            check_server(file, value)
        yield Setting(file, path, kind)


def _settings(node: dict[Any, Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every key that is set, with its value; containers where they are empty, or the value of a key that is known."""
    if len(path) > DEEPEST:
        raise UserError(f"hydra.{'.'.join(map(str, path))[:80]}... is nested too deep")
    for key, value in node.items():
        where = (*path, key)
        if isinstance(value, dict) and value and kind_of(where) is None:
            yield from _settings(value, where)
        else:
            yield where, value


def _name(file: str, path: KeyPath) -> str:
    plain = ".".join(str(key) for key in ("hydra", *path))
    return f"{file}: {plain if plain.isprintable() else repr(plain)}"


def _refused(file: str, path: KeyPath, value: Any) -> UserError:
    return UserError(
        f"{_name(file, path)}={SHOWN.repr(value)}: a config file may not set this key: leave it out, or type it on the "
        "command line (docs/security.md lists what a file may set)"
    )


def _unfit(file: str, path: KeyPath, value: Any, kind: Kind) -> UserError:
    return UserError(f"{_name(file, path)}={SHOWN.repr(value)}: a config file may set this to {kind.said} alone")
