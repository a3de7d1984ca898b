"""The networks of a run: plain, or hollow, to be asked for their structure."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import nn

from sparse_lab import models
from sparse_lab.config import Config
from sparse_lab.errors import UserError
from sparse_lab.models import weight_sharing
from sparse_lab.sparsity import masks
from sparse_lab.sparsity.structured import channels


def build_model(config: Config) -> nn.Module:
    """The plain network of `config`."""
    model, data = config.model, config.dataset
    return models.build(model.name, data.num_classes, model.width, data.image_size, model.weights)


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


class Size(NamedTuple):
    """Counted weights before sharing, those that exist, and the layers that hold them."""

    total: int
    unique: int
    layers: int


def counted(config: Config) -> Size:
    """The size of the network that the method trains, without its memory."""
    return _size(spec_of(config), config.method.sharing is not None)


@cache
def _size(spec: Spec, sharing: bool) -> Size:
    model = meta_network(spec, sharing)
    found = masks.layers(model).values()
    return Size(masks.count(model), sum(module.weight.numel() for module in found), len(found))


def filter_groups(config: Config) -> list[channels.Group]:
    """The channels of the plain network that can go. Raises UserError when there are none."""
    chosen, filters = config.model.name, config.method.filters
    assert filters is not None
    spec = spec_of(config)
    plain = meta_network(spec)
    try:
        found = list(_filter_groups(spec, filters.coupled))
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
