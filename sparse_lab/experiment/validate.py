"""Everything about a request that can be wrong, found before anything trains: one clear line each."""

from __future__ import annotations

import math
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import torch

from sparse_lab import data, loggers, models
from sparse_lab.config import PARTS, RENAMED_PARTS, Config, CyclesConfig, DropAndGrowConfig, LoggerConfig, check_ranges
from sparse_lab.errors import UserError, nearest
from sparse_lab.experiment import backend, phases
from sparse_lab.experiment.networks import Spec, altered_meta_network, meta_network, spec_of
from sparse_lab.experiment.timeline import clock_of, recipe_of
from sparse_lab.experiment.validate_structured import check_filters
from sparse_lab.sparsity.distributions import DISTRIBUTIONS
from sparse_lab.sparsity.masks import count, layers, num_kept
from sparse_lab.sparsity.scores import OF_WEIGHTS, OWN_PASSES, SCORES, find_score
from sparse_lab.training.checkpoint_io import load_checkpoint
from sparse_lab.training.device import device_of


def check(config: Config, here: bool = True) -> None:
    """Raises UserError for a value, name, combination, file or folder that this run could not work with.

    here: it would run on this machine, so that what it asks for must be in this one.
    """
    check_request(config)
    if here:
        check_device(config)
    _check_data(repr(config.dataset), config)
    check_loggers(config.logger)
    check_outputs(Path(config.paths.outputs))


def check_loggers(logger: LoggerConfig) -> None:
    """Are their packages there, and does no address hold a password?"""
    loggers.check(logger.names)
    if logger.mlflow_uri is not None and urlsplit(logger.mlflow_uri).password:
        raise UserError(
            "logger.mlflow_uri holds a password, and would be written into the run's config: "
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )


def check_device(config: Config) -> None:
    if config.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer=gpu, but torch finds no GPU here: use trainer=cpu")
    if config.trainer.deterministic and device_of(config.trainer.accelerator).type == "cuda" and _overlaps(config):
        raise UserError(
            f"trainer.deterministic=true: the max-pooling windows of {config.model.name} overlap, and torch has no "
            "deterministic gradient for them on a GPU: use trainer.deterministic=false"
        )
    backend.check(config, here=True)


def _overlaps(config: Config) -> bool:
    """Does a pixel belong to two windows of a max-pooling?"""
    pools = [module for module in meta_network(spec_of(config)).modules() if isinstance(module, torch.nn.MaxPool2d)]
    return any(pool.kernel_size != pool.stride for pool in pools)


def check_request(config: Config) -> None:
    """What is wrong with the request itself, whatever data, packages and room are here. Raises UserError."""
    check_ranges(config)
    if config.model.name not in models.names():
        raise UserError(f"unknown model {config.model.name!r}; {nearest(config.model.name, models.names())}")
    check_parts(config)
    check_pruning(config)
    check_sparse_training(config)
    check_counts(config)
    check_regrowth(config)
    backend.check(config, here=False)
    if config.model.weights not in (None, "torchvision"):
        load_checkpoint(str(config.model.weights))
    for name, numbers in (("mean", config.dataset.mean), ("std", config.dataset.std)):
        if len(numbers) != 3 or (name == "std" and min(numbers) <= 0):
            raise UserError(f"dataset.{name}={list(numbers)}: three numbers, one a channel, std above 0")


CHECKED: set[str] = set()


def _check_data(request: str, config: Config) -> None:
    """Once a process for each data set: a sweep's jobs all ask for the same files."""
    if request not in CHECKED:
        data.check(config.dataset)
        CHECKED.add(request)


def check_parts(config: Config) -> None:
    """Do the parts of the method, schedule and trainer go together?"""
    parts = config.method.parts
    for old in RENAMED_PARTS.keys() & set(parts):
        raise UserError(f"method.parts={parts}: {old} is {RENAMED_PARTS[old]} since 0.2")
    if tuple(parts) not in PARTS:
        raise UserError(f"method.parts={parts}: known lists are {', '.join(str(list(one)) for one in PARTS)}")
    if config.method.goes_on and config.method.init_from is None:
        raise UserError(f"method {config.method.name!r}: method.init_from must name the pruning method before it")
    if not config.method.goes_on and config.method.init_from not in (None, "dense"):
        raise UserError(
            f"method.init_from={config.method.init_from}: pruning starts from dense, or from scratch (null)"
        )
    if config.method.name == "dense" and parts:
        raise UserError(
            f"method.parts={parts}: a method that does more than dense training needs a method.name of its own"
        )
    if config.method.name == "dense" and config.method.dyrelu:
        raise UserError(
            "method.dyrelu=true: a method that does more than dense training needs a method.name of its own"
        )
    if config.training.stop_after is not None and (config.method.prunes or config.method.name != "dense"):
        raise UserError("training.stop_after is for method=dense: other methods would end before their target")
    if (config.training.stop_after or 0) > config.training.epochs:
        raise UserError(f"training.stop_after={config.training.stop_after}: training.epochs={config.training.epochs}")
    if config.schedule.name == "cubic" and config.schedule.begin >= config.schedule.end:
        raise UserError(
            f"schedule.begin={config.schedule.begin:g} must lie before schedule.end={config.schedule.end:g}"
        )
    if (
        config.training.augment.padding_mode == "reflect"
        and config.training.augment.crop_padding >= config.dataset.image_size
    ):
        raise UserError(
            f"training.augment.crop_padding={config.training.augment.crop_padding} cannot reflect an image that small"
        )


def check_pruning(config: Config) -> None:
    """Do the score, the unit, the schedule and the surgery of the pruning go together?"""
    method, schedule = config.method, config.schedule
    prune = method.prune
    if method.compactors and not method.prunes_filters:
        raise UserError("method.compactors=true is for whole filters: use method=resrep, or method.prune.unit=filters")
    if not method.prunes:
        return
    if schedule.name == "alternating":
        _check_turns(config)
    if schedule.name in ("soft", "alternating", "at_end") and method.goes_on:
        raise UserError(f"schedule={schedule.name} does not go with what follows pruning: method.parts={method.parts}")
    if schedule.name == "soft" and prune.unit == "weights":
        raise UserError("schedule=soft is for whole filters: use method=sfp, or schedule=alternating")
    if (method.compactors or method.hypersphere) and schedule.name != "at_end":
        raise UserError(f"method {method.name} prunes after its last step: use schedule=at_end, not {schedule.name}")
    if prune.rewind_weights is not None and not (prune.rewind_lr and method.init_from == "dense"):
        raise UserError(
            "method.prune.rewind_weights goes back into the dense training: it needs method.prune.rewind_lr=true and "
            "method.init_from=dense"
        )
    if prune.rewind_weights is not None and schedule.name not in ("iterative", "one_shot"):
        raise UserError(
            f"method.prune.rewind_weights goes back at every mask change: schedule=iterative, not {schedule.name}"
        )
    if clock_of(config, 1).epochs_a_round < 1 or (prune.rewind_weights or 0) >= config.training.epochs:
        raise UserError(
            f"method.prune.rewind_weights={prune.rewind_weights}: no epoch is left of a round: lower it, or set "
            "schedule.round_epochs"
        )
    if method.prunes_filters:
        check_filters(config)
        return
    find_score(prune.score)
    if schedule.name == "layerwise":
        raise UserError("schedule=layerwise is for whole filters: use method=hrank with method.filters.rates=[...]")


def _check_turns(config: Config) -> None:
    chosen = config.schedule
    dense_from = chosen.end - chosen.last_dense
    if not chosen.begin < dense_from <= chosen.end < 1.0:
        raise UserError(
            f"schedule.begin={chosen.begin:g} must lie before schedule.end={chosen.end:g} minus "
            f"schedule.last_dense={chosen.last_dense:g}, and the end before 1"
        )


def check_sparse_training(config: Config) -> None:
    """Can the network be dropped and grown, shared, phased and cycled as the method asks?"""
    method = config.method
    _check_surgery(config)
    asked = {
        "sharing": method.sharing,
        "cyclic": method.cyclic,
        "dyrelu": method.dyrelu,
        "dct": method.dct,
        "hypersphere": method.hypersphere,
    }
    asked_for = [f"method.{name}=true" for name, wanted in asked.items() if wanted]
    asked_for += ["drop_and_grow in method.parts"] if method.drops_and_grows else []
    _check_together(config)
    if asked_for and not method.from_scratch:
        raise UserError(f"{asked_for[0]} is for training from scratch: method.init_from={method.init_from}, not null")
    if (method.sharing or method.cyclic or method.dct or method.hypersphere) and not method.prunes:
        raise UserError(f"{asked_for[0]} needs a sparse network: method.parts={method.parts} does not prune")
    fitting = ("constant",) if method.cyclic or method.sharing else ("constant", "cubic", "one_shot")
    fitting = ("at_end",) if method.hypersphere else fitting
    if asked_for and method.prunes and config.schedule.name not in fitting:
        raise UserError(f"{asked_for[0]} works with schedule={' or '.join(fitting)}, not {config.schedule.name}")
    if (
        config.sparsity.connected_init
        and method.prunes
        and not (method.from_scratch and config.schedule.name == "constant")
    ):
        raise UserError(
            "sparsity.connected_init=true is for methods that start sparse (static, set, rigl, east), not "
            f"{method.name}"
        )
    if method.drops_and_grows:
        _check_scores("method.drop_and_grow", method.drop_and_grow)
        _check_bounds(config)
    if method.cyclic:
        _check_scores("method.cycles", method.cycles)
        _check_cycles(config)
    if method.dyrelu:
        _check_phasing(config)


ALTERED: set[str] = set()


def _check_surgery(config: Config) -> None:
    """Once a process for each method and network: a sweep's jobs differ in their seeds more than in these."""
    request = repr((spec_of(config), config.method))
    if request not in ALTERED:
        altered_meta_network(config)
        ALTERED.add(request)


def _check_together(config: Config) -> None:
    """Surgeries and starts that would undo each other."""
    method = config.method
    pairs = [
        ("method.hypersphere=true", method.hypersphere, "method.sharing=true", method.sharing),
        ("method.hypersphere=true", method.hypersphere, "method.dct=true", method.dct),
        ("method.hypersphere=true", method.hypersphere, "drop_and_grow in method.parts", method.drops_and_grows),
        ("method.hypersphere=true", method.hypersphere, "method.cyclic=true", method.cyclic),
        ("method.dct=true", method.dct, "sparsity.connected_init=true", config.sparsity.connected_init),
        (
            f"method.prune.iterations={method.prune.iterations}",
            method.prunes and method.prune.iterations > 1,
            "sparsity.connected_init=true",
            config.sparsity.connected_init,
        ),
        (
            "method.dct=true (weights start at 0)",
            method.dct,
            f"method.prune.score={method.prune.score}",
            method.prunes and method.prune.score in OF_WEIGHTS,
        ),
    ]
    for first, has_first, second, has_second in pairs:
        if has_first and has_second:
            raise UserError(f"{first} does not go with {second}")


def _check_scores(group: str, scores: DropAndGrowConfig | CyclesConfig) -> None:
    for name in (scores.drop, scores.grow):
        find_score(name)
        if name == "reference":
            raise UserError(f"{group} cannot look at a reference network: choose another score than reference")
        if name in OWN_PASSES:
            raise UserError(f"{group} sees the step's gradients alone, and {name} needs more: choose another score")
    if scores.grow in OF_WEIGHTS:
        raise UserError(f"{group}.grow={scores.grow} scores every pruned weight 0: use gradient or random")


def _check_bounds(config: Config) -> None:
    chosen = config.method.drop_and_grow
    if not chosen.low and not chosen.high and not chosen.milestones:
        return
    low, high, ends = list(chosen.low), list(chosen.high), list(chosen.milestones)
    if not len(low) == len(high) == len(ends) + 1:
        raise UserError(
            f"method.drop_and_grow.low={low} and .high={high} need a number for each stage, "
            f".milestones={ends} one fewer"
        )
    if any(below > above for below, above in zip(low, high, strict=True)) or min(low) <= 0:
        raise UserError(f"method.drop_and_grow.low={low} must lie above 0 and nowhere above .high={high}")
    if high[-1] != 1.0:
        raise UserError(f"method.drop_and_grow.high={high} must end with 1: the training ends at the target")
    if ends != sorted(ends) or (ends and not 0.0 < ends[0] <= ends[-1] < 1.0):
        raise UserError(f"method.drop_and_grow.milestones={ends}: shares of the training, above 0, below 1 and rising")
    if config.method.cyclic or config.schedule.name != "constant":
        raise UserError(
            "method.drop_and_grow.low and .high say how sparse the network is: schedule=constant, cyclic=false"
        )
    if chosen.distribution not in DISTRIBUTIONS:
        raise UserError(
            f"method.drop_and_grow.distribution={chosen.distribution}: with low and high one of "
            f"{', '.join(DISTRIBUTIONS)}"
        )
    size, density = counted(config), 1.0 - config.sparsity.target
    for times, word in ((min(low), "empties a layer"), (max(high), "is more than there is")):
        kept = num_kept(1.0 - times * density, size.total)
        if not size.layers <= kept <= size.unique:
            raise UserError(f"method.drop_and_grow: {times:g} times the target's density, {kept:,} weights, {word}")


def _check_cycles(config: Config) -> None:
    cycles, epochs = config.method.cycles, recipe_of(config).epochs
    listed = f"method.cycles.lengths={list(cycles.lengths)} ({cycles.unit})"
    if not cycles.lengths or min(cycles.lengths) <= 0:
        raise UserError(f"{listed}: give the length of each cycle, above 0")
    if sum(cycles.lengths) >= (1.0 if cycles.unit == "share" else epochs):
        raise UserError(
            f"{listed}: together as long as the training ({epochs} epochs) or longer, but its end must be at the target"
        )
    if config.method.prune.distribution not in DISTRIBUTIONS:
        raise UserError(
            "method.cyclic=true splits each density anew: "
            f"method.prune.distribution={config.method.prune.distribution} must be one of {', '.join(DISTRIBUTIONS)}"
        )
    size = counted(config)
    density = 1.0 - config.sparsity.target
    most = num_kept(1.0 - cycles.multiplier * density, size.total)
    if most > size.unique:
        highest = math.floor(1000 * size.unique / (density * size.total)) / 1000
        raise UserError(
            f"method.cycles.multiplier={cycles.multiplier:g}: density would pass 1.0 ({most:,} weights of "
            f"{size.unique:,}): use at most {highest:g}, or a higher sparsity.target"
        )


def _check_phasing(config: Config) -> None:
    phasing, epochs = config.method.phasing, recipe_of(config).epochs
    if phasing.begin > phasing.end:
        raise UserError(f"method.phasing.begin={phasing.begin:g} lies after method.phasing.end={phasing.end:g}")
    if phasing.end >= (1.0 if phasing.unit == "share" else epochs):
        raise UserError(
            f"method.phasing.end={phasing.end:g} ({phasing.unit}): DyReLU must be ReLU before the training ends "
            f"({epochs} epochs)"
        )


def check_counts(config: Config) -> None:
    """Would a sparsity on the way empty a layer?"""
    if not config.method.prunes:
        return
    size = counted(config)
    target = config.sparsity.target
    start = phases.regrowth_start(config)
    if start >= 1.0:
        raise UserError(
            f"regrowth of {config.method.regrow.steps} x {config.method.regrow.budget} "
            f"down to sparsity.target={target:g} "
            f"would have to start at {start:g}: use a smaller method.regrow.budget or a lower sparsity.target"
        )
    kept = num_kept(start, size.total)
    # rounded to the side on which the hint holds when it is taken at its word
    highest = math.floor(1e6 * (1 - size.layers / size.total)) / 1e6
    lowest = math.ceil(1e6 * (1 - size.unique / size.total)) / 1e6
    if kept < size.layers:
        raise UserError(
            f"sparsity {start:g} keeps {kept} of {size.total:,} weights, which empties some of the network's "
            f"{size.layers} layers: the highest sparsity here is {highest:.6f}"
        )
    if kept > size.unique:
        raise UserError(
            f"sparsity {start:g} keeps {kept:,} weights, but with method.sharing=true only {size.unique:,} exist: "
            f"the lowest sparsity here is {lowest:.6f}"
        )


class Size(NamedTuple):
    """Counted weights before sharing, those that exist, and the layers that hold them."""

    total: int
    unique: int
    layers: int


def counted(config: Config) -> Size:
    """The size of the network that the method trains, without its memory."""
    return _size(spec_of(config), config.method.sharing)


@cache
def _size(spec: Spec, sharing: bool) -> Size:
    model = meta_network(spec, sharing)
    found = layers(model).values()
    return Size(count(model), sum(module.weight.numel() for module in found), len(found))


def check_regrowth(config: Config) -> None:
    """Can this regrowth look at what it asks for?"""
    regrow = config.method.regrow
    if not config.method.regrows:
        return
    if regrow.score != "none":
        if regrow.score not in SCORES:
            raise UserError(f"unknown method.regrow.score {regrow.score!r}; {nearest(regrow.score, [*SCORES, 'none'])}")
        if regrow.score_on == "sparse" and regrow.score in OF_WEIGHTS:
            raise UserError(
                f"method.regrow.score={regrow.score} on the sparse network scores every pruned weight 0: "
                "use method.regrow.score_on=dense, or score=gradient"
            )
    if regrow.reference is not None:
        load_checkpoint(regrow.reference)
    if regrow.distribution == "given":
        sizes = {name: module.weight.numel() for name, module in layers(meta_network(spec_of(config))).items()}
        if not regrow.given:
            raise UserError("method.regrow.distribution=given needs method.regrow.given=[LAYER, ...]")
        if unknown := [name for name in regrow.given if name not in sizes]:
            raise UserError(f"method.regrow.given: unknown layer {unknown[0]!r}; {nearest(unknown[0], sizes)}")
        growth = num_kept(config.sparsity.target, sum(sizes.values()))
        growth -= num_kept(phases.regrowth_start(config), sum(sizes.values()))
        room = sum(sizes[name] for name in set(regrow.given))
        if room < growth:
            raise UserError(
                f"method.regrow.given={list(regrow.given)} have {room} weights, {growth} are to regrow: name more"
            )


def check_outputs(outputs: Path) -> None:
    """Can runs be written there?"""
    try:
        outputs.mkdir(parents=True, exist_ok=True)
        probe = outputs / f".probe.{os.getpid()}"
        probe.write_text("x")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to {outputs} ({error.strerror}): make room there or set paths.outputs=DIR"
        ) from None
