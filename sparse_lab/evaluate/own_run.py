"""What a run's folder says of the data that it was trained on, and of a network that is not finished."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from yaml import YAMLError

from sparse_lab import data
from sparse_lab.config import Config
from sparse_lab.data.facts import class_names, filled
from sparse_lab.errors import SparseLabError, UserError
from sparse_lab.experiment.compose import schema, to_config
from sparse_lab.host.regular_file import MIB, read_text
from sparse_lab.methods import table
from sparse_lab.methods.networks import build_model, structure_of
from sparse_lab.models.surgery import rebuild_structure
from sparse_lab.sparsity.masks import Masks
from sparse_lab.training.checkpoint_io import load_checkpoint, load_into

MOST_BYTES = 4 * MIB  # of config.yaml
OF_DATA = ("dataset", "training", "seed")  # the rest may be of an older version


@dataclass(frozen=True)
class Own:
    """config: the run's, whose dataset, training and seed alone are sound where `whole` is false. md5: of the files
    that it was trained on, where it is finished.
    """

    config: Config
    whole: bool
    md5: dict[str, str] | None

    def class_names(self) -> tuple[str, ...]:
        """By label, where the files are there and name them."""
        try:
            return class_names(self.config.dataset)
        except (SparseLabError, OSError):
            return ()


def own_of(run: Path, result: dict[str, Any]) -> Own | None:
    """Return what the folder's config.yaml says; None where it does not say what the data are."""
    try:
        text = read_text(run / "config.yaml", MOST_BYTES)
        stored = OmegaConf.create(text)
        if "${" in text or not OmegaConf.is_dict(stored):  # what a run writes is resolved
            return None
        config, whole = _config(stored, OF_DATA), True
        try:
            config = _config(stored, None)
        except (UserError, OmegaConfBaseException, AttributeError):
            whole = False
        config.dataset = filled(config.dataset)
    except (SparseLabError, OmegaConfBaseException, YAMLError, OSError, ValueError, AttributeError, RecursionError):
        return None
    about = result.get("data")
    md5 = about.get("md5") if isinstance(about, dict) else None
    return Own(config, whole, md5 if isinstance(md5, dict) else None)


def _config(stored: Any, groups: tuple[str, ...] | None) -> Config:
    known = [field.name for field in dataclasses.fields(Config)]
    chosen = {key: stored[key] for key in known if key in stored and (groups is None or key in groups)}
    return to_config(OmegaConf.merge(schema(in_place=True), chosen))  # type: ignore[arg-type]


def built(path: Path, run: Path, own: Own, result: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network in a checkpoint of training as it stands, and how its images are normalised. Raise UserError
    where the checkpoint is another run's, or does not fit.
    """
    payload = load_checkpoint(path)
    if payload.get("run") != run.name or not isinstance(payload.get("state_dict"), dict):
        raise UserError(f"{path} is no checkpoint of the run {run.name}")
    if not own.whole:
        raise UserError(f"{run / 'config.yaml'} is of another version, and says no longer what network {path} is of")
    config = dataclasses.replace(own.config, model=dataclasses.replace(own.config.model, weights=None))
    state = {name.removeprefix("model."): value for name, value in payload["state_dict"].items()}
    model = table.alter(build_model(config), config, structure_of(config))
    if config.method.prune is not None:
        Masks(model)
    rebuild_structure(model, state)
    load_into(model, state, path)
    return model, result.get("normalise") or _normalise(config)


def _normalise(config: Config) -> dict[str, Any]:
    """As the run computes it."""
    found = data.build(config.dataset, config.training, config.seed)
    return {"scale": found.scale, "mean": found.mean, "std": found.std}
