"""model=torchvision model.arch=NAME: torchvision's classification networks."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision import models as library

from sparse_lab.errors import UserError, nearest
from sparse_lab.models.library import check_options, fitted, made, parameters_of
from sparse_lab.models.spec import Spec


def names() -> list[str]:
    """Return the names that model.arch takes."""
    return library.list_models(module=library)


def build(spec: Spec, weights: str | None) -> nn.Module:
    """Return the network of a Spec; see `sparse_lab.models.build`."""
    assert spec.arch is not None
    if spec.arch not in names():
        raise UserError(
            f"model.arch={spec.arch}: no classification network of torchvision; {nearest(spec.arch, names())}"
        )
    builder = library.get_model_builder(spec.arch)
    takes = parameters_of(builder)
    if spec.arch == "maxvit_t" and "input_size" in takes:
        size: dict[str, Any] = {"input_size": spec.image_size}
    elif "image_size" in takes:
        if spec.image_size[0] != spec.image_size[1]:
            raise UserError(f"{spec.title} reads square images, not {spec.image_size[0]}x{spec.image_size[1]}")
        size = {"image_size": spec.image_size[0]}
    else:
        size = {}
    # two networks have further heads for the loss, which no loop of ours reads
    plain = {name: value for name, value in (("aux_logits", False), ("init_weights", True)) if name in takes}
    arguments = {**plain, **check_options(spec, takes), **size, "num_classes": spec.num_classes}
    return fitted(spec, made(spec, builder, arguments), weights, reads=3)
