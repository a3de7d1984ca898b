"""What a network costs: multiply-adds of one image, dense and with live weights only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_lab.sparsity.images import Shape, image_like, send
from sparse_lab.sparsity.masks import Counted, is_excluded, maskable
from sparse_lab.sparsity.scores import evaluating


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
    mode.
    """
    found = {name: tied.layers for name, tied in maskable(model).items()}
    uses: dict[str, int] = dict.fromkeys(found, 0)
    names = {module: name for name, tied in found.items() for module in tied}
    hooks = [module.register_forward_hook(_count_uses(uses, name)) for module, name in names.items()]
    # attention multiplies by the weight of its last layer and does not call it
    attentions = [one for one in model.modules() if isinstance(one, nn.MultiheadAttention) and one.out_proj in names]
    hooks += [one.register_forward_hook(_count_uses(uses, names[one.out_proj])) for one in attentions]
    try:
        with torch.no_grad(), evaluating(model):
            send(model, image_like(model, shape))
    finally:
        for hook in hooks:
            hook.remove()
    costs = []
    for name, (module, *_) in found.items():
        total = module.weight.numel()
        mask = getattr(module, "mask", None)
        kept = total if mask is None else int(mask.sum())
        multiplied = total if hasattr(module, "offset") else kept
        counted = not is_excluded(module)
        costs.append(LayerCost(name, kept, total, total * uses[name], multiplied * uses[name], counted))
    return costs


def _count_uses(uses: dict[str, int], name: str):  # type: ignore[no-untyped-def]
    def hook(module: Counted | nn.MultiheadAttention, inputs: tuple[Tensor, ...], output: Any) -> None:
        # each weight multiplies once at each output position: of C channels [1, C, H, W] has H * W, [1, T, C] has T
        if isinstance(module, nn.MultiheadAttention):
            uses[name] += output[0].numel() // module.embed_dim
        else:
            uses[name] += output.numel() // len(module.weight)

    return hook
