"""`sparse-lab bench train`: images a second of whole runs, beside loops that do without what a run has.

A run is what the command runs, with every callback, its records and its checkpoints: dense, and masked by some methods.
Beside it stand a bare loop (no Lightning, no masks, nothing counted) over the same tensors and the same compiled step,
and what one writes first: a plain PyTorch loop over torchvision's transforms in a DataLoader.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from sparse_lab import data
from sparse_lab.bench.phases import phases
from sparse_lab.config import Config
from sparse_lab.errors import UserError
from sparse_lab.experiment.backend import resolve_backend
from sparse_lab.experiment.build import assemble
from sparse_lab.experiment.identity import run_dir
from sparse_lab.experiment.trainer import make_trainer
from sparse_lab.methods.networks import build_model
from sparse_lab.methods.recipes import recipe_of
from sparse_lab.records.system import peak_memory, reset_peak_memory
from sparse_lab.sweep.plan import Request
from sparse_lab.training.device import device_of, layout_of
from sparse_lab.training.optimizers import make_optimizer
from sparse_lab.training.signals import StopRequest
from sparse_lab.training.step import TrainingStep, resolve_compile_mode

BARE, PLAIN = "bare loop", "plain loop"
WARM = 1  # epochs that do not count: there the step is compiled


@dataclass(frozen=True)
class Settings:
    """What was asked for. sparsity in percent; steps: of an epoch; epochs: timed ones; workers: of the plain loop."""

    model: str
    methods: tuple[str, ...]
    sparsity: float
    device: str
    compile: str
    deterministic: bool
    batch: int
    width: float
    steps: int
    epochs: int
    repeats: int
    workers: int
    together: int = 0
    options: tuple[str, ...] = ()


@dataclass
class Pace:
    """Images a second of each timed epoch, of its steps alone and with validation, records and checkpoints; MiB."""

    steps: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    peak: float = 0.0

    @property
    def rate(self) -> float:
        return statistics.median(self.steps)


def request(settings: Settings, method: str, outputs: Path, phase: tuple[str, ...] = ()) -> Config:
    """The run that the command would make of this; with `phase`, the words of one of its phases, an epoch longer.

    Raises UserError for a method that starts from another run.
    """
    words = [
        f"model={settings.model}",
        f"model.width={settings.width:g}",
        "dataset=synthetic",
        f"dataset.train_limit={settings.steps * settings.batch}",
        f"method={method}",
        f"sparsity.target={settings.sparsity / 100:.10g}",
        f"training.batch_size={settings.batch}",
        f"training.epochs={WARM + settings.epochs + bool(phase)}",
        f"trainer={settings.device}",
        f"trainer.compile={settings.compile}",
        f"trainer.deterministic={str(settings.deterministic).lower()}",
        f"paths.outputs={outputs}",
        *settings.options,
        *phase,
    ]
    config = Request.read(words).compose([]).config()
    if config.method.init_from is not None:
        raise UserError(f"bench train: method {method} starts from another run: choose one that trains from scratch")
    return config


class Stopwatch(pl.Callback):
    """Times `epochs` epochs after the first ones. before: called when those are over."""

    def __init__(self, images: int, epochs: int, before: Callable[[], None] = lambda: None) -> None:
        self.images = images
        self.epochs = epochs
        self.before = before
        self.pace = Pace()
        self.spans: list[tuple[float, float]] = []  # of whole epochs
        self._start: float | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end()
        if trainer.current_epoch == WARM:
            self.before()
        if WARM <= trainer.current_epoch < WARM + self.epochs:
            self._start = _now(pl_module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._start is not None and trainer.is_last_batch:
            self.pace.steps.append(self.images / (_now(pl_module.device) - self._start))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end()

    def _end(self) -> None:
        if self._start is not None:
            self.spans.append((self._start, time.perf_counter()))
            self.pace.whole.append(self.images / (self.spans[-1][1] - self._start))
            self._start = None


def run(config: Config, watch: Stopwatch, say: Callable[[str], None]) -> Pace:
    """A whole run from scratch, watched."""
    folder = run_dir(config)
    (folder.path / "checkpoints").mkdir(parents=True)
    folder.begin()
    settled = resolve_backend(config)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    device = device_of(settled.trainer.accelerator)
    reset_peak_memory()
    with StopRequest(say) as stop:
        batches = data.build(settled.dataset, settled.training, settled.seed, device)
        parts = assemble(settled, batches, folder, {}, Console(file=StringIO()), "", "", stop, device)
        parts.callbacks.insert(0, watch)
        trainer = make_trainer(settled, parts, folder)
        trainer.fit(parts.module, batches.train, batches.validation)
    if parts.module.step is not None and parts.module.step.failed:
        say(parts.module.step.failed)
    watch.pace.peak = peak_memory()
    return watch.pace


def bare(config: Config, settings: Settings, say: Callable[[str], None]) -> Pace:
    """The same tensors, the same step and the same optimizer, and nothing else."""
    config = resolve_backend(config)
    device = device_of(config.trainer.accelerator)
    reset_peak_memory()
    loader = data.build(config.dataset, config.training, config.seed, device).train
    model = build_model(config).to(device, memory_format=layout_of(device))  # type: ignore[call-overload]
    how = resolve_compile_mode(config.trainer.compile, device)
    step = None if how == "off" else TrainingStep(model, 0.0, how, say)
    if step is None:
        return _loop(config, device, model, _eager(model), Tensor.backward, lambda epoch: loader, settings)
    return _loop(config, device, model, lambda *batch: step(*batch)[0], step.backward, lambda epoch: loader, settings)


def plain(config: Config, settings: Settings) -> Pace:
    """PIL images, torchvision's transforms in a DataLoader's workers, an eager step in the same precision."""
    config = resolve_backend(config)
    device = device_of(config.trainer.accelerator)
    reset_peak_memory()
    model = build_model(config).to(device)
    loader = DataLoader(
        Photos(settings.steps * settings.batch, config),
        batch_size=settings.batch,
        shuffle=True,
        drop_last=True,
        num_workers=settings.workers,
        persistent_workers=settings.workers > 0,
        pin_memory=device.type == "cuda",
    )

    def moved(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    return _loop(config, device, model, _eager(model), Tensor.backward, moved, settings)


class Photos(Dataset[tuple[Tensor, int]]):
    """Random images as torchvision's CIFAR10 hands them out: a PIL image through crop, flip and normalisation."""

    def __init__(self, count: int, config: Config) -> None:
        size = config.dataset.size
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8, generator=generator).numpy()
        self.labels = torch.randint(0, config.dataset.classes, (count,), generator=generator).tolist()
        self.transform = v2.Compose(
            [
                v2.RandomCrop(size, padding=4),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(config.dataset.mean, config.dataset.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def _eager(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda images, labels: functional.cross_entropy(model(images), labels)


def _loop(
    config: Config,
    device: torch.device,
    model: nn.Module,
    forward: Callable[[Tensor, Tensor], Tensor],
    backward: Callable[[Tensor], None],
    batches: Callable[[int], Any],
    settings: Settings,
) -> Pace:
    optimizer = make_optimizer(model.parameters(), recipe_of(config), fused=device.type == "cuda")
    pace, images = Pace(), settings.steps * settings.batch
    for epoch in range(WARM + settings.epochs):
        start = _now(device)
        for inputs, labels in batches(epoch):
            optimizer.zero_grad()
            with _precision(config, device):
                loss = forward(inputs, labels)
            backward(loss)
            optimizer.step()
        if epoch >= WARM:
            pace.steps.append(images / (_now(device) - start))
    pace.peak = peak_memory()
    return pace


def _precision(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    if config.trainer.precision != "bf16-mixed":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def _now(device: torch.device) -> float:
    """When the device has done all that it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def candidates(settings: Settings, say: Callable[[str], None]) -> Iterator[tuple[str, Callable[[], Pace]]]:
    """What is measured, in turn: of a method with phases each of them. Every call starts anew."""
    images = settings.steps * settings.batch

    def fresh(method: str, phase: tuple[str, ...]) -> Pace:
        with tempfile.TemporaryDirectory() as folder:
            config = request(settings, method, Path(folder), phase)
            return run(config, Stopwatch(images, settings.epochs), say)

    def loop(kind: str) -> Pace:
        with tempfile.TemporaryDirectory() as folder:
            config = request(settings, "dense", Path(folder))
            return bare(config, settings, say) if kind == BARE else plain(config, settings)

    for method in settings.methods:
        found = phases(request(settings, method, Path("unused")))
        for name, words in (found or {"": ()}).items():
            yield f"{method}: {name}" if name else method, partial(fresh, method, words)
    yield BARE, lambda: loop(BARE)
    yield PLAIN, lambda: loop(PLAIN)


def measure(settings: Settings, say: Callable[[str], None]) -> dict[str, list[Pace]]:
    """Every candidate once a repeat. Raises UserError for what cannot be asked of a run."""
    turns = list(candidates(settings, say))
    found: dict[str, list[Pace]] = {}
    for repeat in range(settings.repeats):
        for name, call in turns:
            pace = call()
            found.setdefault(name, []).append(pace)
            say(f"{name}, {repeat + 1} of {settings.repeats}: {pace.rate:.0f} images/s")
    return found
