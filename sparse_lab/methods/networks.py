"""The networks of a run: plain, or hollow, to be asked for their structure."""

from __future__ import annotations

import copy
import warnings
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

from sparse_lab import models
from sparse_lab.config import Config
from sparse_lab.errors import SparseLabError, UserError
from sparse_lab.models import weight_sharing
from sparse_lab.models.pruned_state import MasksLeft
from sparse_lab.sparsity import masks
from sparse_lab.sparsity.choose import check_own, choose
from sparse_lab.sparsity.flops import derived_layers, layer_costs
from sparse_lab.sparsity.images import Shape, image_like, send
from sparse_lab.sparsity.scores import evaluating
from sparse_lab.sparsity.structured import channels


def build_model(config: Config) -> nn.Module:
    """The plain network of `config`, its layers chosen."""
    with warnings.catch_warnings():
        if config.model.keep_masks:
            warnings.simplefilter("ignore", MasksLeft)
        model = models.make(spec_of(config), config.model.weights)
    _choose(model, choice_of(config))
    return model


def spec_of(config: Config) -> models.Spec:
    """What `models.make` is told."""
    model, dataset = config.model, config.dataset
    return models.Spec(
        name=model.name,
        num_classes=dataset.classes,
        width=model.width,
        image_size=dataset.size,
        channels=dataset.shape[0],
        arch=model.arch,
        adapt_stem=model.adapt_stem,
        options=models.frozen(model.options),
    )


class Choice(NamedTuple):
    """What `choose` is told: which layers are counted, which have a sparsity of their own, and at which target."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: tuple[tuple[str, float], ...] = ()
    target: float = 0.0


def choice_of(config: Config) -> Choice:
    """What `config` says of that; nothing where nothing is pruned."""
    chosen = config.sparsity
    if config.method.prune is None:
        return Choice()
    layers = tuple(chosen.layers.items())
    return Choice(tuple(chosen.include), tuple(chosen.exclude), layers, chosen.target if layers else 0.0)


def _choose(model: nn.Module, choice: Choice) -> None:
    if choice == Choice():
        return
    try:
        choose(model, choice.include, choice.exclude, dict(choice.layers), choice.target)
    except SparseLabError as error:
        raise UserError(f"sparsity.{error}") from None


class Size(NamedTuple):
    """Counted weights before sharing, those that exist, and the layers that hold them."""

    total: int
    unique: int
    layers: int


class Structure:
    """What the parts of a method ask of the plain network that they are for, before any of them changes it.

    name: the network's, for messages. hollow: it on the device "meta", not the caller's to change. shape: of one input;
    None where nobody has said it, and then asking for it raises UserError.
    """

    def __init__(self, name: str, hollow: nn.Module, shape: Shape | None) -> None:
        self.name = name
        self.hollow = hollow
        self._shape = shape
        self._groups: dict[bool, list[channels.Group]] = {}

    def check_shape(self) -> None:
        """Raise UserError where nobody has said what an input looks like."""
        known_shape(self._shape, self.name)

    @property
    def shape(self) -> Shape:
        return known_shape(self._shape, self.name)

    @cached_property
    def weights(self) -> dict[str, torch.Size]:
        """The shape of every counted weight, by layer."""
        return {name: layer.weight.shape for name, layer in masks.layers(self.hollow).items()}

    @cached_property
    def costs(self) -> dict[str, int]:
        """Multiply-adds of one input, by layer."""
        return {cost.name: cost.macs for cost in layer_costs(self.hollow, self.shape)}

    @cached_property
    def read(self) -> int:
        """How many values of one image conv and linear layers read. A training step keeps them all for its gradients; 0
        where a network cannot be asked.
        """
        found: dict[int, torch.Tensor] = {}

        def keep(module: nn.Module, given: tuple[Any, ...]) -> None:
            found.update({id(one): one for one in given if isinstance(one, torch.Tensor)})

        layers = [layer for tied in masks.maskable(self.hollow).values() for layer in tied.layers]
        hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
        try:
            send(self.hollow, image_like(self.hollow, self.shape))
        except SparseLabError:  # it looks at values
            return 0
        finally:
            for hook in hooks:
                hook.remove()
        return sum(one.numel() for one in found.values())

    @cached_property
    def _derived(self) -> list[str]:
        """Layers on whose weights no mask would hold."""
        try:
            return [] if self._shape is None else derived_layers(self.hollow, self._shape)
        except SparseLabError:
            return []  # it looks at values, or reads something else than images

    def check_maskable(self) -> None:
        """Raise UserError where a counted layer computes what it multiplies by of its weight, on its way."""
        derived = [name for name in self._derived if name in self.weights]
        if derived:
            more = f" and {len(derived) - 1:,} more" if len(derived) > 1 else ""
            kinds = sorted({type(self.hollow.get_submodule(name)).__name__ for name in derived})
            raise UserError(
                f"the weight of {derived[0]!r}{more} in {self.name} is computed from others on its way (weight "
                f"standardisation, say), so no mask would hold on it: leave such layers out with "
                f"sparsity.exclude=[{','.join(kinds)}], or take another network"
            )

    def check_own(self, config: Config) -> None:
        """Raise UserError where layers with a sparsity of their own do not go with the target."""
        try:
            check_own(self._sharing if config.method.sharing is not None else self.hollow, config.sparsity.target)
        except SparseLabError as error:
            raise UserError(f"sparsity.{str(error).replace('target=', 'sparsity.target=')}") from None

    def size(self, config: Config) -> Size:
        """The size of the network that the method of `config` trains."""
        return self._shared if config.method.sharing is not None else _size(self.hollow)

    @cached_property
    def _sharing(self) -> nn.Module:
        shared = copy.deepcopy(self.hollow)
        weight_sharing.share(shared)
        return shared

    @cached_property
    def _shared(self) -> Size:
        return _size(self._sharing)

    def filter_groups(self, config: Config) -> list[channels.Group]:
        """The channels that can go. Raises UserError when there are none."""
        filters, method = config.method.filters, config.method.name
        assert filters is not None
        try:
            if filters.coupled not in self._groups:
                self._groups[filters.coupled] = channels.groups(self.hollow, self.shape, filters.coupled)
        except ValueError as error:
            raise UserError(
                f"method {method} prunes filters, and {self.name} has none that can go: {error}: "
                "use another model, or method.filters.coupled=true"
            ) from None
        found = self._groups[filters.coupled]
        convs = [group for group in found if isinstance(self.hollow.get_submodule(group.name), nn.Conv2d)]
        if not convs:
            raise UserError(
                f"method {method} prunes filters, and {self.name} has no convolution: use a model with "
                "convolutions, or a method that prunes weights"
            )
        # behind a compactor stands one convolution, and nothing else may make what it shrinks
        return [group for group in convs if len(group.producers) == 1] if config.method.compactors else found


def known_shape(shape: Shape | None, name: str) -> Shape:
    """Return the shape of an input of the network `name`. Raise UserError where nobody has said it."""
    if shape is None:
        raise UserError(f"an input has to go through {name} for this: give input_shape=, as in (3, 32, 32)")
    return shape


def _size(model: nn.Module) -> Size:
    found = masks.layers(model).values()
    return Size(masks.count(model), sum(module.weight.numel() for module in found), len(found))


def structure_of(config: Config) -> Structure:
    """The structure of the plain network of `config`; a sweep's jobs all ask for the same few."""
    return _structure(spec_of(config), choice_of(config))


def _logits(model: nn.Module, spec: models.Spec) -> Any:
    with torch.no_grad(), evaluating(model):
        return send(model, image_like(model, spec.shape))


def _check_output(spec: models.Spec, model: nn.Module) -> None:
    """Raise UserError where an image does not go through, or what comes out are no logits."""
    try:
        logits = _logits(model, spec)
    except SparseLabError:
        try:  # one that looks at values has none on the device "meta"
            logits = _logits(models.make(spec), spec)
        except SparseLabError as error:
            raise UserError(f"{spec.title}: {error}; look at dataset.image_size and model.options") from None
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != (1, spec.num_classes):
        made = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UserError(f"{spec.title} makes {made} of an image, and no logits (1, {spec.num_classes})")


@lru_cache(maxsize=8)
def _structure(spec: models.Spec, choice: Choice) -> Structure:
    with torch.device("meta"):
        model = models.make(spec)
    _check_output(spec, model)
    _choose(model, choice)
    return Structure(spec.title, model, spec.shape)
