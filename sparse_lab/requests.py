"""A command line read as a whole before anything runs: how many jobs it asks for, and what is wrong with it.

Hydra finds mistakes too, but one at a time, job by job, in many lines; a sweep that is wrong in its last axis should
not train for a day first.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparse_lab.config import Config, UserError, conf_dir, nearest

ConfigStore.instance().store(name="schema", node=Config)

ANSWERS = ("help", "hydra_help", "cfg", "info", "shell_completion")


def to_config(cfg: DictConfig) -> Config:
    """The composed config as plain dataclasses. Raises UserError when a value is missing or of the wrong type."""
    try:
        groups = {name: cfg[name] for name in Config.__dataclass_fields__}
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), groups))
    except OmegaConfBaseException as error:
        raise UserError(_first_line(error)) from None
    assert isinstance(config, Config)
    return config


@dataclass
class Request:
    """One command line. `axes`: override key -> the values that a sweep gives it."""

    argv: list[str]
    conf: Path
    user_conf: Path | None
    runs: bool
    fixed: list[str]
    axes: dict[str, list[str]]

    @classmethod
    def read(cls, argv: list[str]) -> Request:
        """Parse with Hydra's own grammar. Raises UserError for what it cannot read."""
        args = _parse(argv)
        argv = _flags_first(argv, args.overrides)
        conf = conf_dir()
        user_conf = Path(args.config_dir).resolve() if args.config_dir else None
        if user_conf is not None and not user_conf.is_dir():
            raise UserError(f"--config-dir {args.config_dir}: no such folder")
        if args.config_name or args.config_path:
            raise UserError("--config-name and --config-path would leave sparse_lab's own config: use --config-dir DIR")
        runs = not any(getattr(args, name) for name in ANSWERS)
        request = cls(argv, conf, user_conf, runs, [], {})
        if args.shell_completion:  # completes half-typed overrides: nothing to read yet
            return request
        try:
            overrides = OverridesParser.create().parse_overrides(args.overrides)
        except HydraException as error:
            raise UserError(f"cannot read the command line: {_first_line(error)}") from None
        for override in overrides:
            request._check_names(override)
            if override.is_sweep_override():
                request.axes[override.get_key_element()] = list(override.sweep_string_iterator())  # type: ignore[arg-type]
            else:
                request.fixed.append(str(override.input_line))
        if request.axes and runs and not args.multirun:
            key, values = next(iter(request.axes.items()))
            raise UserError(f"{key}={','.join(values)} is a sweep: add -m")
        if args.cfg or args.info:
            request.compose([])
        return request

    @property
    def jobs(self) -> int:
        number = 1
        for values in self.axes.values():
            number *= len(values)
        return number

    def choices(self, group: str) -> list[str]:
        """Names that a config group offers, in subfolders too, the user's own among them."""
        found: set[str] = set()
        for folder in (self.conf, self.user_conf):
            if folder is not None and (folder / group).is_dir():
                found |= {
                    path.relative_to(folder / group).with_suffix("").as_posix()
                    for path in (folder / group).rglob("*.yaml")
                }
        return sorted(found)

    def _check_names(self, override: Override) -> None:
        """Unknown groups, choices and keys, each with the nearest known name."""
        key = override.key_or_group
        if not key or override.is_delete():
            raise UserError(f"{override.input_line}: give keys a value, as in seed=1; nothing can be taken out")
        if key.startswith("hydra"):
            return
        choices = self.choices(key)
        if choices:
            values = override.sweep_string_iterator() if override.is_sweep_override() else [override.value()]
            for value in values:
                name = str(value)
                if name not in choices and name not in ("None", "null"):
                    raise UserError(f"unknown {key} {name!r}; {nearest(name, choices)}")
        else:
            check_key(key)

    def check(self) -> None:
        """Compose every job and check it, before the first one starts. Raises UserError."""
        from sparse_lab.check import check

        if self.read_experiment_axes().trainer.devices > 1 and self.axes:
            raise UserError(
                "a sweep with trainer=ddp would start itself again in every process: run its lines one by one"
            )
        for values in itertools.product(*self.axes.values()):
            config = to_config(self.compose([f"{key}={value}" for key, value in zip(self.axes, values, strict=True)]))
            if config.method.goes_on and config.method.starts_from not in self.choices("method"):
                known = nearest(str(config.method.starts_from), self.choices("method"))
                raise UserError(f"method.starts_from={config.method.starts_from}: {known}")
            check(config)

    def read_experiment_axes(self) -> DictConfig:
        """An experiment file may hold a sweep of its own; a list on the command line replaces the file's list."""
        composed = self.compose([f"{key}={values[0]}" for key, values in self.axes.items()], hydra=True)
        params = composed.hydra.sweeper.get("params") or {}
        if not params or str(composed.hydra.get("mode")) == "RunMode.RUN":
            return composed
        given = {line.split("=", 1)[0].lstrip("+") for line in self.fixed}
        for override in OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()]):
            self._check_names(override)
            key = override.get_key_element()
            if key not in self.axes and key not in given and override.is_sweep_override():
                self.axes[key] = list(override.sweep_string_iterator())  # type: ignore[arg-type]
        return composed

    def compose(self, swept: list[str], hydra: bool = False) -> DictConfig:
        """The config of one job: what is fixed, and one value of each axis. Raises UserError."""
        overrides = [*self.fixed, *swept]
        if self.user_conf is not None:
            overrides = [f"hydra.searchpath=[file://{self.user_conf}]", *overrides]
        try:
            with initialize_config_dir(str(self.conf), version_base="1.3"):
                return compose("config", overrides, return_hydra_config=hydra)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(_first_line(error.__cause__ or error)) from None


def _parse(argv: list[str]) -> argparse.Namespace:
    """Hydra's own flags; overrides may stand before, between and after them."""
    parser = get_args_parser()

    def refuse(message: str) -> typing.NoReturn:
        raise UserError(f"cannot read the command line: {message}; see sparse-lab --help")

    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_intermixed_args(argv)


def _flags_first(argv: list[str], overrides: list[str]) -> list[str]:
    """The same request in the order that Hydra can read."""
    left = list(overrides)
    flags = [word for word in argv if not (word in left and (left.remove(word) or True))]  # type: ignore[func-returns-value]
    return [*flags, *overrides]


def check_key(key: str) -> None:
    """Is `key` (dots between its parts) one of the schema's? Raises UserError with the nearest one."""
    walked: list[str] = []
    for part in key.split("."):
        known = _known_keys(walked)
        if known is None:
            return
        if part not in known:
            where = ".".join(walked) or "the config"
            raise UserError(f"unknown key {key!r}: {where} has no {part!r}; {nearest(part, known)}")
        walked.append(part)


def _known_keys(walked: list[str]) -> list[str] | None:
    """Keys below a path of the schema; None where the schema ends (a list, say)."""
    kind: Any = Config
    for part in walked:
        kind = typing.get_type_hints(kind)[part]
        inner = [one for one in typing.get_args(kind) if dataclasses.is_dataclass(one)]
        kind = inner[0] if inner else kind
        if not dataclasses.is_dataclass(kind):
            return None
    return [field.name for field in dataclasses.fields(kind)]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line for line in lines if line.startswith("full_key:")), "")
    return (lines[0] if lines else type(error).__name__) + (f" ({key})" if key else "")
