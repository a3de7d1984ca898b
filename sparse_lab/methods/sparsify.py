"""The library's door: a method of the command on anybody's network, in anybody's loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_lab.config import Config, MethodConfig, SparsityConfig
from sparse_lab.errors import SparseLabError, UserError
from sparse_lab.methods import table
from sparse_lab.methods.batches import GivenBatches, Source
from sparse_lab.methods.handle import (
    Handle,
    check_sparsity,
    check_whole,
    handle_of,
    looks_at_data,
    steps_an_epoch,
)
from sparse_lab.methods.keywords import in_keywords
from sparse_lab.methods.networks import Structure
from sparse_lab.methods.plain import plain
from sparse_lab.methods.read import read
from sparse_lab.methods.schedules import kind_of
from sparse_lab.sparsity.choose import choose
from sparse_lab.sparsity.images import hollow
from sparse_lab.sparsity.masks import check_built, check_maskable

LARGEST_SEED = 2**40
Pattern = str | type[nn.Module]


@dataclass(frozen=True)
class Given:
    """What `sparsify` is told beside the method, its sparsity and settings; see there."""

    epochs: int | None = None
    batches: Source | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    input_shape: tuple[int, ...] | None = None
    include: Pattern | Sequence[Pattern] = ()
    exclude: Pattern | Sequence[Pattern] = ()
    layers: Mapping[str, float] | None = None
    seed: int = 0


def sparsify(
    model: nn.Module,
    method: str | None = None,
    sparsity: float | None = None,
    *,
    total_steps: int | None = None,
    epochs: int | None = None,
    batches: Source | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    input_shape: tuple[int, ...] | None = None,
    include: Pattern | Sequence[Pattern] = (),
    exclude: Pattern | Sequence[Pattern] = (),
    layers: Mapping[str, float] | None = None,
    seed: int = 0,
    **settings: Any,
) -> Handle:
    """Give `model` masks, and return the handle that lets `method` change them while it trains.

    Surgery happens here (DyReLU, weight sharing, DCT), so make the optimizer afterwards, of `model.parameters()`; then
    `handle.attach(optimizer)`, and the loop stays as it is.

    method: a choice of conf/method, as in the command; None: masks change by `handle.prune` and `handle.regrow` alone.
    sparsity: share of the counted weights (conv and linear) that are zero at the end, in (0, 1). total_steps: optimizer
    steps of the whole training. epochs: how many epochs these are, for what counts epochs. batches: of (inputs,
    targets), for scores that look at data: a loader, a list, or a function that makes one. loss: of (outputs, targets),
    a scalar; cross-entropy where it is not given. input_shape: of one input, without the batch, for what sends one
    through the network (DyReLU, SynFlow, FLOPs). include: the only layers that are counted; exclude: those that are
    not, and stay dense; one or several, each by name, glob (`layer4.*`) or type. layers: layer or glob -> a sparsity of
    its own, which the others make good. seed: of what is left to chance.
    settings: any setting of the method by its name, as in `update_every=50`; of a part or a schedule as a dict, as in
    `prune=dict(score="snip")`, None to leave one out; `schedule="cubic"` chooses another schedule.

    Raises UserError (one line that says what to do) for unknown names, values out of range, what does not fit the
    network or needs several trainings, and SparseLabError for a network without conv or linear weights, and one that is
    sparsified already. Then the network is as it was. Warns of what is large and not counted, and of what the training
    is too short for.
    """
    given = Given(epochs, batches, loss, input_shape, include, exclude, layers, seed)
    if not isinstance(model, nn.Module):
        what = model.__name__ if isinstance(model, type) else type(model).__name__
        raise UserError(f"model: a network (an instance of nn.Module), not {what}")
    config = configured(method, sparsity, given, settings)
    if total_steps is not None:
        total_steps = check_whole("total_steps", total_steps)
        steps_an_epoch(config, total_steps, epochs)
    if batches is None and looks_at_data(config):
        raise UserError(f"method {method!r} scores weights by data: give batches=, a loader of (inputs, targets)")
    handle = prepare(model, config, given)
    if total_steps is not None:
        handle.plan(total_steps, epochs)
    elif handle.changes_at_once:
        handle.plan_at_once()
    return handle


def prepare(model: nn.Module, config: Config, given: Given) -> Handle:
    """As `sparsify`, where the length of the training is still to come: `Handle.plan` takes it."""
    network = plain(model)
    if handle_of(network) is not None:
        raise SparseLabError(f"this {type(network).__name__} is sparsified already: handle.remove_masks() first")
    images = GivenBatches(given.batches)
    shape = given.input_shape if given.input_shape is not None else images.shape()
    with _in_words_of_the_library():
        structure = _checked(network, config, given, shape)
        _choose(network, config, given)
        table.alter(network, config, structure)
        return Handle(network, config, structure, images, given.loss or functional.cross_entropy, shape)


def configured(method: str | None, sparsity: float | None, given: Given, settings: Mapping[str, Any]) -> Config:
    """Return the config that the command would have, as far as a training in somebody else's hands has one."""
    if method is None:
        if settings:
            raise UserError(f"{next(iter(settings))}= is a setting of a method: say method=NAME too")
        if given.layers and sparsity is None:
            raise UserError("layers= are sparsities of single layers beside the network's: give sparsity= too")
        if sparsity is not None and not given.layers:
            raise UserError("sparsity= is what a method prunes to: say method= too, or call handle.prune(sparsity)")
    config = Config(method=MethodConfig(name="masks")) if method is None else _read(method, settings)
    if config.method.prune is not None and sparsity is None:
        raise UserError(f"method {method!r} needs sparsity=, the share of weights that are pruned, as in 0.99")
    if sparsity is not None:
        sparsity = check_sparsity(sparsity)
    _check_given(given)
    with _in_words_of_the_library():
        _check_one_training(config)
    length = 1 if given.epochs is None else check_whole("epochs", given.epochs)
    recipes = {name: replace(getattr(config.training, name), epochs=length) for name in ("finetune", "regrow")}
    return replace(
        config,
        seed=int(given.seed),
        sparsity=SparsityConfig(target=sparsity or 0.0, layers=dict(given.layers or {})),
        training=replace(config.training, epochs=length, **recipes),
    )


def _read(method: str, settings: Mapping[str, Any]) -> Config:
    with _in_words_of_the_library():
        return read(method, settings)


def _check_given(given: Given) -> None:
    """Raise UserError for what is of another kind than `sparsify` says."""
    if abs(check_whole("seed", given.seed, least=-LARGEST_SEED)) > LARGEST_SEED:
        raise UserError(f"seed={given.seed}: at most {LARGEST_SEED}")
    if given.loss is not None and (isinstance(given.loss, type) or not callable(given.loss)):
        raise UserError(f"loss={given.loss!r}: a function of (outputs, targets), or an instance of a loss module")
    shape = given.input_shape
    if shape is not None and not (isinstance(shape, (tuple, list)) and all(isinstance(one, Integral) for one in shape)):
        raise UserError(f"input_shape={shape!r}: of one input, without the batch, as in (3, 32, 32)")
    layers = given.layers
    if layers is not None and not isinstance(layers, Mapping):
        raise UserError(f"layers={layers!r}: a dict of a layer's name and its sparsity, as in {{'head': 0.5}}")
    for name, sparsity in (layers or {}).items():
        if not isinstance(name, str) or isinstance(sparsity, bool) or not isinstance(sparsity, Real):
            raise UserError(
                f"layers={{{name!r}: {sparsity!r}}}: a layer's name and its sparsity, as in {{'head': 0.5}}"
            )


def _check_one_training(config: Config) -> None:
    """Raise UserError for a method that trains in phases."""
    method, name = config.method, config.method.name
    why = None
    if method.regrow is not None:
        why = "prunes one training and regrows in another"
    elif method.prune is not None and kind_of(config.schedule).in_rounds:
        why = "prunes in rounds, each with a training of its own"
    elif method.prune is not None and (method.prune.rewind_weights is not None or method.prune.rewind_lr):
        why = "goes back to an earlier training"
    elif method.compactors is not None:
        why = "trains its compactors by an optimizer of their own"
    if why is not None:
        raise UserError(
            f"method {name!r} {why}: use the command (sparse-lab method={name}), or handle.prune(...) and "
            "handle.regrow(...) between trainings of your own"
        )


def _checked(network: nn.Module, config: Config, given: Given, shape: tuple[int, ...] | None) -> Structure:
    """The structure of the network, on which all that can go wrong has been tried; the network itself is untouched."""
    check_built(network)
    if not given.include and not given.exclude:
        check_maskable(network)
    empty = hollow(network)
    _choose(empty, config, given)
    check_maskable(empty)
    structure = Structure(type(network).__name__, empty, shape)
    structure.check_maskable()
    if table.present(config.method):
        table.check_together(config, structure)
        with torch.device("meta"):
            table.alter(copy.deepcopy(empty), config, structure)
        table.check(config, structure)
    return structure


def _choose(network: nn.Module, config: Config, given: Given) -> None:
    """Mark which layers are counted, and which have a sparsity of their own."""
    include, exclude = _patterns("include", given.include), _patterns("exclude", given.exclude)
    choose(network, include, exclude, given.layers, config.sparsity.target)


def _patterns(word: str, patterns: Any) -> list[str]:
    """Names, globs and names of types, of one or several."""
    several = [patterns] if isinstance(patterns, (str, type)) else patterns or ()
    for one in several:
        if not isinstance(one, str) and not (isinstance(one, type) and issubclass(one, nn.Module)):
            kind = type(one).__name__
            raise UserError(f"{word}: names, globs or types of layers, as in ['head', nn.Linear], not a {kind}")
    return [one if isinstance(one, str) else one.__name__ for one in several]


@contextmanager
def _in_words_of_the_library() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(in_keywords(str(error))) from None
