"""Nothing trains dense in silence: a network whose masks hang on no optimizer says so at its first step."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from sparse_lab.errors import SparseLabError

# network -> (its weights' identities, was it ever attached); looked at before each step of any optimizer while there is
# any
_waiting: WeakKeyDictionary[nn.Module, tuple[frozenset[int], bool]] = WeakKeyDictionary()
_hook: RemovableHandle | None = None


def watch(network: nn.Module, weights: Iterable[Tensor], detached: bool = False) -> None:
    """Look out for an optimizer that moves these weights. It is stopped; where they were `detached` it is told of once.

    Raises SparseLabError, from that optimizer's step.
    """
    global _hook
    _waiting[network] = (frozenset(id(weight) for weight in weights), detached)
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_look)


def forget(network: nn.Module) -> None:
    """The masks of this network hold, or are gone."""
    global _hook
    _waiting.pop(network, None)
    if not _waiting and _hook is not None:
        _hook.remove()
        _hook = None


def _look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for network, (weights, detached) in list(_waiting.items()):
        if not weights & moved:
            continue
        if not detached:
            raise SparseLabError(
                f"this optimizer moves the weights of {type(network).__name__}, and its masks would not hold: call "
                "handle.attach(optimizer) first"
            )
        forget(network)
        warnings.warn(
            f"the masks of {type(network).__name__} are detached, and it trains dense: handle.attach(optimizer) lets "
            "them hold again, handle.remove_masks() takes them off",
            stacklevel=5,
        )
