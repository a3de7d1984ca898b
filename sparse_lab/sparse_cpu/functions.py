"""The functions of torch that kernels answer: torch's modules and operators call them with maps and masked weights.

Each takes the tape and torch's own arguments, tensors and maps alike, and returns NotImplemented where no kernel does
what is asked: torch computes that.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from sparse_lab.models.dyrelu import dynamic_relu
from sparse_lab.sparse_cpu import statistics_kernels
from sparse_lab.sparse_cpu.affine_sum import Affine
from sparse_lab.sparse_cpu.autograd import Tape, Value
from sparse_lab.sparse_cpu.conv import Conv, Filter, Moments, moments_of
from sparse_lab.sparse_cpu.dynamic_relu import DynamicReLU
from sparse_lab.sparse_cpu.layout import Shape
from sparse_lab.sparse_cpu.maps import BatchInnermost, Map, Pending, entry
from sparse_lab.sparse_cpu.ops import (
    Concatenation,
    Gate,
    LayerNorm,
    MaxPool,
    Mean,
    Norm,
    Pointwise,
    PointwiseStep,
    Slice,
    joined,
    plain,
)
from sparse_lab.sparse_cpu.reading import FLAT, MAP, Reading, bare, is_view, regrouped, same
from sparse_lab.sparse_cpu.sparse_weights import SparseWeight

Answer = Callable[..., Any]
DTYPES = (torch.float32, torch.float64)
RELU = (0.0, float("inf"))
TOKENS: dict[int, Reading] = {2: ((0,), (1,)), 3: ((0,), (3,), (1,)), 4: ((0,), (2,), (3,), (1,))}  # by dimensions


def _live(tape: Tape, weight: Any) -> SparseWeight | None:
    return tape.live.get(weight) if isinstance(weight, torch.nn.Parameter) else None


def _enters(tape: Tape, x: Any) -> bool:
    """Can kernels work on this tensor of torch's? Masked weights are read as weights alone."""
    return (
        isinstance(x, Tensor)
        and _live(tape, x) is None
        and x.dtype == tape.kind
        and x.device.type == "cpu"
        and x.layout == torch.strided
    )


def _entry(tape: Tape, tensor: Tensor, reading: Reading, shape: Shape | None = None) -> Value:
    """The map that a tensor is; of what is read several times in a row (queries, keys, values) made once."""
    seen = None if tensor.is_inference() else (tensor._version, reading, shape)
    for known, how, value in tape.entered or ():
        if known() is tensor and how == seen and seen is not None:
            return value
    value = entry(tape, tensor, reading, shape)
    if tape.entered is not None:
        tape.entered = [(weakref.ref(tensor), seen, value)]
    return value


def _shape(x: Any) -> tuple[int, ...]:
    return x.read_shape if isinstance(x, BatchInnermost) else tuple(x.shape)


def _map(tape: Tape, x: Any) -> Map | None:
    """As (N, C, H, W), or None."""
    if isinstance(x, BatchInnermost):
        if same(x.reading, MAP, x.sizes):
            return x.map
        x = x.plain()
    if not _enters(tape, x) or x.dim() != 4 or x.numel() == 0:
        return None
    return Map(tape, _entry(tape, x, MAP))


def _last_is_channels(x: Any) -> bool:
    return isinstance(x, BatchInnermost) and bare(x.reading, x.sizes)[-1:] == bare(((1,),), x.sizes)


def _made(tape: Tape, pending: Pending, reading: Reading = MAP) -> BatchInnermost:
    return BatchInnermost(Map(tape, pending, reading))


def _changed(x: BatchInnermost, pending: Pending) -> BatchInnermost:
    """What has been computed of each number of x by itself, read as x is."""
    return BatchInnermost(Map(x.tape, pending, x.map.home), x.reading)


def _in_place(function: Answer) -> Answer:
    """`function` of each number of its first argument, which becomes what comes out."""

    @wraps(function)  # what it can be asked stands in its signature
    def answer(tape: Tape, input: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(input, BatchInnermost) or input.map.is_seen:
            return NotImplemented  # a view of torch's may look at it
        result = function(tape, input, *args, **kwargs)
        if not isinstance(result, BatchInnermost):
            return NotImplemented
        input.map.replace(result.map.pending)
        return input

    return answer


def _either(function: Answer) -> Answer:
    """`function`, in place where `inplace` says so."""
    there = _in_place(function)

    @wraps(function)
    def answer(tape: Tape, input: Any, *args: Any, inplace: bool = False, **kwargs: Any) -> Any:
        return (there if inplace else function)(tape, input, *args, **kwargs)

    return answer


def _conv2d(
    tape: Tape, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Any:  # fmt: skip
    live = _live(tape, weight)
    if live is None or isinstance(padding, str):
        return NotImplemented
    shape, sizes = tuple(weight.shape), _shape(input)
    if len(shape) != 4 or len(sizes) != 4:
        return NotImplemented
    filter = Filter(shape, _pair(stride), _pair(padding), _pair(dilation), groups)
    if sizes[1] != shape[1] * groups or weight.dtype != tape.kind:
        return NotImplemented  # for torch to refuse in its own words
    x = _map(tape, input)
    if x is None:
        return NotImplemented
    value = x.value()
    conv = Conv(tape, value, live, filter, bias)
    return NotImplemented if min(conv.shape.height, conv.shape.width) < 1 else _made(tape, conv)


def _linear(tape: Tape, input: Any, weight: Any, bias: Any = None) -> Any:
    """On channels a 1x1 convolution; on a flattened map one whose kernel is the map."""
    live = _live(tape, weight)
    sizes = _shape(input)
    if live is None or not sizes or sizes[-1] != weight.shape[1] or math.prod(sizes) == 0 or weight.dtype != tape.kind:
        return NotImplemented
    if isinstance(input, BatchInnermost) and same(input.reading, FLAT, input.sizes):
        filter = Filter((weight.shape[0], *input.sizes[1:]))
        return _made(tape, Conv(tape, input.value(), live, filter, bias), TOKENS[2])
    if _last_is_channels(input):
        x, reading = input.value(), input.reading
    else:
        tokens = input.plain() if isinstance(input, BatchInnermost) else input
        if not _enters(tape, tokens) or tokens.dim() < 2:
            return NotImplemented
        reading = TOKENS[min(3, tokens.dim())]
        folded = tokens if tokens.dim() <= 3 else tokens.reshape(-1, *sizes[-2:])
        x = _entry(tape, folded, reading)
    conv = Conv(tape, x, live, Filter((*weight.shape, 1, 1)), bias)
    made = _made(tape, conv, tuple((1,) if place == len(reading) - 1 else group for place, group in enumerate(reading)))
    whole = (*sizes[:-1], weight.shape[0])
    return made if made.read_shape == whole else made.plain().view(whole)


def _batch_norm(
    tape: Tape,
    input: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not isinstance(input, BatchInnermost) or not same(input.reading, MAP, input.sizes):
        return NotImplemented
    number, _, height, width = input.sizes
    if weight is None or bias is None or (training and number * height * width == 1):
        return NotImplemented
    if any(one is not None and one.dtype not in DTYPES for one in (running_mean, running_var, weight, bias)):
        return NotImplemented
    pending = input.map.pending
    if training:
        if isinstance(pending, Conv):
            z, moments = pending.with_moments()
        else:
            z = input.value()
            moments = moments_of(z)
        if running_mean is not None and running_var is not None:
            _follow(running_mean, running_var, moments, z.shape, momentum)
    elif running_mean is None or running_var is None:
        return NotImplemented
    else:
        z, moments = input.value(), Moments(_double(running_mean), _double(running_var))
    deviation, numbers = np.empty_like(moments.mean), np.empty((3, len(moments.mean)), tape.dtype)
    learned = weight.detach().numpy(), bias.detach().numpy()
    statistics_kernels.affine(moments.mean, moments.variance, *learned, float(eps), deviation, numbers)
    mean, scale, shift = numbers
    return _changed(input, Norm(tape, z, Affine(mean, scale, shift, deviation, training, weight, bias)))


def _double(numbers: Tensor) -> NDArray[np.float64]:
    return numbers.detach().numpy().astype(np.float64)


def _follow(running_mean: Tensor, running_var: Tensor, moments: Moments, shape: Shape, momentum: float) -> None:
    number = shape.images * shape.height * shape.width
    running = running_mean.numpy(), running_var.numpy()  # the same memory
    statistics_kernels.follow(*running, moments.mean, moments.variance, number, float(momentum))


def _layer_norm(
    tape: Tape,
    input: Any,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    if len(normalized_shape) != 1 or not _last_is_channels(input) or input.shape[-1] != normalized_shape[0]:
        return NotImplemented
    return _changed(input, LayerNorm(tape, input.value(), weight, bias, eps).value())


def _clamp(ends: tuple[float, float]) -> Answer:
    def activation(tape: Tape, input: Any) -> Any:
        if not isinstance(input, BatchInnermost):
            return NotImplemented
        pending = input.map.pending
        if not isinstance(pending, Norm) or pending.ends is not None or pending.pools:
            pending = plain(tape, input.value())
        return _changed(input, joined(pending, ends=ends))

    return activation


_relu = _clamp(RELU)


def _hardtanh(tape: Tape, input: Any, min_val: float = -1.0, max_val: float = 1.0) -> Any:
    return _clamp((min_val, max_val))(tape, input)


def _relu6(tape: Tape, input: Any) -> Any:
    return _clamp((0.0, 6.0))(tape, input)


def _pointwise(function: Pointwise) -> Answer:
    def answer(tape: Tape, input: Any) -> Any:
        if not isinstance(input, BatchInnermost):
            return NotImplemented
        return _changed(input, PointwiseStep(tape, input.value(), function).value())

    return answer


_aten = torch.ops.aten
SILU = Pointwise(
    lambda x, out: _aten.silu.out(x, out=out), lambda g, x, out: _aten.silu_backward.grad_input(g, x, grad_input=out)
)
HARDSWISH = Pointwise(
    lambda x, out: _aten.hardswish.out(x, out=out), lambda g, x, out: _aten.hardswish_backward.out(g, x, out=out)
)
SIGMOID = Pointwise(
    lambda x, out: _aten.sigmoid.out(x, out=out),
    lambda g, y, out: _aten.sigmoid_backward.grad_input(g, y, grad_input=out),
    reads_output=True,
)
TANH = Pointwise(
    lambda x, out: _aten.tanh.out(x, out=out),
    lambda g, y, out: _aten.tanh_backward.grad_input(g, y, grad_input=out),
    reads_output=True,
)


def _gelu(tape: Tape, input: Any, approximate: str = "none") -> Any:
    how = {"approximate": approximate}
    return _pointwise(
        Pointwise(
            lambda x, out: _aten.gelu.out(x, out=out, **how),
            lambda g, x, out: _aten.gelu_backward.grad_input(g, x, grad_input=out, **how),
        )
    )(tape, input)


def _leaky_relu(tape: Tape, input: Any, negative_slope: float = 0.01) -> Any:
    return _pointwise(
        Pointwise(
            lambda x, out: _aten.leaky_relu.out(x, negative_slope, out=out),
            lambda g, x, out: _aten.leaky_relu_backward.grad_input(g, x, negative_slope, False, grad_input=out),
        )
    )(tape, input)


def _elu(tape: Tape, input: Any, alpha: float = 1.0) -> Any:
    return _pointwise(
        Pointwise(
            lambda x, out: _aten.elu.out(x, alpha, out=out),
            lambda g, x, out: _aten.elu_backward.grad_input(g, alpha, 1, 1, False, x, grad_input=out),
        )
    )(tape, input)


def _add(tape: Tape, input: Any, other: Any, *, alpha: float = 1) -> Any:
    if alpha != 1 or not (isinstance(input, BatchInnermost) or isinstance(other, BatchInnermost)):
        return NotImplemented
    if not isinstance(input, BatchInnermost) or (isinstance(other, BatchInnermost) and _is_open(other)):
        input, other = other, input
    if isinstance(other, bool | int | float):
        ones = np.ones(input.sizes[1], tape.dtype)
        return _changed(input, Norm(tape, input.value(), Affine(0 * ones, ones, tape.dtype.type(other) * ones)))
    residual = _beside(tape, input, other)
    if residual is None:
        return NotImplemented
    norm = input.map.pending if _is_open(input) else plain(tape, input.value())
    assert isinstance(norm, Norm)
    return _changed(input, joined(norm, residual=residual))


def _beside(tape: Tape, x: BatchInnermost, other: Any) -> Value | None:
    """Another map of x's shape, lying as x does."""
    if not isinstance(other, Tensor) or other.shape != x.shape:
        return None
    if isinstance(other, BatchInnermost):
        if other.sizes == x.sizes and same(other.reading, x.reading, x.sizes):
            return other.value()
        other = other.plain()
    return _entry(tape, other, x.reading, x.map.pending.shape) if _enters(tape, other) else None


def _is_open(x: BatchInnermost) -> bool:
    pending = x.map.pending
    return isinstance(pending, Norm) and pending.open


def _mul(tape: Tape, input: Any, other: Any) -> Any:
    if not isinstance(input, BatchInnermost):
        input, other = other, input
    if not isinstance(input, BatchInnermost):
        return NotImplemented
    if isinstance(other, bool | int | float):
        ones = np.ones(input.sizes[1], tape.dtype)
        return _changed(input, Norm(tape, input.value(), Affine(0 * ones, tape.dtype.type(other) * ones, 0 * ones)))
    if not isinstance(other, Tensor) or other.dtype != tape.kind or _live(tape, other) is not None:
        return NotImplemented
    if other.dim() == 0 and not isinstance(other, BatchInnermost):
        return _scaled(tape, input, other)
    if not isinstance(other, BatchInnermost) and _has_channel_shape(other, input):
        return _by_channel(tape, input, other)
    for x, factors in ((input, other), (other, input)):
        if isinstance(x, BatchInnermost) and _is_gate(factors, x):
            return _changed(x, Gate(tape, x.value(), _factors(tape, factors, x)).value())
    return NotImplemented


def _scaled(tape: Tape, x: BatchInnermost, factor: Tensor) -> Any:
    """A convolution times a number that is learned: the scale of a shared weight."""
    conv = x.map.pending
    if not isinstance(conv, Conv) or conv.factor is not None or conv.bias is not None:
        return NotImplemented
    return _changed(x, Conv(tape, conv.x, conv.live, conv.filter, None, factor))


def _is_gate(factors: Any, x: BatchInnermost) -> bool:
    """One factor for each channel of each image, (N, C, 1, 1), or for each image, (N, 1, ..., 1)."""
    sizes = tuple(factors.shape)
    if (
        len(sizes) != len(x.reading)
        or sizes[0] != x.sizes[0]
        or bare(x.reading, x.sizes)[0] != bare(((0,),), x.sizes)[0]
    ):
        return False
    return math.prod(sizes[1:]) == 1 or (sizes[1:] == (x.sizes[1], 1, 1) and same(x.reading, MAP, x.sizes))


def _factors(tape: Tape, factors: Any, x: BatchInnermost) -> Value:
    if (
        isinstance(factors, BatchInnermost)
        and same(factors.reading, MAP, factors.sizes)
        and factors.sizes[1] == x.sizes[1]
    ):
        return factors.value()
    tensor = factors.plain() if isinstance(factors, BatchInnermost) else factors
    return entry(tape, tensor.reshape(x.sizes[0], -1, 1, 1).expand(-1, x.sizes[1], -1, -1), MAP)


def _has_channel_shape(factors: Tensor, x: BatchInnermost) -> bool:
    """One factor for each channel: (C) behind the last dimension, (C, 1, 1) or (1, C, 1, 1) for a map."""
    sizes = [x.sizes[1] if group == (1,) else 1 for group in x.reading]
    wanted = sizes[max(0, len(sizes) - factors.dim()) :]
    return (1,) in x.reading and factors.numel() == x.sizes[1] and list(factors.shape) == wanted


def _by_channel(tape: Tape, x: BatchInnermost, factors: Tensor) -> Any:
    """The scale of a layer."""
    scale = tape.numbers(factors.reshape(-1))
    zeros = np.zeros_like(scale)
    affine = Affine(zeros, scale, zeros, np.ones(len(scale)), weight=factors)
    return _changed(x, Norm(tape, x.value(), affine))


def _max_pool2d(
    tape: Tape,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    kernel, pad = _pair(kernel_size), _pair(padding)
    step = kernel if stride in (None, [], ()) else _pair(stride)
    if _pair(dilation) != (1, 1) or ceil_mode or return_indices or not isinstance(input, BatchInnermost):
        return NotImplemented
    if not same(input.reading, MAP, input.sizes) or 2 * pad[0] > kernel[0] or 2 * pad[1] > kernel[1]:
        return NotImplemented
    pending, square = input.map.pending, (kernel, step, pad) == ((2, 2), (2, 2), (0, 0))
    if min((inside + 2 * p - k) // s for inside, p, k, s in zip(input.sizes[2:], pad, kernel, step, strict=True)) < 0:
        return NotImplemented  # for torch to refuse in its own words
    if square and isinstance(pending, Norm) and pending.residual is None and not pending.pools:
        return _made(tape, joined(pending, pools=True))
    return _made(tape, MaxPool(tape, input.value(), kernel, step, pad).value())


def _adaptive_avg_pool2d(tape: Tape, input: Any, output_size: Any) -> Any:
    if not isinstance(input, BatchInnermost) or not same(input.reading, MAP, input.sizes):
        return NotImplemented
    size = _pair(output_size)
    if size == input.sizes[2:]:
        return input.copied()
    return _made(tape, Mean(tape, input.value()).value()) if size == (1, 1) else NotImplemented


def _mean(tape: Tape, input: Any, dim: Any = None, keepdim: bool = False) -> Any:
    """Over positions. Without them it is a vector an image, of torch's."""
    if not isinstance(input, BatchInnermost) or dim is None:
        return NotImplemented
    asked = [dim] if isinstance(dim, int) else list(dim)
    if any(not -len(input.reading) <= one < len(input.reading) for one in asked):
        return NotImplemented  # for torch to refuse in its own words
    places = {one % len(input.reading) for one in asked}
    reading = bare(input.reading, input.sizes)
    if sorted(axis for place in places for axis in reading[place]) != [a for a in (2, 3) if input.sizes[a] > 1]:
        return NotImplemented
    mean = Mean(tape, input.value()).value()
    if keepdim:
        return _made(tape, mean, tuple(() if place in places else one for place, one in enumerate(input.reading)))
    return Map(tape, mean, tuple(one for place, one in enumerate(input.reading) if place not in places)).plain()


def _read(found: Callable[..., Reading | None]) -> Answer:
    """What reads the same numbers in another order or shape."""

    def answer(tape: Tape, input: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(input, BatchInnermost):
            return NotImplemented
        try:
            reading = found(input, *args, **kwargs)
        except (IndexError, TypeError, ValueError):
            return NotImplemented  # for torch to refuse in its own words
        return NotImplemented if reading is None else input.read_as(reading)

    return answer


def _sequence(first: Any, rest: tuple[Any, ...]) -> list[Any]:
    """`f(x, 1, 2)` and `f(x, (1, 2))` are one."""
    return [first, *rest] if rest or isinstance(first, int) else list(first)


def _permuted(x: BatchInnermost, dims: Any, *rest: Any) -> Reading | None:
    asked = _sequence(dims, rest)
    if any(not -len(x.reading) <= one < len(x.reading) for one in asked):
        return None  # for torch to refuse in its own words
    order = [one % len(x.reading) for one in asked]
    return tuple(x.reading[one] for one in order) if sorted(order) == list(range(len(x.reading))) else None


def _transposed(x: BatchInnermost, dim0: int, dim1: int) -> Reading:
    reading = list(x.reading)
    reading[dim0], reading[dim1] = reading[dim1], reading[dim0]
    return tuple(reading)


def _viewed(x: BatchInnermost, shape: Any, *rest: Any) -> Reading | None:
    if isinstance(shape, torch.dtype):
        return None
    reading = regrouped(x.reading, x.sizes, [int(one) for one in _sequence(shape, rest)])
    return reading if reading is not None and is_view(reading, x.map.home, x.sizes) else None


def _reshaped(x: BatchInnermost, shape: Any, *rest: Any) -> Reading | None:
    return regrouped(x.reading, x.sizes, [int(one) for one in _sequence(shape, rest)])


def _flattened(x: BatchInnermost, start_dim: int = 0, end_dim: int = -1) -> Reading | None:
    number = len(x.reading)
    first, last = start_dim % number, end_dim % number
    if first > last:
        return None
    merged = tuple(axis for group in x.reading[first : last + 1] for axis in group)
    return (*x.reading[:first], merged, *x.reading[last + 1 :])


def _unsqueezed(x: BatchInnermost, dim: int) -> Reading:
    place = dim % (len(x.reading) + 1)
    return (*x.reading[:place], (), *x.reading[place:])


def _squeezed(x: BatchInnermost, *dim: Any) -> Reading:
    number = len(x.reading)
    places = [one % number for one in _sequence(dim[0], dim[1:])] if dim else range(number)
    sizes = x.shape
    return tuple(group for place, group in enumerate(x.reading) if place not in places or sizes[place] > 1)


def _contiguous(tape: Tape, input: Any, memory_format: Any = torch.contiguous_format) -> Any:
    if not isinstance(input, BatchInnermost) or memory_format is not torch.contiguous_format:
        return NotImplemented
    order, home = (
        [axis for group in bare(one, input.sizes) for axis in group] for one in (input.reading, input.map.home)
    )
    return input if order == home else input.copied()


def _clone(tape: Tape, input: Any) -> Any:
    return input.copied() if isinstance(input, BatchInnermost) else NotImplemented


def _cat(tape: Tape, tensors: Any, dim: int = 0) -> Any:
    """Along channels."""
    parts = list(tensors)
    if not all(isinstance(one, BatchInnermost) for one in parts):
        return NotImplemented
    first = parts[0]
    apart = [one.sizes for one in parts if (one.sizes[0], *one.sizes[2:]) != (first.sizes[0], *first.sizes[2:])]
    if apart or any(one.reading != first.reading for one in parts) or first.reading[dim] != (1,):
        return NotImplemented
    return _made(tape, Concatenation(tape, [one.value() for one in parts]).value(), first.reading)


def _chunk(tape: Tape, input: Any, chunks: int, dim: int = 0) -> Any:
    if not isinstance(input, BatchInnermost) or chunks < 1:
        return NotImplemented
    return _split(tape, input, -(-input.shape[dim] // chunks), dim)


def _split(tape: Tape, tensor: Any, split_size_or_sections: Any, dim: int = 0) -> Any:
    """Along channels."""
    x = tensor
    if not isinstance(x, BatchInnermost) or x.reading[dim] != (1,) or x.reading != x.map.home:
        return NotImplemented
    whole, parts = x.sizes[1], split_size_or_sections
    if isinstance(parts, int):
        parts = [min(parts, whole - first) for first in range(0, whole, parts)] if parts > 0 else []
    if sum(parts) != whole or min(parts, default=0) < 1:
        return NotImplemented
    firsts = [sum(parts[:place]) for place in range(len(parts))]
    x.map.is_seen = True
    return tuple(_part(x, slice(first, first + size)) for first, size in zip(firsts, parts, strict=True))


def _part(x: BatchInnermost, channels: slice) -> BatchInnermost:
    part = Slice(x.tape, x.value(), channels).value()
    return BatchInnermost(Map(x.tape, part, x.reading, (x.map, channels)))


def _dropout(tape: Tape, input: Any, p: float = 0.5, training: bool = True) -> Any:
    """Where something drops by torch, so that it is the same as in dense arithmetic."""
    if not isinstance(input, BatchInnermost):
        return NotImplemented
    return input if not training or p == 0.0 else NotImplemented


def _dynamic_relu(tape: Tape, x: Any, coefficients: Tensor) -> Any:
    if not isinstance(x, BatchInnermost) or not same(x.reading, MAP, x.sizes):
        return NotImplemented
    return _made(tape, DynamicReLU(tape, x.value(), coefficients).value())


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value) * (1 if len(value) == 2 else 2)  # type: ignore[return-value]


def _table(*rows: tuple[Answer, Sequence[Any]]) -> dict[Any, Answer]:
    return {function: answer for answer, functions in rows for function in functions}


TABLE: dict[Any, Answer] = _table(
    (_conv2d, [torch.conv2d]),
    (_linear, [functional.linear]),
    (_batch_norm, [functional.batch_norm]),
    (_layer_norm, [functional.layer_norm, torch.layer_norm]),
    (_either(_relu), [functional.relu]),
    (_relu, [torch.relu, Tensor.relu]),
    (_in_place(_relu), [torch.relu_, Tensor.relu_]),
    (_either(_relu6), [functional.relu6]),
    (_either(_hardtanh), [functional.hardtanh]),
    (_either(_pointwise(SILU)), [functional.silu]),
    (_either(_pointwise(HARDSWISH)), [functional.hardswish]),
    (_pointwise(SIGMOID), [torch.sigmoid, Tensor.sigmoid, functional.sigmoid]),
    (_in_place(_pointwise(SIGMOID)), [torch.sigmoid_, Tensor.sigmoid_]),
    (_pointwise(TANH), [torch.tanh, Tensor.tanh, functional.tanh]),
    (_gelu, [functional.gelu]),
    (_either(_leaky_relu), [functional.leaky_relu]),
    (_either(_elu), [functional.elu]),
    (_add, [torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__]),
    (_in_place(_add), [Tensor.add_, Tensor.__iadd__]),
    (_mul, [torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__]),
    (_in_place(_mul), [Tensor.mul_, Tensor.__imul__]),
    (_max_pool2d, [functional.max_pool2d, torch.max_pool2d]),
    (_adaptive_avg_pool2d, [functional.adaptive_avg_pool2d]),
    (_mean, [torch.mean, Tensor.mean]),
    (_read(_permuted), [torch.permute, Tensor.permute]),
    (_read(_transposed), [torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes]),
    (_read(_viewed), [Tensor.view]),
    (_read(_reshaped), [torch.reshape, Tensor.reshape]),
    (_read(_flattened), [torch.flatten, Tensor.flatten]),
    (_read(_unsqueezed), [torch.unsqueeze, Tensor.unsqueeze]),
    (_read(_squeezed), [torch.squeeze, Tensor.squeeze]),
    (_contiguous, [Tensor.contiguous]),
    (_clone, [torch.clone, Tensor.clone]),
    (_cat, [torch.cat, torch.concat, torch.concatenate]),
    (_chunk, [torch.chunk, Tensor.chunk]),
    (_split, [torch.split, Tensor.split]),
    (_either(_dropout), [functional.dropout]),
    (_dynamic_relu, [dynamic_relu]),
)
