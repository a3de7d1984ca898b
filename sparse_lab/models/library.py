"""What networks of torchvision and of timm have in common: which options they take, and how they are made to fit."""

from __future__ import annotations

import inspect
import re
import typing
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sparse_lab.errors import UserError, nearest
from sparse_lab.models import stem
from sparse_lab.models.spec import KINDS, Spec
from sparse_lab.models.weights import load
from sparse_lab.sparsity.images import hollow

# what the Spec says, what would read a file or fetch one, and what is no plain value
OF_THE_SPEC = frozenset({"self", "num_classes", "in_chans", "image_size", "img_size", "input_size", "device", "dtype"})
PLAIN = (bool, int, float, str, tuple, list, type(None))


def parameters_of(builder: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return what the class of a builder's networks is made with."""
    kind = typing.get_type_hints(builder).get("return")
    if not isinstance(kind, type):
        return {}
    # one class may hand the rest on to another
    found = [inspect.signature(one.__init__).parameters for one in kind.__mro__ if issubclass(one, nn.Module)]
    return {name: takes for parameters in reversed(found) for name, takes in parameters.items()}


def check_options(spec: Spec, takes: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Return the options, or raise UserError for one that the network does not take, or of another type."""
    known = {
        name
        for name, one in takes.items()
        if name not in OF_THE_SPEC
        and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
        and (one.default is one.empty or isinstance(one.default, PLAIN))
    }
    for name, value in spec.options:
        if name not in known:
            raise UserError(f"model.options.{name}: no option of {spec.title}; {nearest(name, sorted(known))}")
        kind = type(takes[name].default)
        kind = float if kind is int else kind  # a library writes 4 for 4.0
        if kind in KINDS and type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"model.options.{name}={value}: {spec.title} takes {KINDS[kind]} there")
    return dict(spec.options)


def made(spec: Spec, builder: Callable[..., Any], arguments: dict[str, Any]) -> nn.Module:
    """Return the library's network, not in place anywhere: hooks may keep what they see. Raise UserError where it
    cannot be made of these arguments.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the library's own deprecated ways
            network: Any = _built(builder, arguments)
    except Exception as error:  # each of hundreds of networks has its own kinds
        twice = re.search(r"multiple values for (?:keyword )?argument '(\w+)'", str(error))
        if twice is not None:
            raise UserError(f"model.options.{twice[1]}: model.arch={spec.arch} says itself what that is") from None
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"{spec.title} cannot be made as it was asked for ({said}): look at model.options and dataset.image_size"
        ) from error
    for module in network.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False
    return network


def _built(builder: Callable[..., Any], arguments: dict[str, Any]) -> nn.Module:
    """The network; on the device "meta" also one whose code asks tensors for their values while it is made."""
    try:
        return builder(**arguments)
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error) or not torch.empty(0).is_meta:
            raise
    with torch.device("cpu"), torch.random.fork_rng(devices=()):
        return hollow(builder(**arguments))


def fitted(spec: Spec, network: nn.Module, weights: str | None, reads: int) -> nn.Module:
    """Return the network with its start weights, reading as many channels as the Spec says, its stem adapted. reads:
    how many channels it reads now.
    """
    if weights is not None:
        load(network, spec.title, weights, spec.arch or "")
    if reads != spec.channels:
        stem.read_channels(network, spec.title, spec.shape)
    if spec.adapt_stem:
        stem.adapt(network, spec.title, spec.shape)
    if weights is not None and (spec.adapt_stem or reads != spec.channels):
        warnings.warn(f"the first convolution of {spec.title} is new and starts from random weights", stacklevel=2)
    return network
