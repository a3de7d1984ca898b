"""What a network costs: multiply-adds of one image, dense and with live weights only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from sparse_lab.sparsity.following import WEIGHTED
from sparse_lab.sparsity.images import Shape, image_like, send
from sparse_lab.sparsity.masks import Counted, is_excluded, maskable
from sparse_lab.sparsity.scores import evaluating

OTHER = "products of activations, weights of no layer"
TRANSPOSED = frozenset({f"conv_transpose{number}d" for number in (1, 2, 3)})
FACTOR = {"baddbmm": 1, "addmm": 1}  # which argument's last dimension is summed over; else the first's
PRODUCTS = frozenset({"matmul", "bmm", "mm", "__matmul__", *FACTOR})


@dataclass(frozen=True)
class LayerCost:
    """`macs`: multiply-adds of one image with all weights; `sparse_macs`: with the kept ones. Padding counts as real;
    a shared or tied weight multiplies in every place that uses it, and stands here once. A layer whose weights have a
    dense `offset` multiplies all of them. counted: False of a layer that was left out, which multiplies whole.
    """

    name: str
    kept: int
    total: int
    macs: int
    sparse_macs: int
    counted: bool = True


def layer_costs(model: nn.Module, shape: Shape) -> list[LayerCost]:
    """One entry a layer, counted or left out, in the model's order; runs one image through the network in evaluation
    mode, and counts by the operations that it calls, whoever calls them. What else multiplies, if anything does, has an
    entry of its own at the end: products of two activations (attention), weights that no layer of ours holds.
    """
    found, counter = _counted(model, shape)
    costs = []
    for name, (module, *_) in found.items():
        uses = counter.uses.get(name, 0)
        total = module.weight.numel()
        mask = getattr(module, "mask", None)
        kept = total if mask is None else int(mask.sum())
        multiplied = total if hasattr(module, "offset") or name in counter.derived else kept
        costs.append(LayerCost(name, kept, total, total * uses, multiplied * uses, not is_excluded(module)))
    if counter.other:
        costs.append(LayerCost(OTHER, 0, 0, counter.other, counter.other, False))
    return costs


def derived_layers(model: nn.Module, shape: Shape) -> list[str]:
    """Return the layers that could be counted and multiply by something else than their weight: by what they compute of
    it on their way (weight standardisation), where what is masked is zero no more.
    """
    found, counter = _counted(model, shape)
    return [name for name in found if name in counter.derived and not hasattr(found[name][0], "offset")]


def _counted(model: nn.Module, shape: Shape) -> tuple[dict[str, list[Counted]], _Counter]:
    """The layers, and what was seen when one image went through."""
    found = {name: tied.layers for name, tied in maskable(model).items()}
    counter = _Counter({id(module.weight): name for name, tied in found.items() for module in tied})
    hooks = [hook for name, tied in found.items() for module in tied for hook in counter.follow(module, name)]
    hooks += [
        hook for one in model.modules() if not getattr(one, "counted", True) for hook in counter.follow(one, None)
    ]
    try:
        with torch.no_grad(), evaluating(model), counter:
            send(model, image_like(model, shape))
    finally:
        for hook in hooks:
            hook.remove()
    return found, counter


class _Counter(TorchFunctionMode):
    """Sees every function of torch that is called. uses: how often each layer's weight multiplies; derived: the
    layers that multiply by what they compute of it; other: multiply-adds of all else.
    """

    def __init__(self, weights: dict[int, str]) -> None:
        super().__init__()
        self.weights = weights
        self.uses: dict[str, int] = {}
        self.derived: set[str] = set()
        self.other = 0
        # the layers whose forward is running: what one computes of its weight is its weight
        self._inside: list[str | None] = []

    def follow(self, module: nn.Module, name: str | None) -> list[RemovableHandle]:
        """Know when a layer is being called, or a module that is not counted at all (None), until the hooks that are
        returned are removed.
        """
        return [
            module.register_forward_pre_hook(lambda module, inputs: self._inside.append(name)),
            module.register_forward_hook(lambda module, inputs, output: self._inside.pop() and None),
        ]

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        made = function(*args, **kwargs)
        if None in self._inside:
            return made
        given = (*args, *kwargs.values())
        if name in WEIGHTED or name in TRANSPOSED:
            weight: Tensor = args[1] if len(args) > 1 else kwargs["weight"]
            # each weight multiplies once at each output position: of C channels [1, C, H, W] has H * W, [1, T, C] has T
            positions = given[0].numel() if name in TRANSPOSED else made.numel()
            self._weighted(weight, positions // len(weight))
        elif name == "multi_head_attention_forward":
            self._attention(given)
        elif name in PRODUCTS and isinstance(made, Tensor):
            self.other += made.numel() * given[FACTOR.get(name, 0)].shape[-1]
        elif name == "scaled_dot_product_attention":
            self.other += given[0].shape[:-1].numel() * given[1].shape[-2] * (given[0].shape[-1] + given[2].shape[-1])
        elif name == "einsum":
            self.other += _einsum(given)
        return made

    def _weighted(self, weight: Tensor, uses: int) -> None:
        layer = self.weights.get(id(weight))
        if layer is None and self._inside:
            layer = self._inside[-1]
            self.derived.add(str(layer))
        if layer is None:
            self.other += weight.numel() * uses
        else:
            self.uses[layer] = self.uses.get(layer, 0) + uses

    def _attention(self, given: tuple[Any, ...]) -> None:
        """torch's own, of (tokens, images, channels): packed weights, which no layer holds, and a last layer's."""
        (query, key, value, dim), out = given[:4], given[11]
        tokens, others = query.shape[:-1].numel(), key.shape[:-1].numel()
        self.other += dim * (query.shape[-1] * tokens + key.shape[-1] * others + value.shape[-1] * others)
        self.other += 2 * dim * tokens * key.shape[0]
        self._weighted(out, tokens)


def _einsum(given: tuple[Any, ...]) -> int:
    """Multiply-adds of a product by an equation: one for each combination of its indices."""
    equation, *operands = given
    flat = [one for value in operands for one in (value if isinstance(value, (list, tuple)) else [value])]
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, flat, strict=False):
        named = term.replace("...", "")
        rest = operand.shape[: operand.dim() - len(named)].numel() if "..." in term else 1
        sizes["..."] = max(sizes.get("...", 1), rest)
        sizes |= dict(zip(named, operand.shape[operand.dim() - len(named) :], strict=False))
    return math.prod(sizes.values())
