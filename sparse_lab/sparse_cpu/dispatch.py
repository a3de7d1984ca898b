"""Who answers a function of torch while a network computes sparsely: a kernel (`functions`), or torch itself.

`Watch` sees every function that the network calls. Where a map or a masked weight is among the arguments and no kernel
does what is asked, torch computes it: on tensors that maps are unpacked into, and on masked weights whose gradient
finds its way to `live`. What comes out is torch's, until a kernel wants it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, has_torch_function, resolve_name
from torch.utils._pytree import tree_map

from sparse_lab.sparse_cpu.autograd import Kept, Tape
from sparse_lab.sparse_cpu.functions import TABLE
from sparse_lab.sparse_cpu.maps import BatchInnermost


def _getters(*names: str) -> list[Any]:
    return [getattr(Tensor, name).__get__ for name in names]


# what a map knows of itself without being computed
KNOWN = {
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__, Tensor.element_size,
    Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device,
    *_getters("shape", "ndim", "dtype", "device", "layout", "itemsize", "nbytes", "is_sparse", "is_cuda", "is_cpu"),
    *_getters("is_meta", "is_quantized", "is_nested", "is_mkldnn"),
}  # fmt: skip
# that it is read in another way costs a copy at most: what is computed is said
READS = {
    "reshape", "view", "permute", "transpose", "flatten", "unflatten", "unbind", "chunk", "split", "getitem", "iter",
    "squeeze", "unsqueeze", "contiguous", "clone", "detach", "expand", "narrow", "select", "movedim", "swapaxes", "to",
    "view_as", "expand_as", "reshape_as", "data", "T", "mT", "t", "stride", "is_contiguous", "requires_grad", "grad",
    "is_leaf", "grad_fn", "data_ptr", "numpy", "repr", "str", "format", "hash", "type", "float", "double", "cpu",
    "dropout", "tensor_split", "storage_offset", "untyped_storage", "is_inference", "len", "size", "shape",
}  # fmt: skip
# that have the device or shape of what comes of a map, and nothing else
MAKES = {
    *(f"new_{name}" for name in ("empty", "zeros", "ones", "full", "tensor")),
    *(f"{name}_like" for name in ("empty", "zeros", "ones", "full", "rand", "randn")),
}
APPLY = torch.autograd.Function.__dict__["apply"]
IN_PLACE = {f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device}  # arguments that are no tensor and hold none
ANY = torch.empty(0)  # has_torch_function of it: does anybody watch?
_watched = threading.local()


class Watch(TorchFunctionMode):
    """What is computed inside, by functions of torch and by autograd functions of the network's own. Torch's modes do
    not see those: while anybody watches, `torch.autograd.Function.apply` is `_apply`.
    """

    _lock = threading.Lock()
    _inside = 0

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return answer(self._tape, function, args, kwargs or {})

    def __enter__(self) -> Any:
        _watched.tapes = [*getattr(_watched, "tapes", []), self._tape]
        with Watch._lock:
            Watch._inside += 1
            torch.autograd.Function.apply = classmethod(_apply)  # type: ignore[assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _watched.tapes = _watched.tapes[:-1]
        self._tape.entered = None  # or it would hold itself, by way of torch's graph
        with Watch._lock:
            Watch._inside -= 1
            if Watch._inside == 0:
                torch.autograd.Function.apply = APPLY  # type: ignore[method-assign]


def _apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
    function = APPLY.__get__(None, cls)
    if not has_torch_function((ANY,)):  # nobody watches in this thread, or it is in the middle of an answer
        return function(*args, **kwargs)
    with torch._C.DisableTorchFunction():
        return _densely(_watched.tapes[-1], function, args, kwargs, cls.__name__)


def answer(tape: Tape, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `function` gives, from a kernel or from torch."""
    if function in KNOWN and len(args) == 1 and type(args[0]) is BatchInnermost and not args[0].is_plain:
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)
    concerned = [one for one in _parts(args, kwargs) if _concerns(tape, one)]
    if not concerned:
        return _torchs(tape, function, args, kwargs)
    first = concerned[0]
    if function in KNOWN and not (isinstance(first, BatchInnermost) and first.is_plain):
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)
    if function is Tensor.__hash__:
        return id(first)
    known = TABLE.get(function)
    # what is made where gradients are switched off is a constant to torch
    if known is not None and torch.is_grad_enabled() == tape.recording and not any(_is_plain(one) for one in concerned):
        result = _asked(known, tape, args, kwargs)
        if result is not NotImplemented:
            return result
    return _densely(tape, function, args, kwargs, _name(function))


def _parts(found: Iterable[Any], named: dict[Any, Any] | None = None) -> list[Any]:
    """Everything among arguments, in lists and dicts too, but for numbers and the like."""
    parts: list[Any] = []
    for one in (*found, *named.values()) if named else found:
        kind = type(one)
        if kind in PLAIN:
            continue
        if isinstance(one, tuple | list):
            parts += _parts(one)
        elif isinstance(one, dict):
            parts += _parts(one.values())
        else:
            parts.append(one)
    return parts


def _concerns(tape: Tape, one: Any) -> bool:
    # a test of Parameter's own takes a microsecond for everything that is none
    return type(one) is BatchInnermost or (
        isinstance(one, Tensor) and isinstance(one, nn.Parameter) and one in tape.live
    )


def _is_plain(one: Any) -> bool:
    return isinstance(one, BatchInnermost) and one.is_plain


def _asked(known: Callable[..., Any], tape: Tape, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """NotImplemented too where the kernel does not know such arguments."""
    try:
        return known(tape, *args, **kwargs)
    except TypeError:
        try:
            inspect.signature(known).bind(tape, *args, **kwargs)
        except TypeError:
            return NotImplemented
        raise


def _torchs(tape: Tape, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Nothing of ours is among the arguments; what comes of a map is spoken of as such."""
    if (
        function in KNOWN
        or _name(function) in MAKES
        or not any(tape.comes_of_maps(one) for one in _parts(args, kwargs) if isinstance(one, Tensor))
    ):
        return function(*args, **kwargs)
    _say(tape, _name(function))
    result = function(*args, **kwargs)
    tape.note(one for one in _parts((result,)) if isinstance(one, Tensor))
    return result


def _densely(tape: Tape, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """`function` by torch, on tensors in place of maps and of masked weights. Said once."""
    _say(tape, name)
    ours: dict[int, Any] = {}

    def given(one: Any) -> Any:
        if not _concerns(tape, one):
            return one
        tensor = one.plain() if isinstance(one, BatchInnermost) else _kept(tape, one)
        ours[id(tensor)] = one
        return tensor

    args, kwargs = tree_map(given, (args, kwargs))
    result = function(*args, **kwargs)
    tape.note(one for one in _parts((result,)) if isinstance(one, Tensor) and id(one) not in ours)
    # what torch changes in place, or finds as it should be, it gives back
    return tree_map(lambda one: ours.get(id(one), one), result)


def _kept(tape: Tape, weight: nn.Parameter) -> Tensor:
    if not (weight.requires_grad and torch.is_grad_enabled() and tape.recording):
        return weight
    return Kept.apply(weight, tape.live[weight], tape.wants_dense)


def _say(tape: Tape, name: str) -> None:
    if name not in READS:
        tape.say_once(f"compute=sparse has no kernel for {name} as it is used here: torch computes it densely")


@lru_cache(maxsize=1024)
def _name(function: Callable[..., Any]) -> str:
    """gelu, mul (of __mul__, mul_ and __imul__), T (of the property)."""
    name = getattr(function, "__name__", str(function))
    if name in ("__get__", "__set__"):
        name = (resolve_name(function) or name).removesuffix(f".{name}").rpartition(".")[2]
    bare = name.strip("_")
    return bare[1:] if name.startswith("__i") and bare in IN_PLACE else bare
