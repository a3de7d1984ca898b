"""A network whose masks are in a user's hands: what `sparse_lab.sparsify` returns."""

from __future__ import annotations

import copy
import dataclasses
import warnings
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Integral, Real
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from sparse_lab.algorithms import unattached
from sparse_lab.algorithms.base import Algorithm, StepHooks
from sparse_lab.algorithms.enforce import EnforceMasks
from sparse_lab.algorithms.prune import Prune
from sparse_lab.algorithms.regrow import Regrow
from sparse_lab.algorithms.selectors import WeightSelector
from sparse_lab.config import Config, PruneConfig, RegrowConfig
from sparse_lab.errors import SparseLabError, UserError
from sparse_lab.methods import table
from sparse_lab.methods.base import WITHOUT_DATA, Site
from sparse_lab.methods.batches import GivenBatches, Source
from sparse_lab.methods.keywords import in_keywords
from sparse_lab.methods.networks import Structure, known_shape
from sparse_lab.methods.optimizers import check_frozen, check_moved, inner_of, parameters_of
from sparse_lab.methods.plain import plain
from sparse_lab.methods.recipes import clock_of
from sparse_lab.models import offsets
from sparse_lab.models.surgery import rebuild_structure
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.masks import Masks
from sparse_lab.sparsity.optimizer_state import remove_params
from sparse_lab.sparsity.schedules import OneShot
from sparse_lab.sparsity.scores import SCORES, Probe
from sparse_lab.sparsity.structured.filter_scores import FILTER_SCORES
from sparse_lab.sparsity.summary import Summary, summary

AT_ONCE = {"prune", "sharing", "dct"}
_handles: WeakKeyDictionary[nn.Module, weakref.ref[Handle]] = WeakKeyDictionary()


def handle_of(network: nn.Module) -> Handle | None:
    """Return the handle that has this network's masks; None where there is none."""
    known = _handles.get(network)
    return None if known is None else known()


class Handle:
    """The masks of one network and what changes them while it trains, see `sparse_lab.sparsify`.

    network: the plain module (of a compiled or DDP one the one inside). masks: its masks. method: by name, None where
    the masks change by `prune` and `regrow` alone. total_steps: optimizer steps of the training; None until `plan`.
    """

    def __init__(
        self,
        network: nn.Module,
        config: Config,
        structure: Structure,
        images: GivenBatches,
        loss: Callable[[Any, Any], Tensor],
        shape: tuple[int, ...] | None,
    ) -> None:
        self.network = network
        self.method = config.method.name if table.present(config.method) else None
        self.masks = Masks.of(network)
        self.total_steps: int | None = None
        self.algorithms: list[Algorithm] = []
        self._config, self._structure = config, structure
        self._images, self._loss, self._shape = images, loss, shape
        self._given_shape = shape is not None
        self._optimizer: Optimizer | None = None
        self._dense: nn.Module | None = None
        self._gone: list[nn.Parameter] = []  # of DyReLUs, which no optimizer needs any more
        _handles[network] = weakref.ref(self)
        unattached.watch(network, self.masks.weights().values())
        self._noting = network.register_forward_pre_hook(_note_shape)
        self._hooks = [network.register_load_state_dict_pre_hook(_follow), self._noting]

    @property
    def sparsity(self) -> float:
        """1 - kept / total, now."""
        self._check_masks()
        return self.masks.sparsity()

    @property
    def changes_at_once(self) -> bool:
        """Does all that the method changes change before the first step, however long the training is?"""
        parts = {one.part for one in table.present(self._config.method)}
        return parts <= AT_ONCE and (not parts or self._config.schedule.name in ("one_shot", "constant"))

    def take_batches_of(self, source: Source) -> None:
        """Look at these batches from now on, where `sparsify` was given none."""
        if self._images.source is None:
            self._images.source = source

    def plan_at_once(self) -> None:
        """Instead of `plan`, where `changes_at_once`."""
        self._build(Clock(1, 1, 1))

    def plan(self, total_steps: int, epochs: int | None = None) -> None:
        """Say how long the training is, in optimizer steps, and in epochs where something counts them.

        Warns of what the method asks for and the training is too short for. Raises UserError where lengths do not go
        together.
        """
        if self._optimizer is not None:
            raise SparseLabError("attached already, and under way: handle.detach() before another plan(total_steps)")
        total_steps = check_whole("total_steps", total_steps)
        steps = steps_an_epoch(self._config, total_steps, None if epochs is None else check_whole("epochs", epochs))
        clock = clock_of(self._config, steps)
        self.total_steps = total_steps
        self._build(clock)
        for line in table.idle(self._config, clock):
            warnings.warn(in_keywords(line), stacklevel=3)

    def _build(self, clock: Clock) -> None:
        self.algorithms = [EnforceMasks(self.masks), *table.build(self._site(clock))]
        for one in self.algorithms:
            one.ends_epoch_every = clock.steps_an_epoch

    def attach(self, optimizer: Optimizer) -> None:
        """Hang on `optimizer`: from now on masks hold after each of its steps, and change as the method says.

        Raises SparseLabError where it hangs on one already, or this optimizer does not move the network's weights, not
        all that must move, or calls its closure several times a step (LBFGS); UserError before `plan`.
        """
        optimizer = inner_of(optimizer)
        self._prepare(optimizer)
        if any(getattr(one, "gradients", "") == "before_clipping" for one in self.algorithms):
            raise UserError(
                "gradients='before_clipping': a loop of one's own does not say when it clips; after_clipping"
            )
        self._attach(optimizer, None)
        StepHooks.of(optimizer).begin_each_step(optimizer)

    def attach_to_one_of(self, optimizers: list[Optimizer], broadcast: Callable[[Any], Any]) -> Optimizer:
        """Hang on the one of these that moves the weights, in a loop that says itself when a step begins and an epoch
        ends, and return it.
        """
        moving = self._that_moves(optimizers)
        self._prepare(moving)
        for one in self.algorithms:
            one.ends_epoch_every = None
        self._attach(moving, broadcast)
        return moving

    def detach(self) -> None:
        """Leave the optimizer alone; nothing happens where it hangs on none. Masks stay as they are, and if the network
        trains on, it trains dense: a warning says so at the next step.
        """
        if self._optimizer is None:
            return
        for one in self.algorithms:
            one.detach()
        self._optimizer = None
        unattached.watch(self.network, self.masks.weights().values(), detached=True)

    def prune(
        self,
        sparsity: float,
        *,
        score: str = "lamp",
        distribution: str = "global",
        iterations: int = 1,
        batches: Source | None = None,
        keep_dense: bool = True,
    ) -> None:
        """Prune to `sparsity` now, in a share of all counted weights; what is pruned already stays pruned.

        score, distribution: names, as method.prune's in the command. iterations: so many steps of equal ratio, each by
        new scores. batches: of (inputs, targets), for scores that look at data. keep_dense: at the first pruning keep a
        copy of the network as it is, which `regrow` looks at; it is a part of `state_dict`.

        Raises UserError for a sparsity outside (0, 1), SparseLabError where it is lower than now or empties a layer.
        """
        sparsity = check_sparsity(sparsity)
        iterations = check_whole("iterations", iterations)
        self._check_masks()
        if keep_dense and self._dense is None and self.masks.kept() == self.masks.unique():
            self._dense = _without_masks(self.network)
        images = self._images if batches is None else GivenBatches(batches)
        count = PruneConfig().batches
        selector = WeightSelector(
            self.masks, score, distribution, batches=partial(images.fixed, count), probe=self._probe_of(images)
        )
        step = Prune(self.network, selector, OneShot(sparsity), iterations=iterations, seed=self._config.seed)
        step.step = self.step
        step.to(sparsity, self._optimizer)

    def regrow(
        self,
        sparsity: float,
        *,
        score: str = "taylor",
        score_on: str = "dense",
        distribution: str | list[str] = "all",
        ssim_layers: int = 4,
        value: str = "zero",
        dense: nn.Module | None = None,
        batches: Source | None = None,
    ) -> None:
        """Bring pruned weights back now, down to `sparsity` (arXiv 2511.11675); what is alive stays.

        score: of pruned weights, the highest come first; score_on: 'dense', the trained dense network, or 'sparse'.
        distribution: 'all' layers in proportion to what they lost, 'ssim' (the `ssim_layers` whose attention maps
        changed most), or layers by name. value: what a regrown weight starts from: 'zero', 'dense' or 'kaiming'. dense:
        the trained dense network; None: the copy that `prune` kept. batches: of (inputs, targets).

        Raises UserError for a sparsity outside (0, 1), SparseLabError where it is higher than now.
        """
        sparsity = check_sparsity(sparsity)
        self._check_masks()
        images = self._images if batches is None else GivenBatches(batches)
        dense = self._dense if dense is None else dense
        if dense is None:
            raise SparseLabError(
                "regrowth looks at the trained dense network: give dense=, or prune with keep_dense=True first"
            )
        step = Regrow(
            self.network,
            self.masks,
            OneShot(sparsity),
            copy.deepcopy(dense).to(next(self.network.parameters()).device),
            score=score,
            score_on=score_on,
            distribution=distribution,
            ssim_layers=ssim_layers,
            value=value,
            batches=partial(images.fixed, RegrowConfig().batches),
            probe=self._probe_of(images),
            seed=self._config.seed,
        )
        step.step = self.step
        step.to(sparsity)

    @property
    def step(self) -> int:
        """Optimizer steps that really happened since the training began."""
        return self.algorithms[0].step if self.algorithms else 0

    def summary(self) -> Summary:
        """Return what the network keeps, layer by layer; print() shows a table."""
        self._check_masks()
        try:
            return summary(self.network, self.masks, self._input_shape(self._images))
        except SparseLabError:
            if self._given_shape:
                raise
            # what came first says nothing of networks that take two inputs, or tokens
            return summary(self.network, self.masks, None)

    def remove_masks(self) -> None:
        """Take the masks off for good: what is pruned is zero, the network is a plain one, and trains dense."""
        self._check_masks()
        self.masks.enforce(self._optimizer)
        self.detach()
        for hook in self._hooks:
            hook.remove()
        offsets.fold(self.network)
        self.masks.remove()
        unattached.forget(self.network)
        _handles.pop(self.network, None)

    def _check_masks(self) -> None:
        if handle_of(self.network) is not self:
            raise SparseLabError("the masks were removed: sparsify the network again")

    def state_dict(self) -> dict[str, Any]:
        """Return what a training that goes on needs beside the network's and the optimizer's own states: plain values
        and tensors.
        """
        return {
            "method": self.method,
            "asked": self.asked(),
            "algorithms": [one.state_dict() for one in self.algorithms],
            "dense": None if self._dense is None else dict(self._dense.state_dict()),
        }

    def asked(self) -> dict[str, Any]:
        """Return what was asked for: plain values by setting."""
        config = self._config
        plain = {group: dataclasses.asdict(getattr(config, group)) for group in ("sparsity", "method", "schedule")}
        for entry in dataclasses.fields(config.method):
            if not entry.metadata.get("identity", True):  # words about it
                del plain["method"][entry.name]
        return {**plain, "seed": config.seed, "total_steps": self.total_steps}

    def check_asked(self, other: Mapping[str, Any]) -> None:
        """Raise SparseLabError where a state is of another request than this. Of another length of the training it may
        be: then the schedules are those of the new one, and a warning says so.
        """
        mine = self.asked()
        for group, values in mine.items():
            if group != "total_steps" and other.get(group) != values:
                raise SparseLabError(f"this state is of other settings ({_differing(group, values, other.get(group))})")
        if other.get("total_steps") != mine["total_steps"]:
            warnings.warn(
                f"this state is of a training of total_steps={other.get('total_steps')}, and this one has "
                f"{mine['total_steps']}: schedules go on as this one's",
                stacklevel=3,
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Call it last: after `attach`, and after the network's and the optimizer's states are
        loaded. Raises SparseLabError for another method's.
        """
        if not isinstance(state, Mapping) or not {"method", "asked", "algorithms", "dense"} <= state.keys():
            raise SparseLabError("this is no state of a handle: give what handle.state_dict() returned")
        if state["method"] != self.method or len(state["algorithms"]) != len(self.algorithms):
            raise SparseLabError(f"this state is of method {state['method']!r}, and here it is {self.method!r}")
        self.check_asked(state["asked"])
        for one, own in zip(self.algorithms, state["algorithms"], strict=True):
            one.load_state_dict(own)
        if state["dense"] is not None:
            self._dense = _without_masks(self.network)
            self._dense.load_state_dict(state["dense"])
        self.masks.refresh()

    def copy_masks_to(self, other: nn.Module) -> None:
        """Give another network with the same layers these masks, an average of this one's weights (EMA) above all: what
        they prune becomes zero there. Raise SparseLabError where its layers are others.
        """
        self.masks.copy_to(plain(other))

    def _site(self, clock: Clock) -> Site:
        config = self._config
        return Site(
            config,
            self._structure,
            self._images,
            self._probe_of(self._images),
            self.network,
            self.masks,
            clock,
            table.sparsity(config, clock),
            table.begins(config, clock),
            network=_no_network,
            rewind=None,
            changed=lambda change, asked: None,
            say=lambda line: None,
            removed=lambda: None,
        )

    def _probe_of(self, images: GivenBatches) -> Probe:
        return Probe(lambda: known_shape(self._input_shape(images), self._structure.name), self._loss)

    def _input_shape(self, images: GivenBatches) -> tuple[int, ...] | None:
        return self._shape if self._shape is not None else images.shape() or self._images.shape()

    def _attach(self, optimizer: Optimizer, broadcast: Callable[[Any], Any] | None) -> None:
        for one in self.algorithms:
            one.owner = self  # also where a user has not kept the handle
            one.attach(optimizer, broadcast)
        self._optimizer = optimizer
        unattached.watch(self.network, self.masks.weights().values(), optimizer)

    def _prepare(self, optimizer: Optimizer) -> None:
        self._check_masks()
        if self._optimizer is not None:
            raise SparseLabError("attached already: handle.detach() first")
        if isinstance(optimizer, LBFGS):
            raise SparseLabError("LBFGS runs its closure several times a step and goes back between: use SGD or Adam")
        if not self.algorithms:
            raise UserError(
                f"how long is the training? sparsify(..., method={self.method!r}, total_steps=len(loader) * epochs)"
            )
        remove_params(optimizer, self._gone)
        check_moved(self.network, self.masks, parameters_of(optimizer))
        if any(one.explores for one in table.present(self._config.method)):
            check_frozen(self.masks, str(self.method))

    def _that_moves(self, optimizers: list[Optimizer]) -> Optimizer:
        weights = {id(weight) for weight in self.masks.weights().values()}
        moving = [one for one in optimizers if len(optimizers) == 1 or not weights.isdisjoint(parameters_of(one))]
        if len(moving) != 1:
            raise SparseLabError(
                f"{len(moving)} optimizers move the weights that have masks: let one optimizer move them all, or "
                "leave the others out with exclude="
            )
        return moving[0]

    def note_shape(self, shape: tuple[int, ...]) -> None:
        """Take it for that of an input, unless it was given."""
        if self._shape is None:
            self._shape = shape
        self._noting.remove()

    def rebuild(self, names: list[str]) -> None:
        """The network is about to get a state with these names: its structure becomes what it was then."""
        before = {id(one): one for one in self.network.parameters()}
        rebuild_structure(self.network, names)
        left = {id(one) for one in self.network.parameters()}
        gone = [one for number, one in before.items() if number not in left]
        self._gone += gone
        if self._optimizer is not None:
            remove_params(self._optimizer, gone)


def _differing(group: str, here: Any, there: Any) -> str:
    """The first value in which two requests differ, in words."""
    if isinstance(here, Mapping) and isinstance(there, Mapping):
        name = next(name for name in here if here[name] != there.get(name))
        return _differing(f"{group}.{name}", here[name], there.get(name))
    return in_keywords(f"{group}={there}, here {here}")


def check_sparsity(sparsity: Any) -> float:
    """Return it as a float. Raise UserError for what is no share of the weights."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real) or not 0.0 < float(sparsity) < 1.0:
        raise UserError(f"sparsity={sparsity!r} is outside (0, 1): the share of weights that are pruned, as in 0.99")
    return float(sparsity)


def check_whole(name: str, value: Any, least: int = 1) -> int:
    """Return it as an int. Raise UserError for what is no whole number, or too small."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise UserError(f"{name}={value!r}: a whole number" + (" above 0" if least == 1 else ""))
    return int(value)


def looks_at_data(config: Config) -> bool:
    """Does a score of the method run the network over batches?"""
    score = None if config.method.prune is None else config.method.prune.score
    return score not in WITHOUT_DATA and (score in SCORES or score in FILTER_SCORES)  # an unknown one is told of later


def steps_an_epoch(config: Config, total_steps: int, epochs: int | None) -> int:
    """Return how many steps an epoch has. Raise UserError where lengths do not go together, or one is missing."""
    if epochs is None:
        counting = [one.part for one in table.present(config.method) if _counts_epochs(config, one.part)]
        if counting or config.schedule.soft is not None:
            what = f"method {config.method.name!r} counts epochs" + (f" ({counting[0]})" if counting else "")
            raise UserError(f"{what}: give epochs= beside total_steps=")
        return total_steps
    if total_steps % check_whole("epochs", epochs):
        raise UserError(f"epochs={epochs!r}: total_steps={total_steps} must be so many epochs of equal length")
    return total_steps // epochs


def _counts_epochs(config: Config, part: str) -> bool:
    return getattr(getattr(config.method, part), "unit", "") == "epochs"


def _no_network(name: str) -> nn.Module:
    raise UserError(f"this needs the {name} network of another training: use handle.prune and handle.regrow")


def _without_masks(network: nn.Module) -> nn.Module:
    """A copy of a network as it is now, whose layers are not sparsified."""
    dense = copy.deepcopy(network)
    for module in dense.modules():
        module._buffers.pop("mask", None)
    return dense.requires_grad_(True)


def _follow(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """A state dict from before or after a surgery (DyReLU gone) brings the network to that stage as it is loaded."""
    handle = handle_of(module)
    if handle is not None:
        handle.rebuild([name.removeprefix(prefix) for name in state])


def _note_shape(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """The first input says what shape one has."""
    if torch.compiler.is_compiling():
        return
    handle = handle_of(module)
    if handle is not None and inputs and isinstance(inputs[0], Tensor):
        handle.note_shape(tuple(inputs[0].shape[1:]))
