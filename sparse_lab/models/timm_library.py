"""model=timm model.arch=NAME: the networks of the package timm (the extra `timm`)."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparse_lab.errors import UserError, nearest
from sparse_lab.models.library import check_options, fitted, made, parameters_of
from sparse_lab.models.spec import Spec


def _library() -> Any:
    try:
        import timm
    except ImportError:
        raise UserError("model=timm needs the package timm: pip install 'sparse_lab[timm]'") from None
    return timm


def _from_file(spec: Spec, arguments: dict[str, Any], weights: str | None) -> nn.Module:
    """With a file's weights, if any: of a network for as many channels, or of one for colour images."""
    create = _library().create_model
    try:
        return fitted(spec, made(spec, create, arguments), weights, reads=spec.channels)
    except UserError as error:
        if weights is None or spec.channels == 3:
            raise
        try:
            return fitted(spec, made(spec, create, {**arguments, "in_chans": 3}), weights, reads=3)
        except UserError:
            raise error from None


def names() -> list[str]:
    """Return the names that model.arch takes."""
    return _library().list_models()


def build(spec: Spec, weights: str | None) -> nn.Module:
    """Return the network of a Spec; see `sparse_lab.models.build`."""
    timm = _library()
    assert spec.arch is not None
    if not timm.is_model(spec.arch):
        raise UserError(f"model.arch={spec.arch}: no network of timm; {nearest(spec.arch, names())}")
    takes = parameters_of(timm.model_entrypoint(spec.arch))
    size = {"img_size": spec.image_size} if "img_size" in takes else {}
    arguments = {**check_options(spec, takes), **size, "num_classes": spec.num_classes, "in_chans": spec.channels}
    if weights != "timm":
        return _from_file(spec, {**arguments, "model_name": spec.arch}, weights)
    try:
        network = made(spec, timm.create_model, {**arguments, "model_name": spec.arch, "pretrained": True})
    except UserError as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, TypeError):  # an option that does not fit
            raise
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
        raise UserError(
            f"timm's weights of {spec.arch} could not be had ({reason}): give a local file as model.weights, or "
            "connect to the network and try again"
        ) from None
    return fitted(spec, network, None, reads=spec.channels)
