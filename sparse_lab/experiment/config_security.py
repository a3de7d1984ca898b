"""What a config may start, and what it may hold. Hydra calls whatever a `_target_` names, so names outside this list
are refused, wherever a config has them from: a launcher's options, a folder given by --config-dir, a callback, a
logging setup.

Some values run code without a `_target_`: a dotted name that a plugin looks up, lines for a shell, a logging class,
a storage whose content is unpickled. They are refused too, or taken from the command line alone, which a person types.
Secrets are refused as well: configs and command lines are kept in records.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparse_lab.errors import UserError
from sparse_lab.records.redaction import is_secret, redact, secret_forms, secret_in

TARGETS = frozenset(
    {
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
        "hydra_plugins.sparse_lab_launchers.BasicLauncher",
        "hydra_plugins.sparse_lab_launchers.JoblibLauncher",
        "hydra_plugins.sparse_lab_launchers.RayLauncher",
        "hydra_plugins.sparse_lab_launchers.SlurmLauncher",
        "hydra_plugins.sparse_lab_launchers.LocalLauncher",
        "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper",
        "optuna.samplers.TPESampler",
        "optuna.samplers.RandomSampler",
        "optuna.samplers.GridSampler",
        "optuna.samplers.CmaEsSampler",
        "optuna.samplers.NSGAIISampler",
        "optuna.samplers.MOTPESampler",
    }
)
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
# Lines that a launcher hands to a shell, and ways for Ray to replace the program that it starts
TYPED = (
    "hydra.launcher.setup",
    "hydra.launcher.ray.init.runtime_env",
    "hydra.launcher.ray.remote.runtime_env",
    "hydra.job.env_set",
)
# What our own choices may set without being typed
HARMLESS_VARIABLES = ("OMP_", "MKL_", "CUDA_VISIBLE_DEVICES", "WANDB_MODE", "WANDB_SILENT")
DATABASES = ("sqlite:///", "mysql://", "mysql+pymysql://", "postgresql://", "postgresql+psycopg2://")
VARIABLE = re.compile(r"\.(?:env_set|env_vars)\.(\w+)$")  # where a config sets environment variables
HELP = ("hydra.help.", "hydra.hydra_help.", "hydra.runtime.")
DEEPEST = 60  # a config that refers to itself has no end


def check_targets(config: DictConfig) -> None:
    """Refuse a composed config that would start anything unknown. Raises UserError with one line.

    Args:
        config: everything that Hydra composed, its own node `hydra` with it where there is one.
    """
    for path, value, interpolated in leaves(config):
        key = path.rsplit(".", 1)[-1]
        if key == "_target_":
            _check_target(path, value, interpolated)
        if path.startswith("hydra.launcher.") and isinstance(value, str) and "\n" in value and not interpolated:
            raise UserError(f"{path} holds several lines, and a batch script would run them: give one line")
    if "hydra" in config:
        check_searchpath(config.hydra.get("searchpath") or [])
        for name in ("job_logging", "hydra_logging"):
            _check_logging(config.hydra, name)
        _check_sweeper(config.hydra.sweeper)
        _check_typed(config)


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


def _check_logging(hydra: DictConfig, name: str) -> None:
    """Python's logging setup calls what `()` and `class` name, and imports what `ext://` names."""
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


def _check_sweeper(sweeper: DictConfig) -> None:
    if sweeper.get("custom_search_space"):
        raise UserError(
            "hydra.sweeper.custom_search_space names a function to call: put the search into hydra.sweeper.params"
        )
    for group in ("params", "search_space"):
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


def _check_typed(config: DictConfig) -> None:
    """What runs commands, or changes what a command is, is taken from the command line and from nowhere else."""
    typed = [str(line).lstrip("+~") for line in config.hydra.overrides.hydra]
    for path in TYPED:
        value = OmegaConf.select(config, path, throw_on_missing=False, throw_on_resolution_failure=False)
        if not value or any(line.startswith(path) for line in typed):
            continue
        if path == "hydra.job.env_set":
            copied = config.hydra.job.env_copy  # as they are in this environment
            if all(name in copied or str(name).startswith(HARMLESS_VARIABLES) for name in value):
                continue
        raise UserError(f"{path} in a config file could run anything: give it on the command line, or leave it out")


def check_line(argv: Iterable[str]) -> None:
    """Refuse a command line that holds a secret: commands are kept in records. Raises UserError with one line."""
    forms = secret_forms()
    for word in argv:
        if found := secret_in(word, forms):
            key, given, _ = word.partition("=")
            where = f"{redact(key)} on the command line" if given else "the command line"
            raise UserError(f"{where} holds {found}, and commands are kept in records: keep it in the environment")


def check_config(config: DictConfig) -> None:
    """Refuse a composed config in which a value is, or is made of, a secret. Raises UserError with one line.

    Hydra's own node is looked at as Hydra saves it, with interpolations left; the rest as a run sees it, resolved.
    """
    forms = secret_forms()
    for path, value, interpolated in leaves(config):
        if not isinstance(value, str) or path.startswith(HELP) or (interpolated and path.startswith("hydra.")):
            continue
        found = secret_in(value, forms)
        if found is None and (match := VARIABLE.search(path)) and is_secret(match[1], value):
            found = f"a value for {match[1]}"
        if found is not None:
            raise _kept(path, found)


def _kept(path: str, found: str) -> UserError:
    return UserError(
        f"{path} would hold {found}, and configs are kept in records: keep it in the environment, where what needs it "
        "looks for it"
    )


def check_values(config: Any) -> None:
    """Refuse a run's config (a dataclass) in which a text is, or is made of, a secret. Raises UserError."""
    forms = secret_forms()

    def look(part: Any, path: str) -> None:
        if isinstance(part, str):
            if found := secret_in(part, forms):
                raise _kept(path, found)
        elif isinstance(part, (list, tuple)):
            for number, value in enumerate(part):
                look(value, f"{path}.{number}")
        elif dataclasses.is_dataclass(part):
            for name, value in vars(part).items():
                look(value, f"{path}.{name}".lstrip("."))

    look(config, "")
