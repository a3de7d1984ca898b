"""Networks by name: checks what was asked for, then builds it. torch is imported at the first build, not before."""

from __future__ import annotations

import importlib
import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from sparse_lab.errors import SparseLabError, UserError, nearest
from sparse_lab.models.spec import IMAGENET_FROM, KINDS, Spec, frozen
from sparse_lab.registering import check_function, enter

if TYPE_CHECKING:
    from torch import nn

MAX_WIDTH = 4.0
LIBRARIES = ("torchvision", "timm")  # model=NAME model.arch=...: sparse_lab.models.NAME_library builds it
GIVEN = ("num_classes", "width", "image_size", "channels")  # what a registered function may take; the rest are options

Build = Callable[..., "nn.Module"]


@dataclass(frozen=True)
class Entry:
    """Where a network is built: in `sparse_lab.models.<module>`, by a function of the network's own name that takes a
    Spec; or by `own`, which was registered.

    smallest: side in pixels below which nothing would be left after the last down-sampling. torchvision: torchvision's
    name for the ImageNet variant; "" where there is none. options: name -> default. widens: does it take a width?
    """

    module: str
    smallest: int
    torchvision: str = ""
    options: Mapping[str, Any] | None = None
    widens: bool = True
    own: Build | None = None


_TOKENS = {"patch_size": 4, "dim": 192, "depth": 6, "dropout": 0.0}
_NETWORKS = {
    "vgg16": Entry("vgg", 32, "vgg16_bn"),
    "vgg19": Entry("vgg", 32, "vgg19_bn"),
    "resnet18": Entry("resnet", 8, "resnet18"),
    "resnet34": Entry("resnet", 8, "resnet34"),
    "resnet50": Entry("resnet", 8, "resnet50"),
    "resnet20": Entry("resnet_cifar", 4),
    "resnet32": Entry("resnet_cifar", 4),
    "resnet56": Entry("resnet_cifar", 4),
    "resnet8": Entry("resnet_cifar", 4),
    "wrn22_2": Entry("wide_resnet", 4),
    "wrn28_10": Entry("wide_resnet", 4),
    "densenet121": Entry("densenet", 8, "densenet121"),
    "mobilenet_v2": Entry("mobilenet", 8, "mobilenet_v2"),
    "vit": Entry("vit", 1, options={**_TOKENS, "heads": 3, "mlp_ratio": 4.0}),
    "mixer": Entry("mixer", 1, options={**_TOKENS, "token_ratio": 0.5, "mlp_ratio": 4.0}),
    **{name: Entry(f"{name}_library", 1, widens=False) for name in LIBRARIES},
}


def register_model(function: Build | None = None, *, smallest: int = 1) -> Any:
    """Make a network of your own known under its function's name, as a decorator: `@register_model(smallest=8)`.

    The function takes num_classes and, where it names them, image_size (one number, or (height, width) where they
    differ), channels (3 where it does not name them) and width (the factor on every channel count); all by keyword.
    Each further parameter has a default and is an option: `depth: int = 3` is set by model.options.depth=5. It returns
    a network in training mode from images (N, channels, height, width) to logits (N, num_classes), with random weights
    of torch's own generator. It is built on torch's device "meta" too, to ask for its layers before anything trains, so
    that no value of a tensor may have a say in its structure. Then `model=NAME` takes it, with a file model/NAME.yaml
    that sets `name: NAME` (`sparse_lab.register_choices`).

    smallest: the side of an image in pixels that it needs at least.

    Raise SparseLabError for a name that is taken or no plain word, for what is no function, and for parameters that are
    neither of these.
    """
    if function is None:
        return partial(register_model, smallest=smallest)
    name = check_function("network", function, _NETWORKS)
    takes = inspect.signature(function).parameters
    options = {key: one.default for key, one in takes.items() if key not in GIVEN}
    bad = [str(takes[key]) for key in options if not _is_option(takes[key])]
    if bad or "num_classes" not in takes:
        raise SparseLabError(
            f"network {name!r}: its function takes num_classes, image_size, channels, width and options with a default "
            f"(a number, text, true, false, a list, or None){', not ' + ', '.join(bad) if bad else ''}"
        )
    _NETWORKS[name] = Entry("", smallest, options=options, widens="width" in takes, own=function)
    enter("network", name, lambda: _NETWORKS.pop(name))
    return function


def _is_option(parameter: inspect.Parameter) -> bool:
    plain = isinstance(parameter.default, (bool, int, float, str, list, tuple, type(None)))
    return plain and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def names() -> list[str]:
    """The names that `build` takes, sorted."""
    return sorted(_NETWORKS)


def is_ours(name: str) -> bool:
    """Is it a network of this package, neither another library's nor registered?"""
    return name in _NETWORKS and name not in LIBRARIES and _NETWORKS[name].own is None


def differing(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are not the network's own defaults: what is written in two ways is one network."""
    known = {} if name not in _NETWORKS else options_of(name) or {}
    return {key: value for key, value in options.items() if key not in known or known[key] != value}


def options_of(name: str) -> Mapping[str, Any] | None:
    """Return the options of a network and their defaults; None where its library says which there are."""
    return None if name in LIBRARIES else _NETWORKS[name].options or {}


def build(
    name: str,
    num_classes: int = 10,
    width: float = 1.0,
    image_size: int | Sequence[int] = 32,
    weights: str | None = None,
    *,
    channels: int = 3,
    arch: str | None = None,
    adapt_stem: bool = False,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A float32 network on the default device, in training mode: images (N, channels, H, W) to logits (N, num_classes).

    name: one of `names()`; with "torchvision" and "timm", arch is the network's name there. num_classes: 2 or more.
    width: factor on every channel count, in (0, 4]. image_size: H = W in pixels, or (H, W); below 64 the CIFAR variant,
    from 64 up the ImageNet variant, whose parameters carry torchvision's names. weights: None for random weights
    (repeatable under `torch.manual_seed`), "torchvision" or "timm" for the weights that the library offers (downloaded
    once), or a local .pt, .pth, .ckpt or .safetensors file with a state dict (or with one under the key "state_dict" or
    "network"). Nothing but tensors is ever unpickled. channels: of an image. adapt_stem: a 3x3 convolution of stride 1
    without pooling in place of the stem for ImageNet's images. options: of the network itself.

    Where only the number of classes differs from the weights', the classifier keeps its random start, with a warning.

    Raises UserError on an unknown name or option, a value out of range, an image too small for the network, and weights
    that cannot be had, cannot be read or do not fit.
    """
    size = tuple(image_size) if isinstance(image_size, (list, tuple)) else (image_size, image_size)
    spec = Spec(name, num_classes, width, size, channels, arch, adapt_stem, frozen(options or {}))  # type: ignore[arg-type]
    return make(spec, weights)


def make(spec: Spec, weights: str | None = None) -> nn.Module:
    """The network of a Spec, otherwise as `build`."""
    check(spec)
    entry = _NETWORKS[spec.name]
    if spec.name in LIBRARIES:
        return importlib.import_module(f"sparse_lab.models.{entry.module}").build(spec, weights)
    _check_download(spec, entry, weights)
    if entry.own is not None:
        network = _own(spec, entry)
    else:
        whole = replace(spec, options=frozen({**(entry.options or {}), **dict(spec.options)}))
        network = getattr(importlib.import_module(f"sparse_lab.models.{entry.module}"), spec.name)(whole)
    if weights is not None:
        from sparse_lab.models.weights import load

        load(network, spec.name, weights, entry.torchvision)
    return network


def _check_download(spec: Spec, entry: Entry, weights: str | None) -> None:
    if weights == "timm" or (weights == "torchvision" and not entry.torchvision):
        raise UserError(f"weights={weights!r} exist for no {spec.name}: give a local file, or no weights")
    if weights == "torchvision" and not (spec.imagenet and spec.width == 1.0 and spec.channels == 3):
        raise UserError(
            f"weights='torchvision' exist for image_size >= {IMAGENET_FROM}, 3 channels and width 1.0 only, "
            f"not for image_size {_shown(spec.image_size)}, {spec.channels} channels and width {spec.width}: give a "
            "local file, or no weights"
        )


def has_stem(name: str, image_size: tuple[int, int]) -> bool:
    """Does a network for images of this size begin as ImageNet's do, unless adapt_stem says otherwise?"""
    return name in LIBRARIES or (
        name in _NETWORKS and bool(_NETWORKS[name].torchvision) and min(image_size) >= IMAGENET_FROM
    )


def _own(spec: Spec, entry: Entry) -> nn.Module:
    from torch import nn

    assert entry.own is not None
    takes = inspect.signature(entry.own).parameters
    if spec.adapt_stem:
        raise UserError(f"model.adapt_stem: network {spec.name!r} is your own, and its stem is what its function makes")
    if spec.channels != 3 and "channels" not in takes:
        raise UserError(
            f"network {spec.name!r} reads 3 channels, not {spec.channels}: its function takes no `channels`"
        )
    height, width = spec.image_size
    given = {
        "num_classes": spec.num_classes,
        "width": spec.width,
        "image_size": height if height == width else spec.image_size,
        "channels": spec.channels,
    }
    try:
        network = entry.own(**{key: value for key, value in given.items() if key in takes}, **dict(spec.options))
    except UserError:
        raise
    except Exception as error:  # somebody's own code
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"network {spec.name!r} cannot be made as it was asked for ({said}, {where.filename}:{where.lineno})"
        ) from error
    if not isinstance(network, nn.Module):
        raise UserError(f"network {spec.name!r}: its function returns {type(network).__name__}, and no torch.nn.Module")
    return network


def check(spec: Spec) -> None:
    """Raise UserError where a name is not known, or a value is of the wrong type or out of range."""
    if spec.name not in _NETWORKS:
        raise UserError(f"unknown network {spec.name!r}: {nearest(spec.name, names())}")
    entry = _NETWORKS[spec.name]
    _check_whole("num_classes", spec.num_classes, 2)
    _check_whole("channels", spec.channels, 1)
    if not isinstance(spec.width, int | float) or isinstance(spec.width, bool) or not math.isfinite(spec.width):
        raise UserError(f"width must be a number, not {spec.width!r}")
    if not 0.0 < spec.width <= MAX_WIDTH:
        raise UserError(f"width must be above 0 and at most {MAX_WIDTH:g}, not {spec.width!r}")
    if not entry.widens and spec.width != 1.0:
        raise UserError(f"width={spec.width:g}: {spec.title} has one width; leave model.width out")
    sides = spec.image_size
    if len(sides) != 2 or any(not isinstance(side, int) or isinstance(side, bool) for side in sides):
        raise UserError(f"image_size must be a whole number of pixels, or height and width, not {_shown(sides)}")
    if min(spec.image_size) < entry.smallest:
        raise UserError(
            f"{spec.name} needs images of at least {entry.smallest} pixels, not {_shown(spec.image_size)}: "
            f"nothing is left after its down-sampling; pad or enlarge the images"
        )
    if spec.name in LIBRARIES:
        if not spec.arch:
            raise UserError(f"model={spec.name} needs the name of a network there: model.arch=resnet18, for instance")
    elif spec.arch is not None:
        raise UserError(f"model.arch={spec.arch}: for model={' and model='.join(LIBRARIES)} only, not {spec.name}")
    else:
        _check_options(spec, entry.options or {})


def _check_options(spec: Spec, known: Mapping[str, Any]) -> None:
    for name, value in spec.options:
        if name not in known:
            there = nearest(name, sorted(known)) if known else f"{spec.name} has no options"
            raise UserError(f"model.options.{name}: no option of {spec.name}; {there}")
        default = known[name]
        kind = type(default)
        also = {float: (int,), list: (tuple,)}.get(kind, ())
        if default is not None and value is not None and type(value) not in (kind, *also):
            raise UserError(f"model.options.{name}={value}: {spec.name} takes {KINDS.get(kind, 'a list')} there")


def _check_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name} must be a whole number, {least} or more, not {value!r}")


def _shown(size: tuple[int, ...]) -> str:
    return str(size[0]) if len(set(size)) == 1 else "x".join(map(str, size))
