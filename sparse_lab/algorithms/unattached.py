"""Nothing trains dense in silence: a network whose masks do not hang on the optimizer that moves it says so at that
optimizer's first step.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from sparse_lab.errors import SparseLabError


@dataclass(frozen=True)
class _Watched:
    """weights: their identities. optimizer: on which the masks hang, if they do. detached: did they once?"""

    weights: frozenset[int]
    optimizer: ReferenceType[Optimizer] | None
    detached: bool


# looked at before each step of any optimizer while there is any
_watched: WeakKeyDictionary[nn.Module, _Watched] = WeakKeyDictionary()
_hook: RemovableHandle | None = None


def watch(
    network: nn.Module, weights: Iterable[Tensor], optimizer: Optimizer | None = None, *, detached: bool = False
) -> None:
    """Look out for an optimizer that moves these weights, other than `optimizer`, on which the masks hang. It is
    stopped; where they were `detached` it is told of once.

    Raises SparseLabError, from that optimizer's step.
    """
    global _hook
    held_by = None if optimizer is None else ref(optimizer)
    _watched[network] = _Watched(frozenset(id(weight) for weight in weights), held_by, detached)
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_look)


def forget(network: nn.Module) -> None:
    """The masks of this network are gone."""
    global _hook
    _watched.pop(network, None)
    if not _watched and _hook is not None:
        _hook.remove()
        _hook = None


def innermost(optimizer: Any) -> Any:
    """The optimizer that does the work, where others have been put around it (Fabric's, Lookahead, SAM)."""
    for name in ("optimizer", "base_optimizer"):
        inner = getattr(optimizer, name, None)
        if isinstance(inner, Optimizer):
            return innermost(inner)
    return optimizer


def _look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    inner, moved = innermost(optimizer), None
    for network, watched in list(_watched.items()):
        if watched.optimizer is not None and watched.optimizer() is inner:
            continue
        if moved is None:
            moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if watched.weights & moved:
            _tell(network, watched)


def _tell(network: nn.Module, watched: _Watched) -> None:
    name = type(network).__name__
    if watched.optimizer is not None:
        raise SparseLabError(
            f"this optimizer moves the weights of {name}, and its masks hang on another one: handle.detach(), then "
            "handle.attach(optimizer) with the one that is to move them"
        )
    if not watched.detached:
        raise SparseLabError(
            f"this optimizer moves the weights of {name}, and its masks would not hold: call handle.attach(optimizer) "
            "first"
        )
    forget(network)
    warnings.warn(
        f"the masks of {name} are detached, and it trains dense: handle.attach(optimizer) lets them hold again, "
        "handle.remove_masks() takes them off",
        stacklevel=6,
    )
