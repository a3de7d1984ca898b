"""The networks of a run: plain, altered by its method, or hollow, to be asked for their structure."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import nn

from sparse_lab import models
from sparse_lab.config import Config
from sparse_lab.errors import UserError
from sparse_lab.models import compactors, dyrelu, offsets, weight_sharing
from sparse_lab.sparsity.structured import channels


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


Spec = tuple[str, int, float, int]  # name, classes, width, image size: what `models.build` takes


def spec_of(config: Config) -> Spec:
    return config.model.name, config.dataset.num_classes, config.model.width, config.dataset.image_size


@lru_cache(maxsize=8)
def meta_network(spec: Spec, sharing: bool = False) -> nn.Module:
    """The plain network on the device "meta", to ask for its structure; it is not the caller's to change. sharing: with
    shared weights.
    """
    with torch.device("meta"):
        network = models.build(*spec)
        if sharing:
            weight_sharing.share(network)
        return network


def altered_meta_network(config: Config) -> nn.Module:
    """The network that the method trains, on the device "meta". Raises UserError where the two do not go together."""
    with torch.device("meta"):
        return alter(models.build(*spec_of(config)), config)


def filter_groups(config: Config) -> list[channels.Group]:
    """The channels of the plain network that can go. Raises UserError when there are none."""
    chosen = config.model.name
    spec = spec_of(config)
    plain = meta_network(spec)
    try:
        found = list(_filter_groups(spec, config.method.filters.coupled))
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
def _filter_groups(spec: Spec, coupled: bool) -> tuple[channels.Group, ...]:
    """An image's way through the network is followed once: a sweep's jobs all ask."""
    return tuple(channels.groups(meta_network(spec), spec[3], coupled))
