"""From a config to the parts of a run: network, masks, clock, callbacks, trainer."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from torch import Tensor, nn

from sparse_lab import loggers, models
from sparse_lab.algorithms.after_step import AfterStep
from sparse_lab.algorithms.cyclic import CyclicSparsity
from sparse_lab.algorithms.drop_and_grow import DropAndGrow, ElasticMutation
from sparse_lab.algorithms.dyrelu_phasing import DyReLUPhasing
from sparse_lab.algorithms.enforce import EnforceMasks
from sparse_lab.algorithms.hypersphere import Hypersphere
from sparse_lab.algorithms.prune import Prune
from sparse_lab.algorithms.regrow import Regrow, check_layers
from sparse_lab.algorithms.selectors import FilterSelector, Selector, WeightSelector
from sparse_lab.algorithms.structured.compaction import Compaction
from sparse_lab.callbacks.activations import Activations
from sparse_lab.callbacks.checkpoint import Checkpoint, CheckpointOnExit
from sparse_lab.callbacks.gradient_norms import GradientNorms
from sparse_lab.callbacks.loggers import Loggers
from sparse_lab.callbacks.mask_logger import MaskLogger
from sparse_lab.callbacks.metrics_csv import MetricsCsv
from sparse_lab.callbacks.nan_guard import NanGuard
from sparse_lab.callbacks.progress import Progress
from sparse_lab.callbacks.rounds import Rounds
from sparse_lab.config import Config
from sparse_lab.data import Data
from sparse_lab.errors import UserError
from sparse_lab.experiment import phases
from sparse_lab.experiment.identity import digest, identity
from sparse_lab.experiment.timeline import (
    bounds_of,
    clock_of,
    cycles_of,
    drop_fraction_of,
    idle,
    phasing_of,
    recipe_of,
    schedule_of,
    steps_of,
)
from sparse_lab.models import compactors, dyrelu, offsets, weight_sharing
from sparse_lab.records.redaction import redact
from sparse_lab.records.run_dir import RunDir
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.flops import layer_costs
from sparse_lab.sparsity.masks import Masks, count, num_kept
from sparse_lab.sparsity.paths import connected_init
from sparse_lab.sparsity.schedules import Constant, Cubic, EpochEnds, Schedule
from sparse_lab.sparsity.structured import channels
from sparse_lab.training.checkpoint_io import load_into, load_network
from sparse_lab.training.device import device_of, layout_of
from sparse_lab.training.lightning_module import Classifier
from sparse_lab.training.processes import rank
from sparse_lab.training.signals import StopRequest
from sparse_lab.training.step import TrainingStep, resolve_compile_mode

if TYPE_CHECKING:
    from sparse_lab.sparse_cpu.engine import SparseArithmetic

LOOKS_APART = 1000  # steps, on a GPU


@dataclass
class Parts:
    model: nn.Module
    masks: Masks | None
    clock: Clock
    module: Classifier
    rounds: Rounds
    log: MaskLogger
    callbacks: list[pl.Callback]


def build_model(config: Config) -> nn.Module:
    """The plain network of `config`."""
    model, data = config.model, config.dataset
    return models.build(model.name, data.num_classes, model.width, data.image_size, model.weights)


def alter(model: nn.Module, config: Config) -> nn.Module:
    """The method's surgery on a plain network, in place. Raises UserError when the two do not go together."""
    chosen = config.model.name
    try:
        if config.method.sharing:
            weight_sharing.share(model)
    except ValueError as error:
        raise UserError(
            f"method.sharing=true does not fit {chosen}: {error}: use model=resnet34, or method.sharing=false"
        ) from None
    try:
        if config.method.dyrelu:
            dyrelu.install(model, config.dataset.image_size)
    except ValueError as error:
        raise UserError(
            f"method.dyrelu=true does not fit {chosen}: {error}: use a network with ReLU, or method.dyrelu=false"
        ) from None
    if config.method.dct:
        offsets.install_dct(model)
    try:
        if config.method.compactors:
            compactors.install(model, [group.name for group in filter_groups(config)])
    except ValueError as error:
        raise UserError(f"method.compactors=true does not fit {chosen}: {error}: use another model or method") from None
    return model


@lru_cache(maxsize=8)
def plain_network(name: str, num_classes: int, width: float, image_size: int) -> nn.Module:
    """The plain network on the device "meta", to ask for its structure; it is not the caller's to change."""
    with torch.device("meta"):
        return models.build(name, num_classes, width, image_size)


def filter_groups(config: Config) -> list[channels.Group]:
    """The channels of the plain network that can go. Raises UserError when there are none."""
    chosen = config.model.name
    network = (chosen, config.dataset.num_classes, config.model.width, config.dataset.image_size)
    plain = plain_network(*network)
    try:
        found = list(_filter_groups(network, config.method.filters.coupled))
    except ValueError as error:
        raise UserError(
            f"method {config.method.name} prunes filters, and {chosen} has none that can go: {error}: "
            "use another model, or method.filters.coupled=true"
        ) from None
    convs = [group for group in found if isinstance(plain.get_submodule(group.name), nn.Conv2d)]
    if not convs:
        raise UserError(
            f"method {config.method.name} prunes filters, and {chosen} has no convolution: use a model with "
            "convolutions, or a method that prunes weights"
        )
    # behind a compactor stands one convolution, and nothing else may make what it shrinks
    return [group for group in convs if len(group.producers) == 1] if config.method.compactors else found


@lru_cache(maxsize=8)
def _filter_groups(network: tuple[str, int, float, int], coupled: bool) -> tuple[channels.Group, ...]:
    """An image's way through the network is followed once: a sweep's jobs all ask."""
    return tuple(channels.groups(plain_network(*network), network[3], coupled))


def assemble(
    config: Config,
    data: Data,
    folder: RunDir,
    starts: dict[str, Path],
    console: Console,
    label: str,
    stop: StopRequest,
    device: torch.device,
) -> Parts:
    """Everything that trains on `device`. `starts` holds the networks to start from: 'parent', and for regrowth
    'dense', 'reference'.
    """

    job = f"{label.split()[0]} " if label.startswith("[") else ""  # several may speak at a time

    def say(line: str) -> None:
        if rank() == 0:
            style = "bold red" if "WARNING" in line else None
            console.print(f"  {redact(job + line)}", highlight=False, soft_wrap=True, style=style, markup=False)

    model, rewind = _network(config, starts, device)
    masks = Masks(model) if config.method.prunes else None
    clock = clock_of(config, len(data.train))
    arithmetic, step = _arithmetic(config, model, say), _step(config, model, device, say)
    module = Classifier(model, recipe_of(config), clock, config.training.label_smoothing, arithmetic, step)
    log = _log(config, model, masks, clock, folder, device, say)
    rounds = Rounds(
        clock,
        config.training.select,
        module.recipe.patience,
        data.test,
        _at_target(config, model, masks, clock),
        _measure(model, masks, log),
        say,
    )
    keep: list[pl.Callback] = [log] if masks is None else [EnforceMasks(masks), log]
    phasing = [DyReLUPhasing(*phasing_of(config, clock), clock, say)] if config.method.dyrelu else []
    changes = _mask_changes(config, data, masks, clock, starts, log, rewind, say)
    diagnostics = _diagnostics(config, folder, data, masks)
    history = MetricsCsv(folder, clock, lambda: {**rounds.row, **_kept(model, masks)})
    factories = loggers.factories(config.logger.names, folder.path.parents[1])
    boards = Loggers(factories, about(config, folder), history.row, rounds, log, say)
    save = Checkpoint(folder, config.trainer.checkpoint_every, lambda: clock.finished, _scores_next(changes), stop)
    progress = [Progress(label, rounds, lambda: _kept(model, masks), console)] if config.trainer.progress else []
    for line in idle(config, clock):
        say(f"WARNING: {line}")
    watch = [NanGuard(), *diagnostics, history, boards, *progress]
    order = [CheckpointOnExit(save), rounds, *keep, *phasing, *changes, *watch, save]
    return Parts(model, masks, clock, module, rounds, log, order)


def _network(
    config: Config, starts: dict[str, Path], device: torch.device
) -> tuple[nn.Module, dict[str, Tensor] | None]:
    """The network that trains, as its parent left it and altered by the method; and what each round goes back to."""
    model = build_model(config)
    rewind = _rewinding(config, model, starts)
    if "parent" in starts:
        Masks(model)  # the parent may be pruned already: its masks are loaded with it
        load_into(model, load_network(starts["parent"]), starts["parent"])
    return alter(model, config).to(memory_format=layout_of(device)), rewind  # type: ignore[call-overload]


def _log(
    config: Config,
    model: nn.Module,
    masks: Masks | None,
    clock: Clock,
    folder: RunDir,
    device: torch.device,
    say: Callable[[str], None],
) -> MaskLogger:
    every_time = config.diagnostics.layers or config.sparsity.require_connected
    return MaskLogger(
        model,
        masks,
        clock,
        folder,
        say,
        image_size=config.dataset.image_size,
        require_connected=config.sparsity.require_connected,
        explore=config.method.drops_and_grows or config.method.cyclic,
        by_layer=config.diagnostics.layers,
        apart=0 if every_time or device.type != "cuda" else LOOKS_APART,
    )


def _step(config: Config, model: nn.Module, device: torch.device, say: Callable[[str], None]) -> TrainingStep | None:
    """What makes a dense training step of one process fast; None: eager."""
    how = resolve_compile_mode(config.trainer.compile, device)
    if how == "off" or config.compute != "dense":
        return None
    # float16: the loss is scaled between the forward and the backward pass
    if config.trainer.devices > 1 or config.trainer.precision == "16-mixed":
        if config.trainer.compile != "auto":
            say(
                f"trainer.compile={how} is for one device and not for trainer.precision=16-mixed: goes on in eager mode"
            )
        return None
    return TrainingStep(model, config.training.label_smoothing, how, say)


def _arithmetic(config: Config, model: nn.Module, say: Callable[[str], None]) -> SparseArithmetic | None:
    """What computes a network that has its masks; None: it computes itself, densely."""
    if config.compute != "sparse":
        return None
    from sparse_lab.sparse_cpu.engine import SparseArithmetic

    recipe = recipe_of(config)
    if recipe.clip_norm is not None and recipe.clip_over == "all":
        say(
            "WARNING: training.clip_over=all measures the gradients of pruned weights in every step, which costs most "
            "of what compute=sparse saves: training.clip_over=live does not"
        )
    return SparseArithmetic(model, say)


def _rewinding(config: Config, model: nn.Module, starts: dict[str, Path]) -> dict[str, Tensor] | None:
    """The weights that each round goes back to: those of `model`, which is new, or of the run that stopped there."""
    if not config.method.prunes or config.method.prune.rewind_weights is None:
        return None
    if "rewound" in starts:
        return load_network(starts["rewound"])
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _mask_changes(
    config: Config,
    data: Data,
    masks: Masks | None,
    clock: Clock,
    starts: dict[str, Path],
    log: MaskLogger,
    rewind: dict[str, Tensor] | None,
    say: Callable[[str], None],
) -> list[pl.Callback]:
    method = config.method
    if masks is None or (method.goes_on and (not method.regrows or method.regrow.score == "none")):
        return []
    if method.regrows:
        return [_regrowth(config, data, masks, clock, starts, log)]
    choice = _choice(config, data, masks, log.model)
    if isinstance(choice, FilterSelector) and method.compactors:
        begin = steps_of(method.compacting.begin, method.compacting.unit, clock)
        return [Compaction(method.compacting, begin, choice, config.sparsity.target, clock, log, say)]
    start = _start(config, clock)
    prune = Prune(choice, start, masks, clock, config.seed, log, iterations=method.prune.iterations, rewind=rewind)
    if method.hypersphere:
        return [Hypersphere(method.sphere, prune, clock)]
    after = (method.gradients, masks, clock, config.seed, log)
    changes: list[pl.Callback] = [prune]
    if method.cyclic:
        cycles = CyclicSparsity(cycles_of(config, clock), method.prune.distribution)
        changes.append(AfterStep(cycles, method.cycles, *after))
    if method.drops_and_grows:
        changes.append(AfterStep(_drop_and_grow(config, clock), method.drop_and_grow, *after))
    return changes


def _choice(config: Config, data: Data, masks: Masks, model: nn.Module) -> Selector:
    """What stays when the method prunes."""
    chosen, image_size = config.method.prune, config.dataset.image_size
    per_class = chosen.per_class
    batches = (
        partial(data.train.fixed, chosen.batches) if per_class is None else partial(data.train.balanced, per_class)
    )
    if chosen.unit == "filters":
        groups = filter_groups(config)
        uses = {cost.name: cost.macs // cost.total for cost in layer_costs(model, image_size)}
        layerwise = config.schedule.name == "layerwise"
        return FilterSelector(chosen, config.method.filters, masks, groups, uses, layerwise, batches)
    reserve = partial(connected_init, model, image_size) if config.sparsity.connected_init else None
    return WeightSelector(chosen, masks, batches, image_size, reserve)


def _scores_next(changes: list[pl.Callback]) -> Callable[[], bool]:
    scoring = [change for change in changes if isinstance(change, Prune | Regrow)]
    return lambda: any(change.scores_next() for change in scoring)


def _start(config: Config, clock: Clock) -> Schedule:
    """The schedule of pruning alone: where cycles or drop and grow change the sparsity, only how the run starts."""
    if config.method.cyclic:
        return Constant(config.sparsity.target)
    if config.method.drops_and_grows and config.schedule.name == "cubic":
        return Constant(config.schedule.initial)
    if config.method.drops_and_grows and config.method.drop_and_grow.high:
        return Constant(1.0 - config.method.drop_and_grow.high[0] * (1.0 - config.sparsity.target))
    return schedule_of(config, clock)


def _drop_and_grow(config: Config, clock: Clock) -> DropAndGrow | ElasticMutation:
    chosen = config.method.drop_and_grow
    if chosen.low:
        return ElasticMutation(bounds_of(config, clock), config.sparsity.target, chosen.distribution)
    schedule = schedule_of(config, clock)
    return DropAndGrow(
        drop_fraction_of(config, clock), schedule if isinstance(schedule, Cubic) else None, chosen.distribution
    )


def _regrowth(
    config: Config, data: Data, masks: Masks, clock: Clock, starts: dict[str, Path], log: MaskLogger
) -> Regrow:
    regrow = config.method.regrow
    dense_model = build_model(config)
    check_layers(regrow, dense_model)
    load_into(dense_model, load_network(starts["dense"]), starts["dense"])
    reference = None
    if "reference" in starts:
        state = load_network(starts["reference"])
        reference = {name: state[f"{name}.weight"] for name in masks.layers}
    schedule = schedule_of(config, clock)
    batches, image_size = data.train.fixed, config.dataset.image_size
    return Regrow(regrow, schedule, masks, clock, dense_model, reference, batches, config.seed, log, image_size)


def _diagnostics(config: Config, folder: RunDir, data: Data, masks: Masks | None) -> list[pl.Callback]:
    chosen = config.diagnostics
    callbacks: list[pl.Callback] = (
        [Activations(folder, data.validation, config.method.dyrelu)] if chosen.activations else []
    )
    return [*callbacks, GradientNorms(folder, masks)] if chosen.gradients else callbacks


def _at_target(config: Config, model: nn.Module, masks: Masks | None, clock: Clock) -> Callable[[], bool]:
    """Is the network what this round is to end with: as sparse, and without DyReLU?"""
    schedule = schedule_of(config, clock)
    settled = cycles_of(config, clock).end if config.method.cyclic else 0

    def at_target() -> bool:
        if dyrelu.activations(model) or clock.step_in_round < settled:
            return False
        if isinstance(schedule, EpochEnds):
            return clock.epoch_in_round == clock.epochs_a_round
        first, last = clock.round * clock.steps_a_round, (clock.round + 1) * clock.steps_a_round - 1
        if config.method.prunes_filters:  # whole filters leave a few weights fewer than asked for, or what rates say
            return schedule.sparsity(first + clock.step_in_round - 1) == schedule.sparsity(last)
        return masks is None or masks.kept() == num_kept(schedule.sparsity(last), masks.total())

    return at_target


def _kept(model: nn.Module, masks: Masks | None) -> dict[str, Any]:
    total = count(model)
    kept = total if masks is None else masks.kept()
    return {"sparsity": 1.0 - kept / total, "kept": kept}


def _measure(model: nn.Module, masks: Masks | None, log: MaskLogger) -> Callable[[], dict[str, Any]]:
    return lambda: {**_kept(model, masks), "effective": log.look().as_dict()}


def about(config: Config, folder: RunDir) -> loggers.About:
    """The run as its dashboards know it."""
    plain = identity(config)
    return loggers.About(
        name=folder.name,
        hash=digest(plain),
        group=f"{config.method.name}-{phases.final_sparsity(config):g}",
        project=config.logger.project,
        config=plain,
        folder=folder.path,
        outputs=folder.path.parents[1],
        mlflow_uri=config.logger.mlflow_uri,
    )


# hooks that Lightning calls in every step
IN_STEPS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


def leave_out(callback: pl.Callback) -> None:
    """Lightning calls every hook of every callback, those that do nothing too: a third of a millisecond a step. It
    leaves out what cannot be called.
    """
    for hook in IN_STEPS:
        if getattr(type(callback), hook) is getattr(pl.Callback, hook):
            setattr(callback, hook, None)


def make_trainer(config: Config, parts: Parts, folder: RunDir) -> pl.Trainer:
    """A Lightning trainer that writes nothing of its own: what a run leaves on disk is ours."""
    trainer = config.trainer
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*GPU available but not used.*|.*LeafSpec.*")
    profiler = None
    if trainer.profiler is not None:
        kind = {"simple": pl.profilers.SimpleProfiler, "advanced": pl.profilers.AdvancedProfiler}[trainer.profiler]
        profiler = kind(dirpath=folder.path, filename="profile")
    device = device_of(trainer.accelerator)
    on_gpu = device.type == "cuda"
    _only_deterministic(trainer.deterministic, device, compiles=resolve_compile_mode(trainer.compile, device) == "full")
    # a pass over every new tensor, for nothing: none is read before it is written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    for callback in parts.callbacks:
        leave_out(callback)
    return pl.Trainer(
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        # DyReLU's parameters leave in the middle of the training, and DDP would wait for their gradients
        strategy=("ddp_find_unused_parameters_true" if config.method.dyrelu else "ddp")
        if trainer.devices > 1
        else "auto",
        precision=trainer.precision,  # type: ignore[arg-type]
        benchmark=on_gpu and not trainer.deterministic,
        max_epochs=parts.clock.total_epochs,
        gradient_clip_val=parts.module.recipe.clip_norm,
        callbacks=parts.callbacks,
        logger=False,
        profiler=profiler,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _only_deterministic(wanted: bool, device: torch.device, compiles: bool) -> None:
    """trainer.deterministic, as Lightning would set it; but what torch compiles with is imported only where something
    is compiled.
    """
    # torch calls max-pooling's gradient nondeterministic on a GPU; where windows do not overlap it is not
    # (and where they do, the request is refused)
    mode = "default" if not wanted else "warn" if device.type == "cuda" else "error"
    if compiles:
        torch.use_deterministic_algorithms(wanted, warn_only=mode == "warn")
    else:
        torch.set_deterministic_debug_mode(mode)
    if wanted:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
