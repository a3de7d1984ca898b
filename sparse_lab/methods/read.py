"""A method by its name: what its own files in conf/ say, with settings put in place of theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from numbers import Number
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.defaults_list import create_defaults_list
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparse_lab.config import (
    CHOICES,
    Config,
    MethodConfig,
    ScheduleConfig,
    TrainingConfig,
    as_written,
    check_ranges,
    conf_dir,
    parts_of,
    present,
)
from sparse_lab.errors import UserError, nearest

# what `sparsify` takes beside settings: a misspelt one is looked for here too
ARGUMENTS = (
    "method",
    "sparsity",
    "total_steps",
    "epochs",
    "batches",
    "loss",
    "input_shape",
    "include",
    "exclude",
    "seed",
)
# what a method's and a schedule's own files say, and no other
ALONE = "sparse_lab_method_alone"
ConfigStore.instance().store(name=ALONE, node={"defaults": [{"schedule": "one_shot"}, {"method": "dense"}]})


def put_together(
    loader: ConfigLoaderImpl, repository: IConfigRepository, lines: list[Override]
) -> tuple[DictConfig, str]:
    """What the files of the method and the schedule that `lines` choose say: a config of these two groups, without
    types and defaults; and the schedule's name. Raises Hydra's and OmegaConf's errors.
    """
    found = create_defaults_list(repository, ALONE, lines, False, skip_missing=False)
    # merged here: Hydra's own merge would change what is cached
    files = [loader._load_single_config(one, repository).config for one in found.defaults]
    merged = OmegaConf.merge(*files)
    assert isinstance(merged, DictConfig)
    return merged, str(found.overrides.known_choices["schedule"])


def names(group: str = "method") -> list[str]:
    """Return the choices of a group of conf/, and of plugins."""
    return sorted(path.stem for folder in (conf_dir(), *CHOICES) for path in (folder / group).glob("*.yaml"))


def read(name: str, settings: Mapping[str, Any]) -> Config:
    """Return the config of method `name`, and of the schedule that it brings along.

    settings: `schedule="cubic"` chooses another; a part's or a schedule's name with a dict sets some of its keys, and
    puts it in where it is absent; with None it takes it out; any other name is that of a key of one of the method's
    parts, or of its schedule. Raises UserError for unknown names, each with the nearest known one, and for values of
    another type or out of range.
    """
    for group, chosen in (("method", name), ("schedule", settings.get("schedule", "constant"))):
        if chosen not in names(group):
            raise UserError(f"unknown {group} {chosen!r}; {nearest(str(chosen), names(group))}")
    if "schedule" in settings and not isinstance(settings["schedule"], str):
        raise UserError(f"schedule={settings['schedule']!r}: a name; known: {', '.join(names('schedule'))}")
    lines = [f"method={name}"] + ([f"schedule={settings['schedule']}"] if "schedule" in settings else [])
    loader = _loader(tuple(CHOICES))
    try:
        files, _ = put_together(loader, loader.repository, OverridesParser.create(loader).parse_overrides(lines))
        kinds = {"method": MethodConfig, "schedule": ScheduleConfig, "training": TrainingConfig}
        root = OmegaConf.merge({group: OmegaConf.structured(kind) for group, kind in kinds.items()}, files)
        for key, value in settings.items():
            if key != "schedule":
                _set(root, name, key, value)
        method, schedule = OmegaConf.to_object(root.method), OmegaConf.to_object(root.schedule)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"method {name!r}: {str(error).splitlines()[0]}") from None
    assert isinstance(method, MethodConfig) and isinstance(schedule, ScheduleConfig)
    check_ranges(method, "method")
    check_ranges(schedule, "schedule")
    return Config(method=method, schedule=schedule)


@cache
def _loader(choices: tuple[Path, ...]) -> ConfigLoaderImpl:
    return ConfigLoaderImpl(create_config_search_path(str(conf_dir())))


def _set(root: Any, name: str, key: str, value: Any) -> None:
    """Put a setting in place, in `root`."""
    groups = {"method": MethodConfig, "schedule": ScheduleConfig}
    for group, kind in groups.items():
        if key in parts_of(kind) and (value is None or isinstance(value, Mapping)):
            _set_part(root, group, key, value, parts_of(kind)[key])
            return
    there = [
        f"{group}.{part}"
        for group, kind in groups.items()
        for part, of in parts_of(kind).items()
        if root[group][part] is not None and key in [entry.name for entry in fields(of)]
    ]
    if len(there) > 1:
        there = _read(root, there, key)
    if len(there) > 1:
        listed = " and ".join(there)
        part = there[0].partition(".")[2]
        raise UserError(f"{key}={value!r}: {listed} each have that setting: say which, as in {part}=dict({key}=...)")
    if not there and any(key in parts_of(kind) for kind in groups.values()):
        raise UserError(f"{key}={value!r}: {key} is a part: give it settings as a dict, or None to leave it out")
    if not there:
        raise UserError(f"method {name!r} has no setting {key!r}; {nearest(key, {*_known(root), *ARGUMENTS})}")
    _put(root, f"{there[0]}.{key}", value)


def _put(root: Any, key: str, value: Any) -> None:
    if isinstance(value, Number) and hasattr(value, "item"):
        value = value.item()  # numpy's
    try:
        OmegaConf.update(root, key, as_written(list(value) if isinstance(value, tuple) else value))
    except OmegaConfBaseException as error:
        raise UserError(f"{key}={value!r}: {str(error).splitlines()[0]}") from None


def _read(root: Any, there: list[str], key: str) -> list[str]:
    """Of these parts those whose setting of that name is read by such a method."""
    from sparse_lab.methods.table import COMPONENTS

    config = _config(root)
    found = []
    for path in there:
        part = COMPONENTS.get(path.partition(".")[2])
        when = None if part is None else part.read_when.get(key)
        if when is None or when.reads(config):
            found.append(path)
    return found


def _config(root: Any) -> Config:
    return Config(method=OmegaConf.to_object(root.method), schedule=OmegaConf.to_object(root.schedule))  # type: ignore[arg-type]


def _set_part(root: Any, path: str, part: str, value: Any, kind: type) -> None:
    group = root[path]
    if value is None:
        group[part] = None
        return
    if group[part] is None:
        group[part] = OmegaConf.structured(kind())
    known = [entry.name for entry in fields(kind)]
    for key, one in value.items():
        if key not in known:
            raise UserError(f"{path}.{part} has no setting {key!r}; {nearest(str(key), known)}")
        _put(root, f"{path}.{part}.{key}", one)


def _known(root: Any) -> list[str]:
    """The settings that a keyword can name: parts, and the keys of those that are there."""
    config = _config(root)
    parts = [*parts_of(MethodConfig), *parts_of(ScheduleConfig)]
    of_parts = [
        entry.name
        for group in (config.method, config.schedule)
        for part in present(group)
        for entry in fields(getattr(group, part))
    ]
    return sorted({*parts, *of_parts})
