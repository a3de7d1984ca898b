"""The operations that a trace may hold: pure functions of ATen, by their names there. Nothing else is ever called."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

_WEIGHTED = """
conv1d conv2d conv3d conv_transpose1d conv_transpose2d.input conv_transpose3d.input linear
matmul mm bmm mv addmm baddbmm einsum scaled_dot_product_attention
layer_norm group_norm rms_norm native_layer_norm native_group_norm prelu
"""
_POINTWISE = """
relu relu6 hardtanh clamp clamp.Tensor clamp_min clamp_max sigmoid hardsigmoid silu hardswish gelu elu selu celu
leaky_relu mish softplus tanh glu threshold log_sigmoid hardshrink softshrink softmax.int log_softmax.int
_softmax _log_softmax logsumexp erf exp exp2 expm1 log log2 log1p sqrt rsqrt reciprocal abs neg sin cos square sign
floor ceil round trunc pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar maximum minimum max.other min.other where.self
where.ScalarSelf where.ScalarOther where.Scalar add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Tensor rsub.Scalar
mul.Tensor mul.Scalar div.Tensor div.Scalar div.Tensor_mode floor_divide addcmul addcdiv lerp.Scalar lerp.Tensor
remainder.Scalar remainder.Tensor eq.Scalar eq.Tensor ne.Scalar ne.Tensor lt.Scalar lt.Tensor le.Scalar le.Tensor
gt.Scalar gt.Tensor ge.Scalar ge.Tensor logical_and logical_or logical_not logical_xor bitwise_and.Tensor
bitwise_or.Tensor bitwise_not masked_fill.Scalar masked_fill.Tensor nan_to_num isnan isfinite isinf
"""
_POOLS = """
max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d max_pool2d_with_indices _adaptive_avg_pool2d
mean mean.dim sum sum.dim_IntList prod prod.dim_int amax amin max.dim min.dim max min argmax argmin
var.correction std.correction var_mean.correction var.dim std.dim linalg_vector_norm norm.ScalarOpt_dim
norm.Scalar cumsum cosine_similarity any any.dim all all.dim
"""
_SHAPES = """
reshape reshape_as permute transpose.int t flatten.using_ints unflatten.int unsqueeze squeeze squeeze.dim
squeeze.dims expand expand_as repeat repeat_interleave.self_int cat stack split.Tensor split_with_sizes chunk
tensor_split.sections unbind.int select.int slice.Tensor narrow movedim.int movedim.intlist swapaxes moveaxis.int
index.Tensor index_select gather take_along_dim roll flip rot90 pixel_shuffle pixel_unshuffle channel_shuffle
pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d unfold im2col
upsample_nearest2d upsample_nearest2d.vec upsample_bilinear2d upsample_bilinear2d.vec upsample_bicubic2d
upsample_bicubic2d.vec _upsample_bilinear2d_aa _upsample_bilinear2d_aa.vec _upsample_bicubic2d_aa
_upsample_bicubic2d_aa.vec
tril triu diagonal slice_scatter select_scatter index_put scatter.src scatter.value index_add broadcast_tensors
meshgrid meshgrid.indexing one_hot embedding
"""
_NUMBERS = """
zeros ones full arange arange.start arange.start_step linspace eye new_zeros new_ones new_full zeros_like
ones_like full_like scalar_tensor fill.Scalar fill.Tensor _to_copy to.dtype type_as
"""

NAMES = frozenset(f"{_WEIGHTED}{_POINTWISE}{_POOLS}{_SHAPES}{_NUMBERS}".split())
COPIED = ("view", "_unsafe_view")  # a reshape where memory lies as it does here; in a trace nobody knows how it lies
VIEWS = frozenset(_SHAPES.split()) | frozenset(COPIED)  # what may share memory with what it reads
# what changes no number, or only while training: it leaves no step behind
PASSED = frozenset(
    ("clone", "contiguous", "detach", "alias", "lift", "lift_fresh_copy", "dropout", "feature_dropout", "alpha_dropout")
)
# what torch.export puts between: looks at sizes that were looked at already
LOOKS = frozenset(
    ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size", "sym_size.int")
)
ELSEWHERE = frozenset(("device", "layout", "pin_memory", "memory_format", "non_blocking", "copy"))  # changes no number


def batch_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> Tensor:
    """With the statistics that it was given."""
    return torch.batch_norm(input, weight, bias, mean, variance, False, 0.0, eps, False)


def channel_affine(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(N, C, ...) times a number a channel, plus one."""
    size = (-1, *(1,) * (input.dim() - 2))
    return input * weight.view(size) + bias.view(size)


def item(values: list[Tensor], number: int) -> Tensor:
    """One of several results."""
    return operator.getitem(values, number)


OWN: dict[str, tuple[Callable[..., Any], Mapping[str, Any]]] = {
    "batch_norm": (batch_norm, dict.fromkeys(("input", "weight", "bias", "mean", "variance", "eps"))),
    "channel_affine": (channel_affine, dict.fromkeys(("input", "weight", "bias"))),
    "item": (item, dict.fromkeys(("values", "number"))),
}


def is_known(name: object) -> bool:
    """Is this the name of an operation that a trace may hold?"""
    return isinstance(name, str) and (name in NAMES or name in OWN)


@cache
def function(name: str) -> Callable[..., Any]:
    """What computes the operation, called with its arguments by name. Raise KeyError for one that is not listed."""
    if name in OWN:
        return OWN[name][0]
    if name not in NAMES:
        raise KeyError(name)
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")  # type: ignore[no-any-return]


@cache
def defaults(name: str) -> Mapping[str, Any]:
    """The operation's arguments in order, and what they are where they are not given."""
    if name in OWN:
        return OWN[name][1]
    arguments = function(name)._schema.arguments  # type: ignore[attr-defined]
    return {one.name: one.default_value if one.has_default_value() else None for one in arguments}
