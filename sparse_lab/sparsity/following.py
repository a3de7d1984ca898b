"""Follow what depends on what through any network: run it on random numbers, and see what moves.

No layer is known by its kind. The network itself runs once, in float64, on two random images, with random weights where
the masks keep any: what differs between the two depends on the image, and the gradient of all logits says what reaches
them. Random numbers cancel out with probability zero, so this is exact but for rounding, if no operation is flat
anywhere. So those that are, wherever they are called from, are replaced by smooth ones that depend on the same numbers:
activations by x + 0.3 sin(x + 0.7), gates by 1 + 0.3 sin(x + 0.7), max-pooling by the mean.

A network that looks at the values themselves (branches on them, sorts them, switches gradients off) cannot be followed
like this, and says so.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sparse_lab.errors import SparseLabError
from sparse_lab.sparsity.images import Shape, full_shape

SAME = 1e-13  # what differs by less than this share of the largest value of its tensor differs by rounding
UNREACHED = 1e-14  # and gradients smaller than this share of the largest one of all are rounding


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ACTIVATIONS = _words(
    "relu relu6 hardtanh hardswish leaky_relu elu celu selu gelu silu mish softplus softsign hardshrink softshrink "
    "tanhshrink logsigmoid threshold clamp clip clamp_min clamp_max rrelu prelu round floor ceil trunc sign abs"
)
GATES = _words("sigmoid hardsigmoid tanh erf heaviside")
MEANS: dict[str, Callable[..., Any]] = {
    "max_pool1d": functional.avg_pool1d,
    "max_pool2d": functional.avg_pool2d,
    "max_pool3d": functional.avg_pool3d,
    "adaptive_max_pool1d": functional.adaptive_avg_pool1d,
    "adaptive_max_pool2d": functional.adaptive_avg_pool2d,
    "adaptive_max_pool3d": functional.adaptive_avg_pool3d,
}
LARGEST = frozenset({"amax", "amin"})
EITHER = frozenset({"maximum", "minimum", "fmax", "fmin"})
WEIGHTED = frozenset({"conv1d", "conv2d", "conv3d", "linear"})  # (input, weight, bias, ...)
# whose outcome is another number or another place, depending on values
LOOKS = _words("item tolist numpy __bool__ __int__ __float__ __index__ nonzero unique equal")
CHOOSES = _words(
    "topk kthvalue argmax argmin sort argsort median mode masked_select bucketize searchsorted histc max min cummax "
    "cummin gt ge lt le eq ne __gt__ __ge__ __lt__ __le__ __eq__ __ne__ bernoulli"
)


class NotFollowed(SparseLabError):
    """Why a network cannot be followed."""


@dataclass(frozen=True)
class Use:
    """One call of a layer's operation: what goes in depends on the image where it `moves`; `made` comes out."""

    layer: str
    operation: Callable[..., Tensor]
    settings: dict[str, Any]  # what the operation takes behind the bias
    read: Tensor
    moves: Tensor
    made: Tensor


@dataclass(frozen=True)
class Followed:
    """on_path: of each weight's shape, bool: would a weight there lie on a path from the image to a logit? logits:
    bool, which of them depend on the image.
    """

    on_path: dict[str, Tensor]
    logits: Tensor


def follow(probe: nn.Module, shape: Shape, counted: Mapping[str, nn.Module], masks: Mapping[str, Tensor]) -> Followed:
    """Follow every path of `probe`, which is changed: its parameters become random, in float64. counted: the layers
    that are asked about; masks: bool, which of their weights there are. Raise NotFollowed where that cannot be done.
    """
    source = torch.Generator(next(probe.parameters()).device).manual_seed(0)
    _randomise(probe, counted, masks, source)
    first = next(probe.double().eval().requires_grad_(False).parameters())
    whole = (2, *full_shape(shape))
    # large beside what biases add, or what depends on the image drowns in them in a deep network
    images = 16.0 * torch.randn(whole, generator=source, device=first.device, dtype=first.dtype)
    images.requires_grad_(True)
    watch = _Watch({module.get_parameter("weight"): name for name, module in counted.items()})
    logits = _run(probe, images, watch)
    for layer, function in watch.touched.items():
        raise NotFollowed(f"the weight of {layer} is used by {function}, and not as a layer's")
    if any(use.read.shape[1] > 1 for use in watch.uses):
        _check_order(probe, images, watch)
    try:
        return _followed(logits, watch.uses, counted, source)
    except (RuntimeError, ValueError, TypeError) as error:  # of gradients through what somebody's network does
        raise NotFollowed(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None


def _followed(logits: Tensor, uses: list[Use], counted: Mapping[str, nn.Module], source: torch.Generator) -> Followed:
    reached = _reached(logits, uses, source)
    weights = {name: module.get_parameter("weight") for name, module in counted.items()}
    on_path = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    for use, there in zip(uses, reached, strict=True):
        if there is not None:
            on_path[use.layer] |= _crossed(use, there, on_path[use.layer].shape)
    return Followed(on_path, _differs(logits.detach()))


def _check_order(probe: nn.Module, images: Tensor, watch: _Watch) -> None:
    """Raise NotFollowed where a layer reads several rows of an image, and they do not lie image by image (but token by
    token, say): with the images the other way round it must read the other half first.
    """
    other = _Watch(watch.by_weight)
    _run(probe, images.detach().flip(0).requires_grad_(True), other)
    for first, second in zip(watch.uses, other.uses, strict=True):
        if not torch.allclose(first.read, second.read.flip(0), rtol=1e-9, atol=SAME * float(first.read.abs().max())):
            raise NotFollowed(f"what {first.layer} reads does not lie image by image")


def _run(probe: nn.Module, images: Tensor, watch: _Watch) -> Tensor:
    """The logits of both images, [2, ...]."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of what the network makes on its way
    try:
        with torch.enable_grad(), watch:
            logits = probe(images)
    except NotFollowed:
        raise
    except Exception as error:  # whatever somebody's network does not like about random numbers in float64
        raise NotFollowed(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
    finally:
        torch.set_default_dtype(before)
    if not isinstance(logits, Tensor) or logits.dim() < 1 or len(logits) != 2:
        raise NotFollowed("what it returns is not one tensor with a row for each image")
    if not bool(torch.isfinite(logits).all()):
        raise NotFollowed("its logits are not finite for random weights")
    return logits


def _reached(logits: Tensor, uses: list[Use], source: torch.Generator) -> list[Tensor | None]:
    """Where what each use makes reaches a logit: bool, of one image; None where it is not asked, for nothing moves."""
    asked = [use.made for use in uses if use.made.requires_grad]
    if not logits.requires_grad or not asked:
        return [None] * len(uses)
    mixed = torch.rand(logits.shape, generator=source, device=logits.device, dtype=logits.dtype) + 0.5
    grads = torch.autograd.grad(logits, asked, mixed, allow_unused=True)
    least = UNREACHED * max((float(one.abs().max()) for one in grads if one is not None and one.numel()), default=0.0)
    found = iter(grads)
    reached: list[Tensor | None] = []
    for use in uses:
        grad = next(found) if use.made.requires_grad else None
        reached.append(None if grad is None else (grad.abs() > least).any(0, keepdim=True))
    return reached


def _crossed(use: Use, reached: Tensor, shape: torch.Size) -> Tensor:
    """In which places of the weight something that moves goes in where what comes out reaches a logit. This is the
    weight's gradient, with ones for both: a count.
    """
    moves, there = use.moves.to(torch.float32), reached.to(torch.float32)
    weight = torch.zeros(shape, dtype=torch.float32, device=moves.device, requires_grad=True)
    with torch.enable_grad():
        made = use.operation(moves, weight, None, **use.settings)
        (count,) = torch.autograd.grad(made, weight, there.expand_as(made))
    return count > 0.5


def _differs(pair: Tensor) -> Tensor:
    """Bool, of one image: where the two are not the same but for rounding."""
    first, second = pair
    return (
        (first - second).abs() > SAME * pair.abs().max() if pair.numel() else torch.zeros_like(first, dtype=torch.bool)
    )


def _randomise(
    probe: nn.Module, counted: Mapping[str, nn.Module], masks: Mapping[str, Tensor], source: torch.Generator
) -> None:
    """Random parameters of such a size that signals neither fade nor grow."""
    by_weight = {module.get_parameter("weight"): masks[name] for name, module in counted.items()}
    for parameter in probe.parameters():
        if not parameter.is_floating_point():
            continue
        mask = by_weight.get(parameter)
        whole = torch.ones_like(parameter, dtype=torch.bool) if mask is None else mask.to(parameter.device)
        parameter.data = draw(whole, source)
    for module in probe.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_var is not None:
            module.reset_running_stats()


def draw(mask: Tensor, source: torch.Generator) -> Tensor:
    """Return random weights, float64, where `mask` is: what they add up is about as large as what they read."""
    if mask.dim() < 2:
        return torch.rand(mask.shape, generator=source, device=mask.device, dtype=torch.float64) + 0.5
    rows, places = mask.flatten(1).nonzero(as_tuple=True)
    drawn = torch.rand(len(rows), generator=source, device=mask.device, dtype=torch.float64)
    kept = torch.bincount(rows, minlength=len(mask)).clamp_min(1).sqrt()
    values = torch.where(drawn < 0.5, drawn + 0.5, -drawn) / kept[rows]  # either sign, none near zero
    made = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    made.flatten(1)[rows, places] = values  # a view: a new tensor is contiguous
    return made


class _Watch(TorchFunctionMode):
    """Sees every function of torch that the network calls: notes the layers' operations, and replaces what is flat."""

    def __init__(self, weights: Mapping[Tensor, str]) -> None:
        super().__init__()
        self.by_weight = weights
        self.weights = {id(weight): name for weight, name in weights.items()}
        self.uses: list[Use] = []
        self.touched: dict[str, str] = {}  # layer -> what else used its weight

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if name in ("detach", "detach_"):
            return args[0]
        if name in LOOKS or (name in CHOOSES and _depends(args, kwargs)):
            return self._chosen(function, name, args, kwargs)
        if not torch.is_grad_enabled() and _depends(args, kwargs) and name != "__get__":
            raise NotFollowed("it switches gradients off on its way")
        if name in WEIGHTED:
            return self._weighted(function, *args, **kwargs)
        if name == "multi_head_attention_forward":
            return self._attention(function, args, kwargs)
        self._note_weights(name, (*args, *kwargs.values()))
        return _smooth(function, name, args, kwargs)

    def _chosen(self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        other = kwargs.get("other", args[1] if len(args) > 1 else None)
        if name in ("max", "min") and isinstance(other, Tensor):
            return _either(args[0] if args else kwargs["input"], other)
        if name in ("max", "min"):  # of all, or along an axis: the mean, and no place
            axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
            x = args[0] if args else kwargs["input"]
            if axis is None:
                return x.mean()
            keep = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
            return getattr(torch.return_types, name)((x.mean(axis, keep), x.detach().argmax(axis, keep)))
        raise NotFollowed(f"it looks at values on its way ({name})")

    def _weighted(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """One of `WEIGHTED`, in whatever way its arguments were given."""
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(names, args, strict=False)) | kwargs
        inputs, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
        made = function(inputs, weight, bias, **given)
        layer = self.weights.get(id(weight))
        if layer is None:
            self._note_weights(getattr(function, "__name__", ""), (inputs, weight))
        elif inputs.dim() and len(inputs) % 2 == 0:
            self.uses.append(_use(layer, function, given, inputs, made))
        else:
            raise NotFollowed(f"what {layer} reads does not say which image it is of")
        return made

    def _attention(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """torch's attention, whose last layer is called by nobody: left out there, and called here."""
        bound = inspect.signature(function).bind(*args, **kwargs)
        weight, bias = bound.arguments["out_proj_weight"], bound.arguments["out_proj_bias"]
        bound.arguments["out_proj_weight"], bound.arguments["out_proj_bias"] = torch.eye(len(weight)).to(weight), None
        bound.arguments["need_weights"] = False
        mixed, _ = function(*bound.args, **bound.kwargs)
        return self._by_image(mixed, weight, bias), None

    def _by_image(self, tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A linear layer over tokens that lie as (tokens, images, channels)."""
        made = self._weighted(functional.linear, tokens.transpose(0, 1), weight, bias)
        return made.transpose(0, 1)

    def _note_weights(self, name: str, values: Iterable[Any]) -> None:
        if name not in ("__get__", "__set__", "size", "dim", "numel"):
            for value in values:
                if id(value) in self.weights:
                    self.touched.setdefault(self.weights[id(value)], name)


def _use(layer: str, operation: Callable[..., Tensor], settings: dict[str, Any], inputs: Tensor, made: Tensor) -> Use:
    """Several rows of one image (its windows, say) count as one: a weight serves them all."""
    read = inputs.detach().unflatten(0, (2, -1))
    return Use(layer, operation, settings, read, _differs(read), made)


def _depends(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Is one of the arguments computed of the images?"""
    every = [
        one for value in (*args, *kwargs.values()) for one in (value if isinstance(value, (list, tuple)) else [value])
    ]
    return any(isinstance(one, Tensor) and one.requires_grad for one in every)


def _smooth(function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function does, without its flat parts."""
    plain = name.strip("_")
    if plain in ACTIVATIONS or plain in GATES:
        x = args[0] if args else kwargs["input"]
        if not x.is_floating_point():
            return function(*args, **kwargs)
        y = _activated(x) if plain in ACTIVATIONS else _gated(x)
        return x.copy_(y) if name.endswith("_") and not name.startswith("__") else y
    if plain in MEANS:
        return _mean(plain, args, kwargs)
    if plain in LARGEST:
        return torch.mean(*args, **kwargs)
    if plain in EITHER:
        return _either(*(*args, *kwargs.values())[:2])
    return function(*args, **kwargs)


def _activated(x: Tensor) -> Tensor:
    return x + 0.3 * torch.sin(x + 0.7)


def _gated(x: Tensor) -> Tensor:
    return 1.0 + 0.3 * torch.sin(x + 0.7)


def _either(first: Tensor, second: Tensor) -> Tensor:
    return 0.6 * first + 0.8 * second + 0.1 * torch.sin(first - second)


def _mean(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The mean of the same windows."""
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    if name.startswith("adaptive"):
        return MEANS[name](*args[:2], **{key: kwargs[key] for key in ("input", "output_size") if key in kwargs})
    given = dict(zip(names, args, strict=False)) | kwargs
    dilation = given.pop("dilation", 1)
    if (
        given.pop("return_indices", False)
        or math.prod(dilation if isinstance(dilation, (list, tuple)) else [dilation]) != 1
    ):
        raise NotFollowed(f"{name} with dilation, or with the places of the largest values")
    if given.get("stride") in (None, [], ()):
        given["stride"] = None
    return MEANS[name](**given)
