"""From a config to the parts of a run: network, masks, clock, module, callbacks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from torch import Tensor, nn

from sparse_lab import loggers
from sparse_lab.algorithms.enforce import EnforceMasks
from sparse_lab.callbacks.activations import Activations
from sparse_lab.callbacks.checkpoint import Checkpoint, CheckpointOnExit
from sparse_lab.callbacks.gradient_norms import GradientNorms
from sparse_lab.callbacks.loggers import Loggers
from sparse_lab.callbacks.mask_logger import MaskLogger
from sparse_lab.callbacks.metrics_csv import MetricsCsv
from sparse_lab.callbacks.nan_guard import NanGuard
from sparse_lab.callbacks.progress import Progress
from sparse_lab.callbacks.rounds import Rounds
from sparse_lab.callbacks.sparsify import Sparsify
from sparse_lab.config import Config
from sparse_lab.data import Data
from sparse_lab.experiment.identity import run_hash, settings
from sparse_lab.methods import phases, table
from sparse_lab.methods.base import Site
from sparse_lab.methods.networks import build_model, structure_of
from sparse_lab.methods.recipes import clock_of, recipe_of
from sparse_lab.models import dyrelu
from sparse_lab.records.redaction import redact
from sparse_lab.records.run_dir import RunDir
from sparse_lab.records.system import device_name
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.masks import Masks, count, count_nonzero, num_kept, tell_uncounted
from sparse_lab.sparsity.processes import rank
from sparse_lab.sparsity.schedules import EpochEnds
from sparse_lab.sparsity.scores import Probe
from sparse_lab.training.accumulation import steps_of
from sparse_lab.training.checkpoint_io import load_into, load_network, load_start
from sparse_lab.training.clipping import NormRatio
from sparse_lab.training.device import layout_of
from sparse_lab.training.lightning_module import Classifier
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
    save: Checkpoint
    callbacks: list[pl.Callback]


def assemble(
    config: Config,
    data: Data,
    folder: RunDir,
    starts: dict[str, Path],
    console: Console,
    label: str,
    job: str,
    stop: StopRequest,
    device: torch.device,
) -> Parts:
    """Everything that trains on `device`. `starts` holds the networks to start from: 'parent', and for regrowth
    'dense', 'reference'. label, job: what stands before the lines of its progress, and before others.
    """

    say = _speaker(console, job)
    model, rewind = _network(config, starts, device, say)
    masks = Masks(model) if config.method.prune else None
    clock = clock_of(config, steps_of(len(data.train), config.training.accumulate))
    arithmetic, step = _arithmetic(config, model, say), _step(config, model, device, say)
    ratio = _norm_ratio(config, model, masks)
    module = Classifier(model, recipe_of(config), clock, config.training.label_smoothing, arithmetic, step, ratio)
    log = _log(config, model, masks, module, folder, device, say)
    recompile = (lambda: None) if step is None else step.renew
    schedule, begins = table.sparsity(config, clock), table.begins(config, clock)
    structure, network = structure_of(config), partial(_start, config, starts)
    probe = Probe(shape=lambda: structure.shape)
    site = Site(
        config,
        structure,
        data.train,
        probe,
        model,
        masks,
        clock,
        schedule,
        begins,
        network,
        rewind,
        log,
        say,
        recompile,
    )
    algorithms = [*([] if masks is None else [EnforceMasks(masks)]), *table.build(site)]
    algorithms += [] if ratio is None else [ratio]
    rounds = Rounds(
        model,
        module.figures,
        clock,
        config.training.select,
        module.recipe.patience,
        data.test,
        _at_target(site),
        _measure(model, masks, log),
        say,
        algorithms,
    )
    diagnostics = _diagnostics(config, folder, data, model, masks, module)
    history = MetricsCsv(folder, clock, lambda: {**rounds.row, **_kept(model, masks)})
    factories = loggers.factories(config.logger.names, folder.path.parents[1])
    boards = Loggers(factories, about(config, folder), history.row, rounds, log, say)
    save = Checkpoint(
        folder,
        config.trainer.checkpoint_every,
        finished=lambda: clock.finished,
        scores_next=lambda: any(one.scores_next() for one in algorithms),
        stop=stop,
        computed=computed(config, device),
    )
    progress = [Progress(label, rounds, lambda: _kept(model, masks), console)] if config.trainer.progress else []
    for line in table.idle(config, clock):
        say(f"WARNING: {line}")
    watch = [NanGuard(), *diagnostics, history, boards, *progress]
    # the first and the last place have a reason, see there; the others do not matter to what is computed
    changes = [Sparsify(*algorithms)] if algorithms else []  # a dense training has none
    callbacks = [CheckpointOnExit(save), rounds, log, *changes, *watch, save]
    return Parts(model, masks, clock, module, rounds, log, save, callbacks)


def computed(config: Config, device: torch.device) -> dict[str, Any]:
    """What may change the last bits of a result and is not in a run's name: it stands in the record."""
    return {
        "device": device_name(device),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        "compile": resolve_compile_mode(config.trainer.compile, device),
        "deterministic": config.trainer.deterministic,
    }


def _speaker(console: Console, job: str) -> Callable[[str], None]:
    before = f"{job} " if job else ""  # several may speak at a time

    def say(line: str) -> None:
        if rank() == 0:
            style = "bold red" if "WARNING" in line else None
            console.print(f"  {redact(before + line)}", highlight=False, soft_wrap=True, style=style, markup=False)

    return say


def _network(
    config: Config, starts: dict[str, Path], device: torch.device, say: Callable[[str], None]
) -> tuple[nn.Module, dict[str, Tensor] | None]:
    """The network that trains, as its parent left it and altered by the method; and what each round goes back to."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        model = build_model(config)
    for one in warned if "parent" not in starts else ():  # whose weights take the place of these
        say(f"WARNING: {one.message}")
    tell_uncounted(model, lambda line: say(f"WARNING: {line}"))
    rewind = _rewinding(config, model, starts)
    if "parent" in starts:
        Masks(model)  # the parent may be pruned already: its masks are loaded with it
        load_into(model, load_network(starts["parent"]), starts["parent"])
    return table.alter(model, config, structure_of(config)).to(memory_format=layout_of(device)), rewind  # type: ignore[call-overload]


def _start(config: Config, starts: dict[str, Path], name: str) -> nn.Module:
    """The network of one of the runs that this one starts from, or of a file that it names."""
    regrow = config.method.regrow
    named = regrow.reference if name == "reference" and regrow is not None else None
    path = starts[name] if named is None else Path(named)
    network = build_model(config)
    tell_uncounted(network, lambda line: None)  # that was said of the network that trains
    load_start(network, load_network(path), path)
    return network


def _log(
    config: Config,
    model: nn.Module,
    masks: Masks | None,
    module: Classifier,
    folder: RunDir,
    device: torch.device,
    say: Callable[[str], None],
) -> MaskLogger:
    every_time = config.diagnostics.layers or config.sparsity.require_connected
    return MaskLogger(
        model,
        masks,
        module.clock,
        folder,
        say,
        trained=lambda: module.figures.trained,
        shape=config.dataset.shape,
        require_connected=config.sparsity.require_connected,
        explore=any(one.explores for one in table.present(config.method)),
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
            "of what compute=sparse saves: training.clip_over=all_estimated and live do not"
        )
    return SparseArithmetic(model, say, config.storage)


def _norm_ratio(config: Config, model: nn.Module, masks: Masks | None) -> NormRatio | None:
    recipe = recipe_of(config)
    estimated = masks is not None and recipe.clip_norm is not None and recipe.clip_over == "all_estimated"
    return NormRatio(model) if estimated else None


def _rewinding(config: Config, model: nn.Module, starts: dict[str, Path]) -> dict[str, Tensor] | None:
    """The weights that each round goes back to: those of `model`, which is new, or of the run that stopped there."""
    if config.method.prune is None or config.method.prune.rewind_weights is None:
        return None
    if "rewound" in starts:
        return load_network(starts["rewound"])
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _diagnostics(
    config: Config, folder: RunDir, data: Data, model: nn.Module, masks: Masks | None, module: Classifier
) -> list[pl.Callback]:
    chosen = config.diagnostics
    callbacks: list[pl.Callback] = (
        [Activations(folder, model, data.validation, config.method.dyrelu is not None)] if chosen.activations else []
    )
    return [*callbacks, GradientNorms(folder, model, masks, module.live)] if chosen.gradients else callbacks


def _at_target(site: Site) -> Callable[[], bool]:
    """Is the network what this round is to end with: as sparse, and without DyReLU?"""
    model, masks, clock, schedule = site.model, site.masks, site.clock, site.schedule
    settled = table.settles(site.config, clock)

    def at_target() -> bool:
        if dyrelu.activations(model) or clock.step_in_round < settled:
            return False
        if isinstance(schedule, EpochEnds):
            return clock.epoch_in_round == clock.epochs_a_round
        first, last = clock.round * clock.steps_a_round, (clock.round + 1) * clock.steps_a_round - 1
        if site.config.method.filters:  # whole filters leave a few weights fewer than asked for, or what rates say
            return schedule.sparsity(first + clock.step_in_round - 1) == schedule.sparsity(last)
        return masks is None or masks.kept() == num_kept(schedule.sparsity(last), masks.total())

    return at_target


def _kept(model: nn.Module, masks: Masks | None) -> dict[str, Any]:
    total = count(model)
    kept = total if masks is None else masks.kept()
    return {"sparsity": 1.0 - kept / total, "kept": kept}


def _measure(model: nn.Module, masks: Masks | None, log: MaskLogger) -> Callable[[], dict[str, Any]]:
    return lambda: {**_kept(model, masks), "nonzero": count_nonzero(model), "effective": log.look().as_dict()}


def about(config: Config, folder: RunDir) -> loggers.RunInfo:
    """The run as its dashboards know it."""
    return loggers.RunInfo(
        name=folder.name,
        hash=run_hash(config),
        group=f"{config.method.name}-{phases.final_sparsity(config):g}",
        project=config.logger.project,
        config=settings(config),
        folder=folder.path,
        outputs=folder.path.parents[1],
        mlflow_uri=config.logger.mlflow_uri,
    )
