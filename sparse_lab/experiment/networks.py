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
