"""Networks by name: checks what was asked for, then builds it. torch is imported at the first build, not before."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from sparse_lab.errors import UserError, nearest
from sparse_lab.registering import check_function, enter

if TYPE_CHECKING:
    from torch import nn

IMAGENET_FROM = 64  # pixels; smaller images get the CIFAR variant
MAX_WIDTH = 4.0


Build = Callable[[int, float, int], "nn.Module"]


@dataclass(frozen=True)
class Entry:
    """Where a network is built: `sparse_lab.models.<module>`, a function of the network's own name; or `own`, which was
    registered.
    """

    module: str
    smallest: int  # image size in pixels below which nothing would be left after the last down-sampling
    torchvision: str  # torchvision's name for the ImageNet variant; "" where there is none
    own: Build | None = None


_NETWORKS = {
    "vgg16": Entry("vgg", smallest=32, torchvision="vgg16_bn"),
    "resnet34": Entry("resnet", smallest=8, torchvision="resnet34"),
    "resnet50": Entry("resnet", smallest=8, torchvision="resnet50"),
    "mobilenet_v2": Entry("mobilenet", smallest=8, torchvision="mobilenet_v2"),
}


def register_network(function: Build | None = None, *, smallest: int = 1) -> Any:
    """Make a network of your own known under its function's name, as a decorator: `@register_network(smallest=8)`.

    The function takes (num_classes, width, image_size) and returns a network in training mode from images
    (N, 3, image_size, image_size) to logits (N, num_classes), with random weights of torch's own generator. width is
    the factor on every channel count. It is built on torch's device "meta" too, to ask for its layers before anything
    trains, so that no value of a tensor may have a say in its structure. Then `model=NAME` takes it, with a file
    model/NAME.yaml that sets `name: NAME` (`sparse_lab.register_choices`).

    smallest: the image size in pixels that it needs at least.

    Raise SparseLabError for a name that is taken or no plain word, and for what is no function.
    """
    if function is None:
        return partial(register_network, smallest=smallest)
    name = check_function("network", function, _NETWORKS)
    _NETWORKS[name] = Entry("", smallest, "", function)
    enter("network", name, lambda: _NETWORKS.pop(name))
    return function


def names() -> list[str]:
    """The names that `build` takes, sorted."""
    return sorted(_NETWORKS)


def build(
    name: str, num_classes: int = 10, width: float = 1.0, image_size: int = 32, weights: str | None = None
) -> nn.Module:
    """A float32 network on the default device, in training mode: images (N, 3, H, W) to logits (N, num_classes).

    name: one of `names()`. num_classes: 2 or more. width: factor on every channel count, in (0, 4].
    image_size: H = W in pixels; below 64 the CIFAR variant, from 64 up the ImageNet variant, whose parameters carry
    torchvision's names. weights: None for random weights (repeatable under `torch.manual_seed`), "torchvision" for the
    official ImageNet weights (downloaded once, hash checked), or a local .pt, .pth, .ckpt or .safetensors file with a
    state dict (or with one under the key "state_dict" or "network"). Nothing but tensors is ever unpickled.

    Where only the number of classes differs from the weights', the classifier keeps its random start, with a warning.

    Raises UserError on an unknown name, a value out of range, an image too small for the network, and weights that
    cannot be had, cannot be read or do not fit.
    """
    if name not in _NETWORKS:
        raise UserError(f"unknown network {name!r}: {nearest(name, names())}")
    entry = _NETWORKS[name]
    _check(name, entry, num_classes, width, image_size)
    imagenet = image_size >= IMAGENET_FROM
    if weights == "torchvision" and not entry.torchvision:
        raise UserError(f"weights='torchvision' exist for no {name}: give a local file, or no weights")
    if weights == "torchvision" and not (imagenet and width == 1.0):
        raise UserError(
            f"weights='torchvision' exist for image_size >= {IMAGENET_FROM} and width 1.0 only, "
            f"not for image_size {image_size} and width {width}: give a local file, or no weights"
        )
    if entry.own is not None:
        network = _own(name, entry.own, num_classes, width, image_size)
    else:
        module = importlib.import_module(f"sparse_lab.models.{entry.module}")
        network = getattr(module, name)(num_classes, width, imagenet)
    if weights is not None:
        from sparse_lab.models.weights import load

        load(network, name, weights, entry.torchvision)
    return network


def _own(name: str, build: Build, num_classes: int, width: float, image_size: int) -> nn.Module:
    from torch import nn

    network = build(num_classes, width, image_size)
    if not isinstance(network, nn.Module):
        raise UserError(f"network {name!r}: its function returns {type(network).__name__}, and no torch.nn.Module")
    return network


def _check(name: str, entry: Entry, num_classes: int, width: float, image_size: int) -> None:
    """Raises UserError where a number is of the wrong type or out of range."""
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 2:
        raise UserError(f"num_classes must be a whole number, 2 or more, not {num_classes!r}")
    if not isinstance(width, int | float) or isinstance(width, bool) or not math.isfinite(width):
        raise UserError(f"width must be a number, not {width!r}")
    if not 0.0 < width <= MAX_WIDTH:
        raise UserError(f"width must be above 0 and at most {MAX_WIDTH:g}, not {width!r}")
    if not isinstance(image_size, int) or isinstance(image_size, bool):
        raise UserError(f"image_size must be a whole number of pixels, not {image_size!r}")
    if image_size < entry.smallest:
        raise UserError(
            f"{name} needs images of at least {entry.smallest} pixels, not {image_size!r}: "
            f"nothing is left after its down-sampling; pad or enlarge the images"
        )
