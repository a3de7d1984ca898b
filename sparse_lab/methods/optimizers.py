"""Can the masks of a network hang on this optimizer?"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from sparse_lab.algorithms import unattached
from sparse_lab.errors import SparseLabError
from sparse_lab.models import dyrelu, offsets
from sparse_lab.models.weight_sharing import SharedConv2d
from sparse_lab.sparsity.masks import Masks

# what surgery puts into a network with parameters of its own
PUT_IN = (dyrelu.DyReLU, SharedConv2d, offsets.DCTConv2d, offsets.DCTLinear)


def inner_of(optimizer: Any) -> Optimizer:
    """Return the optimizer that does the work, where a library has put one of its own around it. Raise SparseLabError
    for what is none.
    """
    inner = unattached.innermost(optimizer)
    if not isinstance(inner, Optimizer):
        raise SparseLabError(f"attach takes an optimizer of torch.optim, not {type(optimizer).__name__}")
    return inner


def parameters_of(optimizer: Optimizer) -> set[int]:
    """Return the identities of what an optimizer moves."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def check_moved(network: nn.Module, masks: Masks, moved: set[int]) -> None:
    """Raise SparseLabError where an optimizer with these parameters does not move the whole network, but for what is
    frozen.
    """
    weights = masks.weights()
    outside = [name for name, weight in weights.items() if id(weight) not in moved and weight.requires_grad]
    if not any(id(weight) in moved for weight in weights.values()):
        raise SparseLabError(
            f"this optimizer moves none of the {len(weights)} layers of {type(network).__name__} that have masks: make "
            "it of the parameters of the network that was sparsified, and after it was"
        )
    if outside:
        raise SparseLabError(
            f"this optimizer does not move {outside[0]!r}"
            + (f" and {len(outside) - 1} more layers with masks" if len(outside) > 1 else "")
            + ": give it all, freeze the others (requires_grad=False), or leave them out with exclude="
        )
    own = [
        name
        for prefix, module in network.named_modules()
        if isinstance(module, PUT_IN)
        for name, parameter in module.named_parameters(prefix, recurse=isinstance(module, dyrelu.DyReLU))
        if id(parameter) not in moved and parameter.requires_grad
    ]
    if own:
        raise SparseLabError(
            f"this optimizer lacks {len(own)} parameters that sparsify() has put in ({own[0]} first): make the "
            "optimizer after sparsify()"
        )


def check_frozen(masks: Masks, method: str) -> None:
    """Raise SparseLabError where weights are to grow that no optimizer would move."""
    frozen = [name for name, weight in masks.weights().items() if not weight.requires_grad]
    if frozen:
        raise SparseLabError(
            f"{frozen[0]!r} is frozen, and what {method} grows there would never train: unfreeze it, or leave it out "
            "with exclude="
        )
