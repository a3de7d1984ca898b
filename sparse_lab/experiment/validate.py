"""Everything about a request that can be wrong, found before anything trains: one clear line each."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import torch

from sparse_lab import data, loggers, models
from sparse_lab.config import Config, LoggerConfig, check_ranges
from sparse_lab.config import present as config_parts
from sparse_lab.errors import SparseLabError, UserError, nearest
from sparse_lab.experiment import backend
from sparse_lab.experiment.selection import check_selection
from sparse_lab.experiment.timeline import steps_an_epoch
from sparse_lab.host.machine import available_memory, size
from sparse_lab.methods import schedules, table
from sparse_lab.methods.networks import choice_of, spec_of, structure_of
from sparse_lab.methods.recipes import clock_of, recipes_of
from sparse_lab.sparsity.images import image_like, send
from sparse_lab.training.checkpoint_io import load_network, load_start
from sparse_lab.training.device import device_of

PACKED = ".sparse"  # what `sparse-lab export` calls such files


def check(config: Config, here: bool = True) -> None:
    """Raises UserError for a value, name, combination, file or folder that this run could not work with.

    here: it would run on this machine, so that what it asks for must be in this one.
    """
    check_request(config)
    if here:
        check_device(config)
    _check_data(repr(config.dataset), config)
    _check_images(config)
    if here:
        _check_memory(config)
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


def _check_memory(config: Config) -> None:
    """Does what a training step keeps for its gradients fit into a CPU's memory? It takes more than that."""
    if config.compute != "dense" or device_of(config.trainer.accelerator).type != "cpu":
        return
    images = min(config.training.batch_size, config.dataset.train_limit or config.training.batch_size)
    needed = structure_of(config).read * images * (2 if "mixed" in config.trainer.precision else 4)
    if needed > (room := available_memory()):
        raise UserError(
            f"training.batch_size={config.training.batch_size} of images {config.dataset.shape}: {config.model.title} "
            f"keeps at least {size(needed)} for its gradients, and {size(room)} of memory are available: lower it, or "
            "dataset.image_size"
        )


def _overlaps(config: Config) -> bool:
    """Does a pixel belong to two windows of a max-pooling?"""
    pools = [module for module in structure_of(config).hollow.modules() if isinstance(module, torch.nn.MaxPool2d)]
    return any(pool.kernel_size != pool.stride for pool in pools)


def check_request(config: Config) -> None:
    """What is wrong with the request itself, whatever data, packages and room are here. Raises UserError."""
    check_ranges(config)
    if config.model.name not in models.names():
        raise UserError(
            f"model.name: unknown model {config.model.name!r}; {nearest(config.model.name, models.names())}"
        )
    models.check(spec_of(config))
    _check_training(config)
    _check_keeps_masks(config)
    check_step(config, min(config.training.batch_size, config.dataset.train_limit or config.training.batch_size))
    _check_parts(config)
    backend.check(config, here=False)
    _check_files(config)


def check_step(config: Config, images: int) -> None:
    """Raise UserError where a training step sees one image a process (of `images` in all), and the network normalises
    over a batch where its maps are of one pixel: there is nothing to normalise over.
    """
    if images // config.trainer.devices > 1:
        return
    structure = structure_of(config)
    model = copy.deepcopy(structure.hollow).train()
    try:
        send(model, image_like(model, structure.shape))
    except SparseLabError as error:
        if "more than 1 value per channel" in str(error):
            raise UserError(
                f"training.batch_size={config.training.batch_size} gives {structure.name} one image a step, and its "
                "BatchNorm over maps of one pixel needs two: a larger batch, more training images, or larger ones"
            ) from None


def _check_keeps_masks(config: Config) -> None:
    """Are there masks to keep, and is there anything that trains under them?"""
    if not config.model.keep_masks:
        return
    if config.model.weights in (None, *models.LIBRARIES):
        raise UserError("model.keep_masks=true needs model.weights=FILE, of a pruned network: give it, or leave it out")
    if config.method.prune is None:
        raise UserError(
            f"model.keep_masks=true: method {config.method.name!r} trains every weight: method=static trains under the "
            "masks, at the sparsity that they have; or leave model.keep_masks out"
        )


def _check_files(config: Config) -> None:
    """Can the files be read that a run starts from, and do they fit its network? Once a process for each state of a
    file and network.
    """
    weights, regrow = config.model.weights, config.method.regrow
    if weights is not None and weights not in models.LIBRARIES:
        _once("model.weights", config, weights, partial(_check_weights, spec_of(config)))
    if regrow is not None and regrow.reference is not None:
        _once("method.regrow.reference", config, regrow.reference, partial(_check_reference, config))


FITTING: set[object] = set()


def _once(key: str, config: Config, path: str, check_fit: Callable[[str], None]) -> None:
    if path.endswith(PACKED):
        raise UserError(
            f"{key}={path} is a packed network, whose weights have its batch norms in them: give the folder of its "
            "run, or what `sparse-lab export RUN --to torch` writes"
        )
    try:
        about = os.stat(Path(path).expanduser())
    except OSError as error:
        raise UserError(f"{key}={path}: cannot be read ({error.strerror}): name another file") from None
    known = (key, path, about.st_mtime_ns, about.st_size, spec_of(config), choice_of(config))
    if known in FITTING:
        return
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run itself says what of them it leaves out
            check_fit(path)
    except SparseLabError as error:
        raise UserError(f"{key}={path}: {str(error).removeprefix(path).lstrip()}") from None
    FITTING.add(known)


def _check_weights(spec: models.Spec, path: str) -> None:
    models.make(spec, path)


def _check_reference(config: Config, path: str) -> None:
    load_start(copy.deepcopy(structure_of(config).hollow), load_network(path), path)


CHECKED: set[str] = set()


def _check_data(request: str, config: Config) -> None:
    """Once a process for each data set: a sweep's jobs all ask for the same files."""
    if request not in CHECKED:
        data.check(config.dataset)
        CHECKED.add(request)


EXPECTED: dict[str, dict[str, tuple[int, int]] | None] = {}


def _check_images(config: Config) -> None:
    """Are there enough of them, as far as that is known before they are read?"""
    request = repr((config.dataset, config.training))
    if request not in EXPECTED:
        EXPECTED[request] = data.expected_images(config.dataset, config.training)
    images = EXPECTED[request]
    if images is not None:
        check_selection(config, images)
        check_step(config, min(config.training.batch_size, images["train"][0]))


def check_pace(config: Config, asked: Collection[str]) -> None:
    """Raise UserError where the training is too short for what one of the keys `asked` for sets. What a method's own
    file sets is warned of as the run begins.
    """
    steps = steps_an_epoch(config)
    one = next((one for one in (config, *table.ancestors(config)) for key in asked if _paces(one, key)), None)
    if steps is None or one is None:
        return
    for line, keys in table.too_long(one, clock_of(one, steps)):
        if named := [key for key in keys if key in asked]:
            raise UserError(f"{', '.join(named)}: {line}")


def _paces(config: Config, key: str) -> bool:
    parts = {f"method.{one.part}": one.paced_by for one in table.present(config.method)}
    parts[f"schedule.{config.schedule.name}"] = schedules.kind_of(config.schedule).paced_by
    part, _, name = key.rpartition(".")
    return name in parts.get(part, ())


def _check_recipes(config: Config) -> None:
    for path in recipes_of(config):
        recipe = config.training if path == "training" else getattr(config.training, path.partition(".")[2])
        if recipe.optimizer == "sgd" and recipe.nesterov and recipe.momentum == 0.0:
            raise UserError(f"{path}.nesterov=true looks ahead along the momentum: {path}.momentum above 0")
        if recipe.lr_schedule == "step" and not recipe.milestones:
            raise UserError(
                f"{path}.lr_schedule=step needs {path}.milestones=[...]: give them, or lr_schedule=constant"
            )


def _check_training(config: Config) -> None:
    training, method = config.training, config.method
    _check_recipes(config)
    data.check_shares(training, config.trainer.devices)
    if method.name == "dense" and (there := config_parts(method)):
        raise UserError(
            f"method.{there[0]}: a method that does more than dense training needs a method.name of its own"
        )
    if training.stop_after is not None and (method.prune is not None or method.name != "dense"):
        raise UserError("training.stop_after is for method=dense: other methods would end before their target")
    if (training.stop_after or 0) > training.epochs:
        raise UserError(f"training.stop_after={training.stop_after}: training.epochs={training.epochs}")
    if training.augment.padding_mode == "reflect" and training.augment.crop_padding >= min(config.dataset.size):
        raise UserError(
            f"training.augment.crop_padding={training.augment.crop_padding} cannot reflect an image that small"
        )


def _check_parts(config: Config) -> None:
    """Do the parts of the method go together, with the schedule and with this network?"""
    structure = structure_of(config)
    table.check_together(config, structure)
    if config.method.prune is not None:
        structure.check_maskable()
    _check_surgery(config)
    table.check(config, structure)


ALTERED: set[str] = set()


def _check_surgery(config: Config) -> None:
    """Once a process for each method and network: a sweep's jobs differ in their seeds more than in these."""
    request = repr((spec_of(config), choice_of(config), config.method))
    if request not in ALTERED:
        table.altered_meta_network(config)
        ALTERED.add(request)


def check_outputs(outputs: Path) -> Path:
    """Return the folder that is there already, `outputs` or one above it. Raise UserError where runs cannot be written
    there. Nothing is left behind.
    """
    try:
        whole = outputs.absolute()
        there = next(folder for folder in (whole, *whole.parents) if folder.exists())
        with tempfile.NamedTemporaryFile(dir=there) as probe:
            probe.write(b"x")
            probe.flush()
    except OSError as error:
        raise UserError(
            f"cannot write to paths.outputs={outputs} ({error.strerror}): make room there, or set paths.outputs=DIR"
        ) from None
    return there
