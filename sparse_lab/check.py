"""Everything about a request that can be wrong, found before anything trains: one clear line each."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

from sparse_lab import data, models, stages
from sparse_lab.callbacks.regrow import check_layers
from sparse_lab.config import PARTS, Config, UserError, check_ranges, nearest
from sparse_lab.sparsity.masks import kept_for, layers
from sparse_lab.sparsity.scores import SCORES, find
from sparse_lab.training.files import load

NEEDS_WEIGHTS = ("taylor", "magnitude", "lamp")


def check(config: Config) -> None:
    """Raises UserError for a value, name, combination, file or folder that this run could not work with."""
    check_ranges(config)
    if config.model.name not in models.names():
        raise UserError(f"unknown model {config.model.name!r}; {nearest(config.model.name, models.names())}")
    check_parts(config)
    check_counts(config)
    check_regrowth(config)
    if config.model.weights not in (None, "torchvision"):
        load(str(config.model.weights))
    for name, numbers in (("mean", config.dataset.mean), ("std", config.dataset.std)):
        if len(numbers) != 3 or (name == "std" and min(numbers) <= 0):
            raise UserError(f"dataset.{name}={list(numbers)}: three numbers, one a channel, std above 0")
    _check_data(repr(config.dataset), config)
    check_outputs(Path(config.paths.outputs))


CHECKED: set[str] = set()


def _check_data(request: str, config: Config) -> None:
    """Once a process for each data set: a sweep's jobs all ask for the same files."""
    if request not in CHECKED:
        data.check(config.dataset)
        CHECKED.add(request)


def check_parts(config: Config) -> None:
    """Do the parts of the method, schedule and trainer go together?"""
    parts = config.method.parts
    if tuple(parts) not in PARTS:
        raise UserError(f"method.parts={parts}: known lists are {', '.join(str(list(one)) for one in PARTS)}")
    if config.method.goes_on and config.method.starts_from is None:
        raise UserError(f"method {config.method.name!r}: method.starts_from must name the pruning method before it")
    if not config.method.goes_on and config.method.starts_from not in (None, "dense"):
        raise UserError(
            f"method.starts_from={config.method.starts_from}: pruning starts from dense, or from scratch (null)"
        )
    if config.method.name == "dense" and parts:
        raise UserError(
            f"method.parts={parts}: a method that does more than dense training needs a method.name of its own"
        )
    if config.method.prunes:
        find(config.method.prune.score)
    if config.schedule.name == "cubic" and config.schedule.begin >= config.schedule.end:
        raise UserError(
            f"schedule.begin={config.schedule.begin:g} must lie before schedule.end={config.schedule.end:g}"
        )
    if config.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer=gpu, but torch finds no GPU here: use trainer=cpu")
    if (
        config.training.augment.padding_mode == "reflect"
        and config.training.augment.crop_padding >= config.dataset.image_size
    ):
        raise UserError(
            f"training.augment.crop_padding={config.training.augment.crop_padding} cannot reflect an image that small"
        )


def check_counts(config: Config) -> None:
    """Would a sparsity on the way empty a layer?"""
    if not config.method.prunes:
        return
    total, number = counted(
        config.model.name, config.dataset.num_classes, config.model.width, config.dataset.image_size
    )
    target = config.sparsity.target
    start = stages.regrowth_start(config)
    if start >= 1.0:
        raise UserError(
            f"regrowth of {config.method.regrow.steps} x {config.method.regrow.budget} "
            f"down to sparsity.target={target:g} "
            f"would have to start at {start:g}: use a smaller method.regrow.budget or a lower sparsity.target"
        )
    kept = kept_for(start, total)
    if kept < number:
        raise UserError(
            f"sparsity {start:g} keeps {kept} of {total:,} weights, which empties some of the network's "
            f"{number} layers: the highest sparsity here is {1 - number / total:.6f}"
        )


@cache
def counted(name: str, num_classes: int, width: float, image_size: int) -> tuple[int, int]:
    """Counted weights and layers of a network, without its memory."""
    with torch.device("meta"):
        found = layers(models.build(name, num_classes, width, image_size))
    return sum(module.weight.numel() for module in found.values()), len(found)


def check_regrowth(config: Config) -> None:
    """Can this regrowth look at what it asks for?"""
    regrow = config.method.regrow
    if not config.method.regrows:
        return
    if regrow.score != "none":
        if regrow.score not in SCORES:
            raise UserError(f"unknown method.regrow.score {regrow.score!r}; {nearest(regrow.score, [*SCORES, 'none'])}")
        if regrow.score_on == "sparse" and regrow.score in NEEDS_WEIGHTS:
            raise UserError(
                f"method.regrow.score={regrow.score} on the sparse network scores every pruned weight 0: "
                "use method.regrow.score_on=dense, or score=gradient"
            )
    if regrow.reference is not None:
        load(regrow.reference)
    with torch.device("meta"):
        model = models.build(
            config.model.name, config.dataset.num_classes, config.model.width, config.dataset.image_size
        )
    check_layers(regrow, model)
    if regrow.layers == "given":
        sizes = {name: module.weight.numel() for name, module in layers(model).items()}
        growth = kept_for(config.sparsity.target, sum(sizes.values()))
        growth -= kept_for(stages.regrowth_start(config), sum(sizes.values()))
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
