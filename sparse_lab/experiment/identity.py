"""A run's name: a hash of what matters in its config, so that the same request finds the same folder. A finished run is
not run again, an interrupted one goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from sparse_lab.config import Config, MethodConfig
from sparse_lab.experiment import phases
from sparse_lab.experiment.backend import resolve_backend
from sparse_lab.records.run_dir import RunDir

SCHEDULE_KEYS = {
    "one_shot": (),
    "constant": (),
    "iterative": ("share", "round_epochs"),
    "cubic": ("begin", "end", "every", "initial"),
    "alternating": ("begin", "end", "turn", "last_dense"),
    "soft": (),
    "layerwise": ("round_epochs",),
    "at_end": (),
}


def identity(config: Config) -> dict[str, Any]:
    """What matters in a config: no paths, loggers or devices, and no part or schedule that the method does not use.

    A file that a run starts from counts by its content, compute=auto as what it picks here. Dense arithmetic and
    clipping over all positions go without saying: they were there before there was a choice.
    """
    config = resolve_backend(config)
    plain = _matters(config)
    if config.compute == "dense":
        del plain["compute"]
    for recipe in (plain["training"], plain["training"]["finetune"], plain["training"]["regrow"]):
        if recipe["clip_norm"] is None or recipe["clip_over"] == "all" or not config.method.prunes:
            del recipe["clip_over"]
    for group, key in (("model", "weights"), ("regrow", "reference")):
        part = plain["model"] if group == "model" else plain["method"]["regrow"]
        if part[key] not in (None, "torchvision"):
            part[key] = _fingerprint(part[key])
    method = config.method
    if not method.prunes:
        for group, key in (("training", "finetune"), ("method", "prune")):
            del plain[group][key]
        del plain["sparsity"], plain["schedule"]
    else:
        used = SCHEDULE_KEYS[config.schedule.name]
        plain["schedule"] = {key: value for key, value in plain["schedule"].items() if key in ("name", *used)}
        if method.from_scratch:
            del plain["training"]["finetune"]
        if not config.sparsity.connected_init:
            del plain["sparsity"]["connected_init"]
    for path, key in _unread(config):
        del plain["method"][path][key]
    if config.schedule.name == "cubic" and method.drops_and_grows:  # pruned at every mask update
        del plain["schedule"]["every"]
    if config.training.stop_after is None:
        del plain["training"]["stop_after"]
    if not method.goes_on:
        del plain["training"]["regrow"]
    if not method.regrows:
        plain["method"]["regrow"] = {"steps": method.regrow.steps} if method.goes_on else {}
    for key in _unused(method):
        del plain["method"][key]
    return plain


def _unused(method: MethodConfig) -> list[str]:
    """Keys of the method that what it does not do would read."""
    unused = [] if method.drops_and_grows else ["drop_and_grow"]
    unused += [] if method.cyclic else ["cyclic", "cycles"]
    unused += [] if method.dyrelu else ["dyrelu", "phasing"]
    unused += [] if method.sharing else ["sharing"]
    unused += [] if method.dct else ["dct"]
    unused += [] if method.compactors else ["compactors", "compacting"]
    unused += [] if method.hypersphere else ["hypersphere", "sphere"]
    unused += [] if method.prunes_filters else ["filters"]
    return unused + ([] if method.drops_and_grows or method.cyclic else ["gradients"])


def _unread(config: Config) -> list[tuple[str, str]]:
    """Keys of pruning and of drop and grow that the rest of their part leaves without a say."""
    method, unread = config.method, []
    if method.prunes:
        prune = method.prune
        idle = {
            "unit": prune.unit == "weights",
            "per_class": prune.per_class is None,
            "iterations": prune.iterations == 1,
        }
        idle |= {"batches": prune.per_class is not None, "rewind_weights": prune.rewind_weights is None}
        unread += [("prune", key) for key, without in idle.items() if without]
    if method.drops_and_grows:
        bounds = ("low", "high", "milestones")
        fractions = ("drop_fraction", "drop_fraction_end", "drop_fraction_shape", "end")
        unread += [("drop_and_grow", key) for key in (fractions if method.drop_and_grow.low else bounds)]
        if method.drop_and_grow.unit == "steps":
            unread.append(("drop_and_grow", "unit"))
        if not method.drop_and_grow.low and config.schedule.name != "cubic":
            unread.append(("drop_and_grow", "distribution"))
    return unread


def _fingerprint(path: str) -> str:
    """SHA-256 of a file's content; the path itself where there is none to read (the request is refused elsewhere)."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return path


def _matters(part: Any) -> dict[str, Any]:
    result = {}
    for field in dataclasses.fields(part):
        if not field.metadata.get("identity", True):
            continue
        value = getattr(part, field.name)
        result[field.name] = _matters(value) if dataclasses.is_dataclass(value) else value
    return {key: value for key, value in result.items() if value != {}}


def digest(plain: dict[str, Any]) -> str:
    """First 10 hex digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:10]


def cell(config: Config) -> str:
    """The hash of everything but the seed: runs of one cell belong into one mean."""
    return digest({key: value for key, value in identity(config).items() if key != "seed"})


def run_name(config: Config) -> str:
    """Readable, then unique: vgg16-cifar10-oneshot-98.85-seed1-1a2b3c4d5e."""
    sparsity = [] if not config.method.prunes else [f"{100 * phases.final_sparsity(config):.6g}"]
    parts = [config.model.name, config.dataset.name, config.method.name, *sparsity, f"seed{config.seed}"]
    return "-".join([*parts, digest(identity(config))])


def run_dir(config: Config) -> RunDir:
    """Where the run that `config` asks for lies, as it is computed on this machine."""
    config = resolve_backend(config)
    path = Path(config.paths.outputs).expanduser().resolve() / "runs" / run_name(config)
    return RunDir(path, dataclasses.asdict(config))
