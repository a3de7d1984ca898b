"""Which settings outside of a method's parts a run reads. A key that does not stand here is read by every run; those of
a part stand with the part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from sparse_lab import models
from sparse_lab.config import Config, RecipeConfig
from sparse_lab.data.facts import DRAWN, own_parts
from sparse_lab.data.reads import MADE, PHOTOS, PUBLISHED
from sparse_lab.experiment.selection import selects
from sparse_lab.methods import table
from sparse_lab.methods.base import When
from sparse_lab.methods.recipes import recipes_of
from sparse_lab.methods.schedules import kind_of


def _pruned(config: Config) -> bool:
    return config.method.prune is not None


def _crops(config: Config) -> bool:
    return config.dataset.name != "imagenet"


def _in_root(config: Config) -> bool:
    """A whole path is read wherever the root is."""
    dataset = config.dataset
    return dataset.name not in MADE and not (dataset.name == "arrays" and Path(dataset.file or "").is_absolute())


def _draws(part: str) -> Callable[[Config], bool]:
    return lambda config: part not in own_parts(config.dataset)


def _recipe(path: str, of: Callable[[RecipeConfig], bool], words: str, pruned: bool = False) -> When:
    """Of a recipe's key. of: what else the recipe must say. pruned: must anything be pruned while it trains?"""

    def reads(config: Config) -> bool:
        there = recipes_of(config)
        recipe = config.training if path == "training" else getattr(config.training, path.partition(".")[2])
        return path in there and (there[path] or not pruned) and of(recipe)

    return When(reads, words.format(path))


def _recipe_keys(path: str, used: str) -> dict[str, When]:
    """used: in words, what it takes that any phase trains by this recipe; "" where one always does."""
    found = {
        "momentum": _recipe(path, lambda recipe: recipe.optimizer == "sgd", "{}.optimizer=sgd"),
        "nesterov": _recipe(path, lambda recipe: recipe.optimizer == "sgd", "{}.optimizer=sgd"),
        "milestones": _recipe(path, lambda recipe: recipe.lr_schedule == "step", "{}.lr_schedule=step"),
        "gamma": _recipe(path, lambda recipe: recipe.lr_schedule == "step", "{}.lr_schedule=step"),
        "clip_over": _recipe(
            path,
            lambda recipe: recipe.clip_norm is not None,
            "{}.clip_norm, in a phase that trains what is pruned",
            True,
        ),
    }
    plain = ("optimizer", "lr", "weight_decay", "epochs", "lr_schedule", "warmup", "patience", "clip_norm")
    always = {name: _recipe(path, lambda recipe: True, used) for name in plain if used}
    return {f"{path}.{name}": when for name, when in (always | found).items()}


def _finetune_epochs(config: Config) -> bool:
    if not _pruned(config) or config.method.init_from is None:
        return False
    kind = kind_of(config.schedule)
    return not kind.in_rounds or kind.round_epochs(config) is None


DRAWN_FOR = f"dataset={' or '.join(DRAWN)}"
READ_WHEN: dict[str, When] = {
    "model.adapt_stem": When(
        lambda config: models.has_stem(config.model.name, config.dataset.size), "a network with ImageNet's stem"
    ),
    "model.keep_masks": When(
        lambda config: _pruned(config) and config.model.weights is not None,
        "model.weights=FILE and a method that prunes",
    ),
    "dataset.root": When(_in_root, "a dataset that is read from files there"),
    "dataset.file": When(lambda config: config.dataset.name == "arrays", "dataset=arrays"),
    "dataset.test": When(_draws("test"), f"{DRAWN_FOR} without a test set of its own"),
    "dataset.validation": When(_draws("validation"), "a dataset without a validation set of its own"),
    "dataset.skip_corrupt": When(lambda config: config.dataset.name == "folder", "dataset=folder"),
    "dataset.exif_orientation": When(lambda config: config.dataset.name in PHOTOS, "a dataset of photos"),
    "dataset.mirror": When(lambda config: config.training.augment.flip, "training.augment.flip=true"),
    "dataset.verify": When(
        lambda config: config.dataset.name in PUBLISHED, "a dataset whose files have official checksums"
    ),
    "dataset.download": When(lambda config: config.dataset.name in PUBLISHED, "a dataset that can be downloaded"),
    "dataset.workers": When(lambda config: config.dataset.name in PHOTOS, "a dataset of photos"),
    "training.select_on_few": When(selects, "a training.select other than last, or a patience"),
    "training.augment.crop_padding": When(_crops, "a dataset that is not cropped at random sizes anyway"),
    "training.augment.padding_mode": When(
        lambda config: _crops(config) and config.training.augment.crop_padding > 0,
        "a training.augment.crop_padding above 0",
    ),
    "training.augment.flip": When(lambda config: config.dataset.mirror, "dataset.mirror=true"),
    **_recipe_keys("training", ""),
    **_recipe_keys("training.finetune", "a method that fine-tunes by a recipe of its own after pruning"),
    **_recipe_keys("training.regrow", "a method that regrows (method.regrow)"),
    "training.finetune.epochs": When(
        _finetune_epochs, "a method that fine-tunes after pruning, and no schedule.*.round_epochs"
    ),
    **{
        f"sparsity.{name}": When(_pruned, "a method that prunes (method.prune)")
        for name in ("target", "require_connected", "exclude", "include", "layers")
    },
    "sparsity.connected_init": When(
        lambda config: _pruned(config) and not config.model.keep_masks,
        "a method that prunes (method.prune), and model.keep_masks=false",
    ),
    "schedule.cubic.every": When(
        lambda config: config.method.drop_and_grow is None, "method.drop_and_grow=null: else its updates prune"
    ),
    "schedule": When(_pruned, "a method that prunes (method.prune)"),
    "method.kind": When(lambda config: False, "the gallery of methods (sparse-lab methods), no run"),
    "method.paper": When(lambda config: False, "the gallery of methods (sparse-lab methods), no run"),
    "method.summary": When(lambda config: False, "the gallery of methods (sparse-lab methods), no run"),
    "trainer.compile": When(lambda config: config.compute != "sparse", "compute=dense"),
    "diagnostics.layers": When(_pruned, "a method that prunes (method.prune)"),
    "logger.project": When(
        lambda config: config.logger.wandb or config.logger.trackio or config.logger.mlflow,
        "logger=wandb, trackio or mlflow",
    ),
    "logger.mlflow_uri": When(lambda config: config.logger.mlflow, "logger=mlflow"),
    "paths.data": When(
        lambda config: _in_root(config) and config.dataset.root.startswith(config.paths.data),
        "a dataset.root that lies there, and a dataset that is read from files",
    ),
    "storage": When(lambda config: _pruned(config) and config.compute != "dense", "compute=sparse"),
    "compute": When(
        lambda config: _pruned(config) or config.compute != "sparse", "a method that prunes (method.prune)"
    ),
}

READ_BY_PARTS = ("sparsity", "schedule", "training.finetune", "training.regrow")
# what our own files set for methods that do not read it: it stays in their runs' names
IN_NAMES = (
    "dataset.mirror",
    "training.augment.flip",
    "training.finetune",
    "schedule.cubic.every",
    "method.prune.distribution",
    "method.regrow",
)


def unread(config: Config) -> list[str]:
    """Return the groups and keys of the config that this run does not read, and that have no say in its name."""
    read = {group for one in table.present(config.method) for group in one.reads(config)}
    groups = [group for group in READ_BY_PARTS if group not in read]
    return groups + [key for key in without_effect(config) if not lies_in(key, (*groups, *IN_NAMES))]


def without_effect(config: Config) -> dict[str, str]:
    """Return the keys that this run, with those that it starts from, does not read, each with what it would take; but
    for those of parts that are not there.
    """
    of_parts = {
        f"method.{one.part}.{name}": when
        for one in table.present(config.method)
        for name, when in one.read_when.items()
    }
    return {
        key: f"reads it; it takes {when.words}"
        for key, when in (READ_WHEN | of_parts).items()
        if not when.reads(config)
    }


def lies_in(key: str, groups: Iterable[str]) -> bool:
    """Is a key one of these, or does it lie in one?"""
    return any(f"{key}.".startswith(f"{group}.") for group in groups)
