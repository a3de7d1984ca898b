"""Pruning: what goes by which score, from a trained network or before training, in how many rounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from sparse_lab.config import Config, MethodConfig, PruneConfig
from sparse_lab.errors import UserError
from sparse_lab.methods import phases
from sparse_lab.methods.base import FROM_GRADIENTS, WITHOUT_DATA, Component, Site, When, check_score, often
from sparse_lab.methods.recipes import clock_of

if TYPE_CHECKING:
    from sparse_lab.algorithms.base import Algorithm
    from sparse_lab.algorithms.selectors import GivenMasks, Selector, WeightSelector
    from sparse_lab.methods.networks import Structure


def _looks_at_data(config: Config) -> bool:
    return _settings(config).score not in WITHOUT_DATA and _scores(config)


def _scores(config: Config) -> bool:
    return not config.model.keep_masks


class Prune(Component):
    part = "prune"
    read_when: ClassVar = {
        "score": When(_scores, "model.keep_masks=false"),
        "distribution": When(
            lambda config: _scores(config) and (config.method.filters is None or not config.method.filters.rates),
            "method.filters.rates=[] and model.keep_masks=false",
        ),
        "batches": When(
            lambda config: _looks_at_data(config) and _settings(config).per_class is None,
            "a method.prune.score that looks at training images, and method.prune.per_class=null",
        ),
        "per_class": When(_looks_at_data, "a method.prune.score that looks at training images"),
        "iterations": When(
            lambda config: config.method.hypersphere is None and _scores(config),
            "method.hypersphere=null and model.keep_masks=false",
        ),
        "rewind_lr": When(lambda config: config.method.init_from is not None, "a trained start (method.init_from)"),
    }

    def reads(self, config: Config) -> tuple[str, ...]:
        groups = ("sparsity", "schedule")
        return groups if config.method.init_from is None else (*groups, "training.finetune")

    def starts(self, config: Config) -> dict[str, Config]:
        if config.method.init_from is None or config.method.regrow is not None:
            return {}
        rewound = _rewound(config)
        return {"parent": phases.dense(config)} | ({} if rewound is None else {"rewound": rewound})

    def check(self, config: Config, structure: Structure) -> None:
        settings = _settings(config)
        _check_rewinding(config, settings)
        _check_counts(config, structure)
        structure.check_own(config)
        if config.model.keep_masks:
            _check_kept_masks(config, structure)
        if config.method.regrow is None and config.method.init_from not in (None, "dense"):
            raise UserError(
                f"method.init_from={config.method.init_from}: pruning starts from dense, or from scratch (null)"
            )
        if config.sparsity.connected_init:
            _check_connected(config, settings)
        if config.method.filters is None:
            check_score("method.prune.score", settings.score)
        if settings.score == "synflow":
            structure.check_shape()

    def build(self, site: Site) -> list[Algorithm]:
        return [plain_pruning(site, given_masks(site) if site.config.model.keep_masks else weight_selector(site))]

    def describe(self, method: MethodConfig) -> str:
        assert method.prune is not None
        return f"prune{' filters' if method.filters else ''} ({method.prune.score})"

    def dense_gradients(self, method: MethodConfig, in_rounds: bool) -> str | None:
        assert method.prune is not None
        if method.prune.score not in FROM_GRADIENTS:
            return None
        return "each round" if in_rounds else often(method.prune.iterations)


def _settings(config: Config) -> PruneConfig:
    assert config.method.prune is not None
    return config.method.prune


def plain_pruning(site: Site, selector: Selector) -> Algorithm:
    """Return what prunes as the schedule says."""
    from sparse_lab.algorithms import prune

    return prune.Prune(
        site.model,
        selector,
        site.begins,
        total_steps=site.total_steps,
        iterations=1 if site.config.model.keep_masks else _settings(site.config).iterations,
        rewind=site.rewind,
        seed=site.config.seed,
        changed=site.changed,
    )


def given_masks(site: Site) -> GivenMasks:
    """Return what keeps the masks of the network that the run starts from."""
    from sparse_lab.algorithms.selectors import GivenMasks
    from sparse_lab.models.weights import kept_masks

    assert site.masks is not None and site.config.model.weights is not None
    return GivenMasks(site.masks, kept_masks(site.config.model.weights))


def weight_selector(site: Site) -> WeightSelector:
    """Return what chooses the weights that stay."""
    from sparse_lab.algorithms.selectors import WeightSelector
    from sparse_lab.sparsity.paths import connected_init

    settings = _settings(site.config)
    assert site.masks is not None
    connected = site.config.sparsity.connected_init
    reserve = partial(connected_init, site.model, site.structure.shape) if connected else None
    return WeightSelector(
        site.masks,
        settings.score,
        settings.distribution,
        batches=batches(site),
        probe=site.probe,
        reserve=reserve,
    )


def batches(site: Site) -> Callable[[], Any]:
    """Return what fetches the training batches that a score looks at."""
    settings, images = _settings(site.config), site.images
    if settings.per_class is None:
        return partial(images.fixed, settings.batches)
    return partial(images.balanced, settings.per_class)


def _rewound(config: Config) -> Config | None:
    """The run that ends with the weights which each round goes back to; None where those are the initial ones."""
    epoch = _settings(config).rewind_weights
    if not epoch:
        return None
    start = phases.dense(config)
    return replace(start, training=replace(start.training, stop_after=epoch, select="last", patience=None))


def _check_rewinding(config: Config, settings: PruneConfig) -> None:
    back, schedule = settings.rewind_weights, config.schedule.name
    if back is not None and not (settings.rewind_lr and config.method.init_from == "dense"):
        raise UserError(
            "method.prune.rewind_weights goes back into the dense training: it needs method.prune.rewind_lr=true and "
            "method.init_from=dense"
        )
    if back is not None and schedule not in ("iterative", "one_shot"):
        raise UserError(
            f"method.prune.rewind_weights goes back at every mask change: schedule=iterative, not {schedule}"
        )
    if clock_of(config, 1).epochs_a_round < 1 or (back or 0) >= config.training.epochs:
        raise UserError(
            f"method.prune.rewind_weights={back}: no epoch is left of a round: lower it, or set "
            "schedule.iterative.round_epochs"
        )


def _check_connected(config: Config, settings: PruneConfig) -> None:
    if config.method.init_from is not None or config.schedule.constant is None:
        raise UserError(
            "sparsity.connected_init=true is for methods that start sparse (static, set, rigl, east), not "
            f"{config.method.name}"
        )
    if settings.iterations > 1:
        raise UserError(f"method.prune.iterations={settings.iterations} does not go with sparsity.connected_init=true")


def _check_kept_masks(config: Config, structure: Structure) -> None:
    """Do the method and its target go with the masks of the network that the run starts from?"""
    from sparse_lab.models.weights import kept_masks
    from sparse_lab.sparsity.masks import count_kept, num_kept

    method, weights = config.method, config.model.weights
    if method.init_from is not None or config.schedule.constant is None or method.sharing is not None:
        raise UserError(
            f"model.keep_masks=true: method {method.name!r} makes masks of its own as it trains; those of a file are "
            "for schedule=constant, method.init_from=null and method.sharing=null (static, set, rigl, mest), or leave "
            "model.keep_masks out: then the weights alone are taken"
        )
    assert weights is not None
    masks, shapes = kept_masks(weights), structure.weights
    other = sorted(name for name in masks.keys() ^ shapes.keys())
    other += [name for name in shapes if name in masks and masks[name].shape != shapes[name]]
    if other:
        what = "are not for" if other[0] not in masks else "are also for" if other[0] not in shapes else "do not fit"
        raise UserError(
            f"model.keep_masks=true: the masks in {weights} {what} {other[0]!r}: ask for the same network, classes, "
            "sparsity.include and sparsity.exclude as its run, or leave model.keep_masks out"
        )
    if empty := next((name for name, count in count_kept(masks).items() if not count), None):
        raise UserError(f"model.keep_masks=true: the masks in {weights} leave nothing of {empty!r}: leave it out")
    kept, total = sum(count_kept(masks).values()), structure.size(config).total
    if num_kept(config.sparsity.target, total) != kept:
        exact = 1 - kept / total
        there = next((one for digits in range(2, 18) if num_kept(one := round(exact, digits), total) == kept), exact)
        raise UserError(
            f"model.keep_masks=true: the masks in {weights} keep {kept:,} of {total:,} weights, and "
            f"sparsity.target={config.sparsity.target:g} {num_kept(config.sparsity.target, total):,}: "
            f"sparsity.target={there}, or leave model.keep_masks out"
        )


def _check_counts(config: Config, structure: Structure) -> None:
    """Would a sparsity on the way empty a layer?"""
    from sparse_lab.sparsity.masks import num_kept

    size, start = structure.size(config), phases.regrowth_start(config)
    if start >= 1.0:  # what regrows is too much, and its component says so
        return
    kept = num_kept(start, size.total)
    # rounded to the side on which the hint holds when it is taken at its word
    highest = math.floor(1e6 * (1 - size.layers / size.total)) / 1e6
    lowest = math.ceil(1e6 * (1 - size.unique / size.total)) / 1e6
    if kept < size.layers:
        raise UserError(
            f"sparsity {start:.12g} keeps {kept} of {size.total:,} weights, which empties some of the network's "
            f"{size.layers} layers: the highest sparsity here is {highest:.6f}"
        )
    if start > 0.0 and kept == size.total and config.method.filters is None:
        raise UserError(f"sparsity {start:.12g} prunes none of {size.total:,} weights: raise sparsity.target")
    if (iterations := _settings(config).iterations) > max(1, size.total - kept):
        raise UserError(
            f"method.prune.iterations={iterations}: {size.total - kept:,} weights go, less than one an iteration"
        )
    if kept > size.unique:
        raise UserError(
            f"sparsity {start:.12g} keeps {kept:,} weights, but with method.sharing only {size.unique:,} exist: "
            f"the lowest sparsity here is {lowest:.6f}"
        )
