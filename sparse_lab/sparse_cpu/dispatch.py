"""What torch's own functions do when a network is handed images in the blocked layout.

`BatchInnermost` stands where a tensor would stand: torch's modules call torch's functions, which hand it over to the
table below (the `__torch_function__` protocol). What is not in the table is computed by torch on an unpacked copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from sparse_lab.models.dyrelu import dynamic_relu
from sparse_lab.sparse_cpu.autograd import Tape, Value
from sparse_lab.sparse_cpu.conv import Conv, Filter, Moments
from sparse_lab.sparse_cpu.layout import Shape, unpack
from sparse_lab.sparse_cpu.ops import Affine, DynamicReLU, MaxPool, Mean, Norm, joined, plain

RELU = (0.0, float("inf"))


class BatchInnermost:
    """(N, C, H, W) in the blocked layout; flat: to be read as (N, C * H * W)."""

    def __init__(self, tape: Tape, pending: Value | Conv | Norm, flat: bool = False) -> None:
        self.tape = tape
        self.flat = flat
        self._pending = pending

    @property
    def pending(self) -> Value | Conv | Norm:
        """How the map is made; others may still join in."""
        return self._pending

    def value(self) -> Value:
        """The map, computed now if it was not before."""
        if not isinstance(self._pending, Value):
            self._pending = self._pending.value()
        return self._pending

    @property
    def shape(self) -> torch.Size:
        shape = self._pending.shape
        whole = (shape.images, shape.channels, shape.height, shape.width)
        return torch.Size((whole[0], whole[1] * whole[2] * whole[3]) if self.flat else whole)

    def size(self, axis: int | None = None) -> Any:
        return self.shape if axis is None else self.shape[axis]

    def dim(self) -> int:
        return len(self.shape)

    def tensor(self) -> Tensor:
        """As torch would have it, a copy without a gradient."""
        tensor = self.value().tensor()
        return tensor.flatten(1) if self.flat else tensor

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        return torch.flatten(self, start_dim, end_dim)  # type: ignore

    def __add__(self, other: Any) -> Any:
        return torch.add(self, other)  # type: ignore

    __radd__ = __add__

    def __mul__(self, other: Any) -> Any:
        return torch.mul(self, other)  # type: ignore

    __rmul__ = __mul__

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = TABLE.get(function)
        result = NotImplemented if known is None else known(*args, **kwargs)
        return densely(function, args, kwargs) if result is NotImplemented else result


class Positions:
    """(N, C, H * W): what can be averaged over its last dimension."""

    def __init__(self, x: BatchInnermost) -> None:
        self._x = x

    def mean(self, dim: int) -> Tensor:
        """(N, C), a tensor whose gradient finds its way back."""
        assert dim in (2, -1)
        step = Mean(self._x.tape, self._x.value())
        tensor = step.out.tensor().flatten(1)
        if not self._x.tape.recording:
            return tensor
        tensor.requires_grad_()
        self._x.tape.record(_FromTensor(self._x.tape, step.out, tensor))
        return tensor


class _FromTensor:
    """Where torch took over: its gradient of `tensor` is that of `value`."""

    def __init__(self, tape: Tape, value: Value, tensor: Tensor) -> None:
        self.tape = tape
        self.value = value
        self.tensor = tensor

    def backward(self) -> None:
        gradient = torch.zeros_like(self.tensor) if self.tensor.grad is None else self.tensor.grad
        shape = self.value.shape
        whole = gradient.view(shape.images, shape.channels, shape.height, shape.width)
        self.value.give(self.tape.packed(whole, shape))


class _ToTensor:
    """Where torch gave back: the gradient of `value` goes through torch's own graph behind `tensor`."""

    def __init__(self, tape: Tape, value: Value, tensor: Tensor) -> None:
        self.tape = tape
        self.value = value
        self.tensor = tensor

    def backward(self) -> None:
        gradient = self.value.taken(self.tape).whole()
        if self.tensor.requires_grad:
            self.tensor.backward(unpack(gradient, self.value.shape).view(self.tensor.shape))


def densely(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], known: bool = False) -> Any:
    """`function` by torch, on unpacked copies; its result is packed again. Said once, unless `known` to be so."""
    every = [
        one for value in (*args, *kwargs.values()) for one in (value if isinstance(value, list | tuple) else [value])
    ]
    found = [one for one in every if isinstance(one, BatchInnermost)]
    tape = found[0].tape
    if not known:
        name = getattr(function, "__name__", str(function))
        tape.say_once(f"compute=sparse has no kernel for {name} as it is used here: torch computes it densely")
    leaves: dict[int, Tensor] = {}
    for one in found:
        leaf = one.tensor()
        if tape.recording and one.value().needs_gradient:
            leaf.requires_grad_()
            tape.record(_FromTensor(tape, one.value(), leaf))
        leaves[id(one)] = leaf
    if kwargs.get("inplace"):
        kwargs = {**kwargs, "inplace": False}  # a leaf may not change, and nobody else reads the copy
    with torch.set_grad_enabled(tape.recording):
        result = function(*_with(leaves, args), **dict(zip(kwargs, _with(leaves, kwargs.values()), strict=True)))
    if not isinstance(result, Tensor) or result.dim() not in (2, 4) or result.shape[0] != found[0].shape[0]:
        return result
    whole = result if result.dim() == 4 else result[:, :, None, None]
    number, channels, height, width = whole.shape
    shape = Shape(number, channels, height, width, found[0].value().shape.block)
    value = Value(shape, tape.packed(whole.detach(), shape), tape.recording)
    tape.record(_ToTensor(tape, value, result))
    return BatchInnermost(tape, value, flat=result.dim() == 2)


def _with(leaves: dict[int, Tensor], values: Iterable[Any]) -> list[Any]:
    """The values, with tensors in place of blocked maps; lists of maps too."""
    return [
        [leaves.get(id(part), part) for part in one] if isinstance(one, list | tuple) else leaves.get(id(one), one)
        for one in values
    ]


def _conv2d(
    input: BatchInnermost,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    live = input.tape.live.get(weight) if isinstance(weight, torch.nn.Parameter) else None
    if live is None or isinstance(padding, str) or input.flat:
        return NotImplemented
    filter = Filter(tuple(weight.shape), _pair(stride), _pair(padding), _pair(dilation), groups)  # type: ignore[arg-type]
    z = filter.output(input.pending.shape)
    if input.shape[1] != weight.shape[1] * groups or min(z.height, z.width) < 1:
        return NotImplemented  # for torch to refuse in its own words
    return BatchInnermost(input.tape, Conv(input.tape, input.value(), live, filter, bias))


def _linear(input: BatchInnermost, weight: Tensor, bias: Any = None) -> Any:
    """On a flattened map: a convolution whose kernel is the map."""
    live = input.tape.live.get(weight) if isinstance(weight, torch.nn.Parameter) else None
    if live is None or not input.flat or input.shape[1] != weight.shape[1]:
        return NotImplemented
    x = input.value()
    filter = Filter((weight.shape[0], x.shape.channels, x.shape.height, x.shape.width))
    return BatchInnermost(input.tape, Conv(input.tape, x, live, filter, bias), flat=True)


def _batch_norm(
    input: BatchInnermost,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    pending, tape = input.pending, input.tape
    if input.flat or weight is None or bias is None:
        return NotImplemented
    if training:
        if not isinstance(pending, Conv):
            return NotImplemented
        pending.centred = True
        z, moments = pending.with_moments()
        if running_mean is not None and running_var is not None:
            _follow(running_mean, running_var, moments, z.shape, momentum)
    else:
        assert running_mean is not None and running_var is not None
        z, moments = input.value(), Moments(_double(running_mean), _double(running_var))
    deviation = 1.0 / np.sqrt(moments.variance + eps)
    numbers, scale = tape.numbers, deviation * _double(weight)
    affine = Affine(numbers(moments.mean), numbers(scale), numbers(bias), deviation, training, weight, bias)
    return BatchInnermost(tape, Norm(tape, z, affine))


def _double(numbers: Tensor) -> NDArray[np.float64]:
    return numbers.detach().numpy().astype(np.float64)


def _follow(running_mean: Tensor, running_var: Tensor, moments: Moments, shape: Shape, momentum: float) -> None:
    """Running statistics as torch keeps them: of the unbiased variance."""
    number = shape.images * shape.height * shape.width
    unbiased = moments.variance * (number / max(1, number - 1))
    for running, now in ((running_mean, moments.mean), (running_var, unbiased)):
        kept = running.numpy()  # the same memory
        kept[:] = kept * (1.0 - momentum) + now * momentum


def _activation(ends: tuple[float, float]) -> Callable[..., Any]:
    def activation(input: BatchInnermost, inplace: bool = False) -> Any:
        pending = input.pending
        if not isinstance(pending, Norm) or pending.ends is not None or pending.pools:
            pending = plain(input.tape, input.value())
        return BatchInnermost(input.tape, joined(pending, ends=ends), input.flat)

    return activation


def _hardtanh(input: BatchInnermost, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Any:
    return _activation((min_val, max_val))(input)


def _add(input: Any, other: Any, *, alpha: float = 1) -> Any:
    if (
        not (isinstance(input, BatchInnermost) and isinstance(other, BatchInnermost))
        or alpha != 1
        or input.shape != other.shape
    ):
        return NotImplemented
    first, second = (input, other) if _is_open(input) else (other, input)
    residual = second.value()
    norm = first.pending if _is_open(first) else plain(first.tape, first.value())
    assert isinstance(norm, Norm)
    return BatchInnermost(input.tape, joined(norm, residual=residual), input.flat)


def _is_open(x: BatchInnermost) -> bool:
    return isinstance(x.pending, Norm) and x.pending.open


def _mul(input: Any, other: Any) -> Any:
    """A scalar parameter times a convolution: the scale of a shared weight."""
    factor, x = (other, input) if isinstance(input, BatchInnermost) else (input, other)
    pending = x.pending
    scalar = isinstance(factor, torch.nn.Parameter) and factor.dim() == 0
    if not scalar or not isinstance(pending, Conv) or pending.factor is not None or pending.bias is not None:
        return NotImplemented
    scaled = Conv(pending.tape, pending.x, pending.live, pending.filter, None, factor)
    return BatchInnermost(x.tape, scaled, x.flat)


def _max_pool2d(
    input: BatchInnermost,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    kernel, pad = _pair(kernel_size), _pair(padding)
    step = kernel if stride in (None, [], ()) else _pair(stride)
    if _pair(dilation) != (1, 1) or ceil_mode or return_indices:
        return NotImplemented
    pending, square = input.pending, (kernel, step, pad) == ((2, 2), (2, 2), (0, 0))
    square = square and min(pending.shape.height, pending.shape.width) > 1
    if square and isinstance(pending, Norm) and pending.residual is None and not pending.pools:
        return BatchInnermost(input.tape, joined(pending, pools=True))
    return BatchInnermost(input.tape, MaxPool(input.tape, input.value(), kernel, step, pad).out)


def _adaptive_avg_pool2d(input: BatchInnermost, output_size: Any) -> Any:
    size = _pair(output_size)
    if size == tuple(input.shape[2:]):
        return input
    return BatchInnermost(input.tape, Mean(input.tape, input.value()).out) if size == (1, 1) else NotImplemented


def _flatten(input: BatchInnermost, start_dim: int = 0, end_dim: int = -1) -> Any:
    if input.flat and start_dim == 1:
        return input
    if input.flat or end_dim not in (-1, 3) or start_dim not in (1, 2):
        return NotImplemented
    return BatchInnermost(input.tape, input.pending, flat=True) if start_dim == 1 else Positions(input)


def _dropout(input: BatchInnermost, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """By torch, so that the same positions drop as in dense arithmetic."""
    if not training or p == 0.0:
        return input
    return densely(functional.dropout, (input,), {"p": p, "training": True}, known=True)


def _dynamic_relu(x: BatchInnermost, coefficients: Tensor) -> Any:
    return NotImplemented if x.flat else BatchInnermost(x.tape, DynamicReLU(x.tape, x.value(), coefficients).out)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value) * (1 if len(value) == 2 else 2)  # type: ignore[return-value]


TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.conv2d: _conv2d,
    functional.linear: _linear,
    functional.batch_norm: _batch_norm,
    functional.relu: _activation(RELU),
    functional.hardtanh: _hardtanh,
    torch.add: _add,
    Tensor.add: _add,
    Tensor.__add__: _add,
    torch.mul: _mul,
    Tensor.mul: _mul,
    Tensor.__mul__: _mul,
    functional.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
    functional.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    torch.flatten: _flatten,
    functional.dropout: _dropout,
    dynamic_relu: _dynamic_relu,
}
