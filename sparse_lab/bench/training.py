"""Training steps, dense and sparse, as a run does them: forward, backward, optimizer, masks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_lab.bench.cells import DENSE, IMAGE_SIZE, SPARSE, TRAINING, Cell, Entry, Facts, Settings, Unavailable
from sparse_lab.bench.patterns import SEED, Pattern, Patterns, build
from sparse_lab.bench.roofline import training_work
from sparse_lab.config import RecipeConfig
from sparse_lab.sparse_cpu.engine import SparseArithmetic
from sparse_lab.sparse_cpu.optimizer import LiveOptimizer
from sparse_lab.sparse_cpu.timers import recording, timed
from sparse_lab.sparsity.connectivity import connectivity
from sparse_lab.sparsity.masks import Masks
from sparse_lab.training.optimizers import make_optimizer

CLASSES = 10
RATE = 1e-3  # small enough that no network diverges while it is timed
PROFILED = 3  # steps
REST = "outside the kernels"


def batch_of(images: int) -> tuple[Tensor, Tensor]:
    """Random images (N, 3, 32, 32) and labels (N)."""
    generator = torch.Generator().manual_seed(SEED)
    return (
        torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        torch.randint(0, CLASSES, (images,), generator=generator),
    )


class DenseStep:
    """Masked dense arithmetic by torch, as every method trains without sparse arithmetic. forward: the network, or
    what torch.compile made of it.
    """

    def __init__(
        self,
        model: nn.Module,
        images: int,
        forward: Callable[[Tensor], Tensor] | None = None,
        bfloat16: bool = False,
        optimizer: str = "sgd",
    ) -> None:
        self.masks = Masks(model)
        self.optimizer = make_optimizer(model.parameters(), RecipeConfig(optimizer=optimizer, lr=RATE))
        self._forward = model if forward is None else forward
        self._bfloat16 = bfloat16
        self._batch = batch_of(images)

    def __call__(self) -> None:
        images, labels = self._batch
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16):
            loss = functional.cross_entropy(self._forward(images), labels)
        loss.backward()
        self.optimizer.step()
        self.masks.enforce(self.optimizer)


class SparseStep:
    """Sparse arithmetic on one network, whose masks can be replaced: memory is that of one network alone."""

    def __init__(self, model: nn.Module, images: int, storage: str = "float32") -> None:
        self.model = model
        self.storage = storage
        self.masks = Masks(model)
        self._start: dict[str, Tensor] = {}
        self.arithmetic = SparseArithmetic(model, storage=storage)
        recipe = RecipeConfig(optimizer="sgd", lr=RATE)
        self.optimizer = LiveOptimizer(make_optimizer(model.parameters(), recipe), self.arithmetic.live)
        self._batch = batch_of(images)

    def install(self, pattern: Pattern) -> None:
        """Start again from the first weights, under these masks."""
        if not self._start:
            self._start = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self._start)
        self.optimizer.state.clear()
        self.masks.set(pattern, self.optimizer)

    def __call__(self) -> None:
        images, labels = self._batch
        self.optimizer.zero_grad()
        functional.cross_entropy(self.arithmetic(images), labels).backward()
        with timed("optimizer"):
            self.optimizer.step()
            self.masks.enforce(self.optimizer, but=self.optimizer.stepped)

    def shares(self) -> dict[str, float]:
        """Of a step's time, by kind of kernel."""
        with recording() as seconds:
            start = time.perf_counter()
            for _ in range(PROFILED):
                self()
            whole = time.perf_counter() - start
        found = {kind: part / whole for kind, part in sorted(seconds.items(), key=lambda item: -item[1])}
        return {**found, REST: max(0.0, 1.0 - sum(found.values()))}


def entries(model: str, settings: Settings, patterns: Patterns) -> Iterator[Entry]:
    """Dense and sparse steps of one network; what says most comes first."""
    dense = build(model, settings.width)
    sparse = SparseStep(build(model, settings.width), settings.batch, settings.storage)
    yield dense_entry(model, dense, settings.batch)
    for number, mask in enumerate(settings.masks):
        for sparsity in reversed(settings.sparsities):
            yield _sparse_entry(Cell(model, TRAINING, settings.batch, SPARSE, mask, sparsity), sparse, patterns)
        if number == 0 and "bf16" in settings.against:
            yield bfloat16_entry(model, dense, settings.batch)
    if "compile" in settings.against:
        cell = Cell(model, TRAINING, settings.batch, "compile")
        yield Entry(cell, cache(lambda: _compiled_step(dense, settings.batch)))


def dense_entry(model: str, network: nn.Module, images: int) -> Entry:
    return Entry(Cell(model, TRAINING, images, DENSE), cache(lambda: DenseStep(network, images)))


def bfloat16_entry(model: str, network: nn.Module, images: int) -> Entry:
    return Entry(Cell(model, TRAINING, images, "bf16"), cache(lambda: DenseStep(network, images, bfloat16=True)))


def _sparse_entry(cell: Cell, step: SparseStep, patterns: Patterns) -> Entry:
    def ready() -> SparseStep:
        step.install(patterns(cell.mask, cell.sparsity))
        return step

    def facts(known: Facts) -> None:
        known.kept, known.weights = step.masks.kept(), step.masks.total()
        known.connected = connectivity(step.model, IMAGE_SIZE).connected
        known.shares = step.shares()
        work = training_work(step.model, IMAGE_SIZE, cell.batch, step.storage)
        known.macs, known.bytes = work.macs, work.bytes

    return Entry(cell, ready, cold=True, facts=facts)


def _compiled_step(network: nn.Module, images: int) -> DenseStep:
    step = DenseStep(network, images, forward=compiled(network))
    try_out(step)
    return step


def compiled(network: nn.Module) -> Any:
    return torch.compile(network, dynamic=False)


def try_out(call: Callable[[], object]) -> None:
    """The first call of what torch compiles. Raises Unavailable where that fails."""
    try:
        call()
    except Exception as error:  # the compiler's own, or whatever stands behind it: no C++ compiler, no headers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Unavailable(f"torch.compile does not work here: {reason[:160]}") from None
