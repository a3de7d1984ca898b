"""A run's name: a hash of the settings that differ from the defaults in the parts that are there, so that the same
request finds the same folder. A finished run is not run again, an interrupted one goes on.

A key that is added changes no name, for what is not set differs from nothing. Where a default changes, its key says
what it was at first (`config.key(..., first=...)`), and only runs that rely on the new one get other names. Where what
a key does changes, its revision is raised (`config.key(..., revision=2)`), and only runs that set it get other names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_lab.config import ALWAYS, Config, as_written
from sparse_lab.data import fingerprint_of
from sparse_lab.experiment import backend, measured, plugins
from sparse_lab.experiment.security.writes import real
from sparse_lab.experiment.settings_read import unread
from sparse_lab.host.regular_file import TENSORS, check_tensors, opened
from sparse_lab.methods import phases
from sparse_lab.records.run_dir import RunDir

# Goes into every hash. Raise it when what the settings mean has changed so much that no earlier result counts.
VERSION = 1


@dataclass(frozen=True)
class Surroundings:
    """What a result depends on beside the settings. What is empty adds nothing to a name."""

    data: str = ""  # fingerprint of what is read
    plugins: dict[str, str] = field(default_factory=dict)  # name -> hash of its content, of all that are loaded
    ranks: int = 0  # processes of the run (trainer.devices), where there are several


def surroundings(config: Config) -> Surroundings:
    """Return what is known of a run's surroundings."""
    ranks = config.trainer.devices
    return Surroundings(
        data=fingerprint_of(config.dataset, outputs_of(config)),
        plugins=plugins.hashes(),
        ranks=ranks if ranks > 1 else 0,  # each process has BatchNorm statistics of its own
    )


def outputs_of(config: Config) -> Path:
    """Return the folder that runs land in. Raise UserError where its links lead nowhere."""
    return real("paths.outputs", config.paths.outputs)


def settled(config: Config) -> Config:
    """Return `config` as it is run and recorded, its arithmetic chosen.

    Where compute=auto can only tell by measuring, a run that has begun keeps the arithmetic that it began with.
    """
    begun = (one for one in backend.ways(config) if (_folder(one) / "status.json").exists())
    return next(begun, None) or backend.resolve_backend(config)


def is_to_be_measured(config: Config) -> bool:
    """Return whether compute=auto has to measure first: nobody has, and the run has not begun in either arithmetic."""
    ways = [] if measured.known(config) is not None else backend.ways(config)
    return bool(ways) and not any((_folder(one) / "status.json").exists() for one in ways)


def _folder(config: Config) -> Path:
    return outputs_of(config) / "runs" / run_name(config)


def settings(config: Config) -> dict[str, Any]:
    """Return what matters in a config, whole: no paths, loggers or devices, and no part or group that the method has no
    use for. A file that a run starts from stands there by its content, compute=auto as what it picks here.
    """
    plain = _matters(settled(config), "", frozenset(unread(config)), only_differing=False)
    return {name: value for name, value in plain.items() if value != {}}


def identity(config: Config, around: Surroundings | None = None) -> dict[str, Any]:
    """Return what a run's name is the hash of."""
    around = surroundings(config) if around is None else around
    differing = _matters(settled(config), "", frozenset(unread(config)), only_differing=True)
    beside = {name: value for name, value in dataclasses.asdict(around).items() if value}
    return {"version": VERSION, "settings": differing, **beside}


def _matters(group: Any, path: str, left_out: frozenset[str], only_differing: bool) -> dict[str, Any]:
    """A group's values by key; of those that only_differing asks for, what is not the default. A part that is there
    stands there even where all of it is.
    """
    result: dict[str, Any] = {}
    for entry in dataclasses.fields(group):
        value, name = getattr(group, entry.name), f"{path}{entry.name}"
        if not entry.metadata.get("identity", True) or name in left_out:
            continue
        if dataclasses.is_dataclass(value):
            inner = _matters(value, f"{name}.", left_out, only_differing)
            if inner or entry.metadata.get("part"):
                result[entry.name] = inner
        elif not entry.metadata.get("part"):
            value = _content(value) if entry.metadata.get("file") else _plain(value)
            if not only_differing:
                result[entry.name] = value
            elif value != _plain(_default(entry)):
                revision = entry.metadata.get("revision", 1)
                result[entry.name] = value if revision == 1 else {"value": value, "revision": revision}
    return result


def _default(entry: dataclasses.Field[Any]) -> Any:
    """The default that names count from."""
    if (first := entry.metadata.get("first", ALWAYS)) is not ALWAYS:
        return first
    if entry.default_factory is not dataclasses.MISSING:
        return entry.default_factory()
    return entry.default


def _plain(value: Any) -> Any:
    """Floats by their first digits, whole ones as whole numbers: what is written in two ways has one name."""
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, float):
        value = as_written(value)
        return int(value) if value.is_integer() else value
    return value


def _content(path: str | None) -> str | None:
    """SHA-256 of a file's content; the words themselves where there is no file to read (such as 'torchvision')."""
    if path is None:
        return None
    try:
        check_tensors(path, TENSORS)  # another file, of whatever size, is refused before anything runs
        with opened(path, TENSORS) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    except OSError:
        return path


def digest(plain: dict[str, Any]) -> str:
    """Return the first 10 hex digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:10]


def run_hash(config: Config) -> str:
    """Return the hash in a run's name."""
    return digest(identity(config))


def request_hash(config: Config) -> str:
    """Return the hash of everything but the arithmetic: how a run is computed is not what was asked for."""
    plain = identity(config)
    for name in ("compute", "storage"):
        plain["settings"].pop(name, None)
    if "trainer" in plain["settings"]:
        plain["settings"]["trainer"].pop("precision", None)
        if not plain["settings"]["trainer"]:
            del plain["settings"]["trainer"]
    return digest({"request": plain})


def cell(config: Config) -> str:
    """Return the hash of everything but the seed: runs of one cell belong into one mean."""
    plain = identity(config)
    plain["settings"].pop("seed", None)
    return digest({"cell": plain})


def run_name(config: Config) -> str:
    """Return it readable, then unique: vgg16-cifar10-oneshot-98.85-seed1-1a2b3c4d5e. Raises UserError for a name of
    which no folder is made.
    """
    sparsity = [] if config.method.prune is None else [f"{100 * phases.final_sparsity(config):.6g}"]
    arch = [] if config.model.arch is None else [config.model.arch]
    words = [config.model.name, *arch, config.dataset.name, config.method.name, *sparsity, f"seed{config.seed}"]
    return "-".join([*words, run_hash(config)])


def run_dir(config: Config) -> RunDir:
    """Return where the run that `config` asks for lies, as it is computed on this machine."""
    config = settled(config)
    return RunDir(_folder(config), dataclasses.asdict(config))
