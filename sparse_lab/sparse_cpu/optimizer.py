"""An optimizer that moves live weights only: as many updates as there are weights, not as there are positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparse_lab.sparse_cpu import optimizer_kernels as kernels
from sparse_lab.sparse_cpu.sparse_weights import SparseWeight


class LiveOptimizer(torch.optim.Optimizer):
    """SGD, Adam or AdamW of torch, but a weight with a live gradient moves at its live positions alone.

    `rest` is torch's optimizer as the recipe makes it. It does what has a dense gradient alone, and its state (names,
    shapes, step counts) is the state here, so that checkpoints of dense and sparse arithmetic are of one kind. Where a
    weight has a dense gradient beside the live one, the dense one is for others to look at.

    stepped: the weights that the last step moved at live positions alone; what is masked of them is as it was before.

    Raises TypeError for another optimizer, and ValueError for options of torch's that recipes do not set.
    """

    def __init__(self, rest: torch.optim.Optimizer, live: Mapping[nn.Parameter, SparseWeight]) -> None:
        for group in rest.param_groups:
            unknown = [name for name in ("dampening", "maximize", "amsgrad") if group.get(name)]
            if unknown:
                raise ValueError(f"live weights know no {unknown[0]}={group[unknown[0]]}")
        moves: dict[type, Callable[[Tensor, SparseWeight, dict[str, Any], Any], None]] = {
            torch.optim.SGD: _sgd,
            torch.optim.Adam: _adam,
            torch.optim.AdamW: _adam,
        }
        if type(rest) not in moves:
            raise TypeError(f"live weights cannot be moved by {type(rest).__name__}")
        super().__init__(rest.param_groups, rest.defaults)
        self.live = live
        self.stepped: frozenset[Tensor] = frozenset()
        self._rest = rest
        self._move = moves[type(rest)]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Compute by `closure`, then move every weight that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        dense: dict[Tensor, Tensor | None] = {}
        for group in self.param_groups:
            for weight in group["params"]:
                live = self.live.get(weight)
                if live is not None and live.gradient is not None:
                    self._move(weight, live, group, self.state)
                    torch.autograd.graph.increment_version(weight)
                    dense[weight], weight.grad = weight.grad, None
        # loading a checkpoint puts new ones in place
        self._rest.state, self._rest.param_groups = self.state, self.param_groups
        self._rest.step()
        for weight, gradient in dense.items():
            weight.grad = gradient
        self.stepped = frozenset(dense)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for live in self.live.values():
            live.gradient = None


def _sgd(weight: Tensor, live: SparseWeight, group: dict[str, Any], states: Any) -> None:
    flat, gradient = _flat(weight), live.gradient
    number = flat.dtype.type
    lr, decay = number(group["lr"]), number(group["weight_decay"])
    if group["momentum"] == 0:
        kernels.sgd(flat, live.positions, gradient, lr, decay)
        return
    state = states[weight]
    first = state.get("momentum_buffer") is None
    if first:
        state["momentum_buffer"] = torch.zeros_like(weight)
    velocity, momentum = _flat(state["momentum_buffer"]), number(group["momentum"])
    kernels.sgd_momentum(flat, velocity, live.positions, gradient, lr, decay, momentum, bool(group["nesterov"]), first)


def _adam(weight: Tensor, live: SparseWeight, group: dict[str, Any], states: Any) -> None:
    state = states[weight]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.get_default_dtype())
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
    state["step"] += 1
    steps, (beta1, beta2) = float(state["step"]), group["betas"]
    lr, decay, decoupled = group["lr"], group["weight_decay"], group["decoupled_weight_decay"]
    flat = _flat(weight)
    numbers = (
        1.0 - lr * decay if decoupled else 1.0,
        0.0 if decoupled else decay,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        lr / (1.0 - beta1**steps),
        math.sqrt(1.0 - beta2**steps),
        group["eps"],
    )
    kernels.adam(
        flat,
        _flat(state["exp_avg"]),
        _flat(state["exp_avg_sq"]),
        live.positions,
        live.gradient,
        *(flat.dtype.type(one) for one in numbers),
    )


def _flat(tensor: Tensor) -> NDArray[np.floating]:
    """The tensor's own memory. Raises RuntimeError where it is not contiguous: a copy would swallow the update."""
    return tensor.detach().view(-1).numpy()
