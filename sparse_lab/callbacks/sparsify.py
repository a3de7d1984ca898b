"""Algorithms in a Lightning fit: in the runner's, and in anybody's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_lab.algorithms.base import Algorithm, StepHooks
from sparse_lab.algorithms.cyclic import CyclicSparsity
from sparse_lab.algorithms.drop_and_grow import DropAndGrow
from sparse_lab.algorithms.dyrelu_phasing import DyReLUPhasing
from sparse_lab.algorithms.prune import Prune
from sparse_lab.algorithms.regrow import Regrow
from sparse_lab.algorithms.selectors import WeightSelector
from sparse_lab.errors import SparseLabError
from sparse_lab.methods.handle import Handle
from sparse_lab.methods.plain import plain
from sparse_lab.methods.sparsify import Given, configured, prepare
from sparse_lab.sparsity.masks import Masks
from sparse_lab.sparsity.schedules import Constant, Cyclic, DropFraction, OneShot, Schedule
from sparse_lab.sparsity.scores import Batches


class Sparsify(pl.Callback):
    """Sparsify a LightningModule while it is fitted: `Trainer(callbacks=[Sparsify(method="rigl", sparsity=0.99)])`.

    method, sparsity, settings: as `sparse_lab.sparsify` takes them. Surgery happens before the module configures its
    optimizers; how long the training is says the Trainer; batches for scores are those of its training loader, unless
    `batches` are given; the state goes into its checkpoints, from which a fit that was stopped goes on to the same
    bits (CPU). Where the callback stands among others has no say in what happens to the masks. `handle` is what
    `sparsify` returns, from `setup` on.

    algorithms: instead of a method, ready algorithms; a subclass makes its own of the module, see `make`.

    Raises SparseLabError at the start of a fit where several optimizers move the weights, or nothing can be counted.
    """

    def __init__(
        self, *algorithms: Algorithm, method: str | None = None, sparsity: float | None = None, **settings: Any
    ) -> None:
        self._makes = type(self).make is not Sparsify.make
        _check_asked(algorithms, method, {"sparsity": sparsity, **settings}, self._makes)
        self.algorithms = list(algorithms)
        own = {entry.name for entry in fields(Given)}
        self._method, self._sparsity = method, sparsity
        self._given = Given(**{name: value for name, value in settings.items() if name in own})
        self._settings = {name: value for name, value in settings.items() if name not in own}
        self.handle: Handle | None = None
        self._state: list[dict[str, Any]] | None = None
        self._asked: dict[str, Any] | None = None
        self._optimizer: Optimizer | None = None
        named = [] if method is None else [method]
        self._state_key = " ".join([*(type(one).__qualname__ for one in (self, *algorithms)), *named])

    @property
    def state_key(self) -> str:
        """Where a checkpoint keeps the state; several with other algorithms stand beside each other."""
        return self._state_key

    def make(self, network: nn.Module, masks: Masks, total_steps: int) -> Sequence[Algorithm]:
        """Return what to attach to this network, which will train for so many steps."""
        return []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_strategy(trainer)
        check_averages(trainer, self)
        if self._makes:
            Masks.of(pl_module)  # before a checkpoint is read: it holds masks too
        elif self._method is not None and (self.handle is None or self.handle.network is not plain(pl_module)):
            self.algorithms, self.handle = [], None
            given = replace(self._given, input_shape=self._given.input_shape or _input_shape(pl_module))
            given = replace(given, epochs=given.epochs or _epochs(trainer))
            config = configured(self._method, self._sparsity, given, self._settings)
            self.handle = prepare(pl_module, config, given)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._makes:
            self.algorithms = list(self.make(pl_module, Masks.of(pl_module), _total_steps(trainer)))
        elif self.handle is not None:
            self._plan(self.handle, trainer)
        if self.handle is not None and self._asked is not None:
            self.handle.check_asked(self._asked)
        self._asked = None
        for one, state in zip(self.algorithms, self._state or (), strict=self._state is not None):
            one.load_state_dict(state)
        self._state = None
        if self.handle is not None:
            self._optimizer = self.handle.attach_to_one_of(list(trainer.optimizers), trainer.strategy.broadcast)
            return
        self._optimizer = _that_moves(self.algorithms, trainer.optimizers)
        for one in self.algorithms:
            one.attach(self._optimizer, trainer.strategy.broadcast)

    def _plan(self, handle: Handle, trainer: pl.Trainer) -> None:
        if self._state is None and handle.algorithms:  # fitted before: what it did then is not done again
            self._state = [one.state_dict() for one in handle.algorithms]
        handle.take_batches_of(lambda: trainer.train_dataloader)  # type: ignore[arg-type, return-value]
        if handle.changes_at_once:
            handle.plan_at_once()
        else:
            steps, epochs = _total_steps(trainer), self._given.epochs or _epochs(trainer)
            handle.plan(steps, epochs if epochs is not None and steps % epochs == 0 else None)
        self.algorithms = handle.algorithms

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert self._optimizer is not None
        StepHooks.of(self._optimizer).begin(self._optimizer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if optimizer is self._optimizer:
            StepHooks.of(optimizer).gradients_ready(optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_last_batch:
            assert self._optimizer is not None
            StepHooks.of(self._optimizer).end_epoch(self._optimizer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._optimizer is not None:
            for masks in {one.masks for one in self.algorithms if hasattr(one, "masks")}:
                masks.enforce()  # an average of the weights may have been put in their place at the end
        self._optimizer = None
        for one in self.algorithms:
            one.detach()
        if self.handle is not None:
            self.handle.detach()

    def state_dict(self) -> dict[str, Any]:
        asked = None if self.handle is None else self.handle.asked()
        return {"algorithms": [one.state_dict() for one in self.algorithms], "asked": asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state, self._asked = list(state["algorithms"]), state["asked"]


def check_strategy(trainer: pl.Trainer) -> None:
    """Raise SparseLabError where a strategy shares each weight out over processes."""
    name = type(trainer.strategy).__name__
    if any(word in name for word in ("FSDP", "DeepSpeed", "ModelParallel")):
        raise SparseLabError(f"{name} shares each weight out, and a mask would see a part of it: use strategy='ddp'")


def check_averages(trainer: pl.Trainer, sparsify: Sparsify) -> None:
    """Raise SparseLabError for an average of the weights that would be one of the masks too, or is made before there
    are masks.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    for average in callbacks:
        if not isinstance(average, WeightAveraging):
            continue
        name = type(average).__name__
        if callbacks.index(average) < callbacks.index(sparsify):
            raise SparseLabError(f"{name} copies the network before it has masks: put Sparsify before it in callbacks=")
        if average._use_buffers:
            raise SparseLabError(f"{name} would average the masks: give it use_buffers=False")


def _check_asked(algorithms: Sequence[Any], method: str | None, settings: dict[str, Any], makes: bool) -> None:
    given = [name for name, value in settings.items() if value is not None]
    if algorithms and (method is not None or given):
        raise SparseLabError("Sparsify takes algorithms, or method= with its settings, not both")
    other = [one for one in algorithms if not isinstance(one, Algorithm)]
    if other:
        raise SparseLabError(
            f"Sparsify({other[0]!r}): algorithms that are made, or keywords: Sparsify(method='rigl', sparsity=0.99)"
        )
    if not algorithms and method is None and not makes:
        raise SparseLabError("Sparsify would change nothing: say method=, as in Sparsify(method='rigl', sparsity=0.99)")
    if "total_steps" in settings:
        raise SparseLabError("Sparsify takes no total_steps=: the Trainer says how long the training is")


def _input_shape(module: pl.LightningModule) -> tuple[int, ...] | None:
    example = module.example_input_array
    return tuple(example.shape[1:]) if isinstance(example, Tensor) else None


def _epochs(trainer: pl.Trainer) -> int | None:
    return trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None


def _that_moves(algorithms: Sequence[Algorithm], optimizers: Sequence[Optimizer]) -> Optimizer:
    """The one optimizer that moves the weights of these algorithms' masks."""
    masks = [one.masks for one in algorithms if hasattr(one, "masks")]
    weights = {id(weight) for one in masks for weight in one.weights().values()}
    moving = [
        optimizer
        for optimizer in optimizers
        if len(optimizers) == 1
        or any(id(weight) in weights for group in optimizer.param_groups for weight in group["params"])
    ]
    if len(moving) != 1:
        raise SparseLabError(
            f"{len(moving)} optimizers move the weights that have masks: let one optimizer move them all"
        )
    return moving[0]


def _total_steps(trainer: pl.Trainer) -> int:
    steps = trainer.estimated_stepping_batches
    if not math.isfinite(steps) or steps < 0:
        raise SparseLabError("how long is the training? Give the Trainer max_epochs or max_steps")
    return int(steps)


class PruneCallback(Sparsify):
    """Prune to `sparsity`: in one shot before the first step, unless `schedule` says otherwise.

    score, distribution: names in sparsity/scores.py and sparsity/distributions.py. schedule: one of
    sparsity/schedules.py, in optimizer steps. batches: (images, labels), for scores that look at data. seed: of chance.
    """

    def __init__(
        self,
        sparsity: float,
        score: str = "magnitude",
        distribution: str = "global",
        *,
        schedule: Schedule | None = None,
        batches: Batches | Callable[[], Batches] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.schedule = OneShot(sparsity) if schedule is None else schedule
        self.score, self.distribution = score, distribution
        self.batches = batches
        self.seed = seed

    def make(self, network: nn.Module, masks: Masks, total_steps: int) -> Sequence[Algorithm]:
        selector = WeightSelector(masks, self.score, self.distribution, batches=self.batches)
        return [Prune(network, selector, self.schedule, total_steps=total_steps, seed=self.seed)]


class RegrowCallback(Sparsify):
    """Bring pruned weights back when `schedule` says so, down to its sparsities; see `algorithms.regrow.Regrow`.

    dense: the trained dense network, with the layers of the one that trains. options: the keywords of `Regrow`.
    """

    def __init__(self, schedule: Schedule, dense: nn.Module, **options: Any) -> None:
        super().__init__()
        self.schedule = schedule
        self.dense = dense
        self.options = options

    def make(self, network: nn.Module, masks: Masks, total_steps: int) -> Sequence[Algorithm]:
        return [Regrow(network, masks, self.schedule, self.dense, **self.options)]


class DropAndGrowCallback(Sparsify):
    """Train at `sparsity` from the first step: a random start, then every `update_every` steps each layer drops a
    falling fraction of its weights and grows as many (grow='random': SET, grow='gradient': RigL).

    distribution: of the start over layers. drop, grow: names of scores. end: the last update lies before this share of
    the training.
    """

    def __init__(
        self,
        sparsity: float,
        *,
        distribution: str = "erk",
        drop: str = "magnitude",
        grow: str = "gradient",
        drop_fraction: float = 0.3,
        update_every: int = 100,
        end: float = 0.75,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.target = sparsity
        self.distribution = distribution
        self.drop, self.grow = drop, grow
        self.drop_fraction = drop_fraction
        self.update_every = update_every
        self.end = end
        self.seed = seed

    def make(self, network: nn.Module, masks: Masks, total_steps: int) -> Sequence[Algorithm]:
        start = WeightSelector(masks, "random", self.distribution)
        updates = DropFraction(self.update_every, 0, max(1, round(self.end * total_steps)), self.drop_fraction)
        return [
            Prune(network, start, Constant(self.target), total_steps=total_steps, seed=self.seed),
            DropAndGrow(network, masks, total_steps, updates, drop=self.drop, grow=self.grow, seed=self.seed),
        ]


class CyclicSparsityCallback(Sparsify):
    """Let density rise to `multiplier` times the target's and fall back in cycles of these lengths (steps), from a
    random start at `sparsity` on; see `algorithms.cyclic.CyclicSparsity`.
    """

    def __init__(
        self,
        sparsity: float,
        lengths: Sequence[int],
        *,
        multiplier: float = 3.0,
        update_every: int = 100,
        shape: str = "cosine",
        distribution: str = "erk",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.schedule = Cyclic(sparsity, tuple(lengths), multiplier, update_every, shape)
        self.distribution = distribution
        self.seed = seed

    def make(self, network: nn.Module, masks: Masks, total_steps: int) -> Sequence[Algorithm]:
        start, distribution = Constant(self.schedule.target), self.distribution
        selector = WeightSelector(masks, "random", distribution)
        return [
            Prune(network, selector, start, total_steps=total_steps, seed=self.seed),
            CyclicSparsity(network, masks, total_steps, self.schedule, distribution=distribution, seed=self.seed),
        ]


class DyReLUPhasingCallback(Sparsify):
    """Fade the DyReLUs that `models.dyrelu.install` put into the network into ReLUs between two steps."""

    def __init__(self, begin: int, end: int) -> None:
        super().__init__()
        self.begin, self.end = begin, end

    def make(self, network: nn.Module, masks: Masks, total_steps: int) -> Sequence[Algorithm]:
        return [DyReLUPhasing(network, self.begin, self.end)]
