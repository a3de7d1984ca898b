"""Clipping by the norm of the gradient: over all positions, over live ones, or over all as live ones let it be
estimated; dense gradients and live ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_lab.algorithms.base import Algorithm, StepHooks

if TYPE_CHECKING:
    from sparse_lab.sparse_cpu.sparse_weights import SparseWeight

MEASURE_EVERY = 100  # steps: RigL's interval of mask updates, each of which needs dense gradients anyway


class NormRatio(Algorithm):
    """How many times larger the norm of the counted weights' gradient is over all positions than over live ones.

    Measured in every step that has dense gradients: those after which masks change by gradients, the first one, and the
    hundredth after the last of them. Between them clipping takes the ratio for unchanged, an approximation. Live are
    the positions whose weights the step moves: what grows after it was chosen for its gradient of this very batch, and
    the next batch's is smaller there.

    ratio: 0-D; None before the first step.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.ratio: Tensor | None = None
        self._measured_at = 0

    def reads_gradients(self) -> bool:
        return self.ratio is None or self.step + 1 - self._measured_at >= MEASURE_EVERY

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        if not StepHooks.of(optimizer).gradients_are_read():
            return
        masks = masks_of(self.model)
        weights = [weight for weight in masks if weight.grad is not None]
        everywhere = _norm(list(_measured(weights, {}, None)))
        live = _norm(list(_measured(weights, {}, masks)))
        self.ratio = torch.where(live > 0.0, everywhere / live, 1.0)
        self._measured_at = self.step + 1

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "ratio": self.ratio, "measured_at": self._measured_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.ratio, self._measured_at = state["ratio"], state["measured_at"]


def masks_of(model: nn.Module) -> dict[Tensor, Tensor]:
    """The mask beside each weight that has one."""
    found = ((getattr(module, "weight", None), getattr(module, "mask", None)) for module in model.modules())
    return {weight: mask for weight, mask in found if isinstance(weight, Tensor) and isinstance(mask, Tensor)}


@torch.no_grad()
def clip(
    parameters: Iterable[nn.Parameter],
    live: Mapping[nn.Parameter, SparseWeight],
    largest: float,
    masks: Mapping[Tensor, Tensor] | None,
    ratio: Tensor | None = None,
) -> None:
    """Scale all gradients, dense and live, by min(1, largest / (norm + 1e-6)), as torch's clip_grad_norm_ does.

    The norm is over whole gradients; with `masks` over what they keep, so that dense and sparse arithmetic agree, and
    times `ratio` where that is given.
    Raises ValueError when the norm is to be over whole gradients and a weight has a live one alone.
    """
    parameters = list(parameters)
    measured = list(_measured(parameters, live, masks, ratio))
    if not measured:
        return
    factor = torch.clamp(largest / (_norm(measured) + 1e-6), max=1.0)
    dense = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for (device, dtype), gradients in _alike(dense).items():
        torch._foreach_mul_(gradients, factor.to(device, dtype))
    for parameter in parameters:
        own = live.get(parameter)
        if own is not None and own.gradient is not None:
            own.gradient *= own.gradient.dtype.type(float(factor))


def _norm(tensors: list[Tensor]) -> Tensor:
    """Over all of them, 0-D."""
    norms = [one for group in _alike(tensors).values() for one in torch._foreach_norm(group)]
    return torch.linalg.vector_norm(torch.stack(norms))


def _alike(tensors: Iterable[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return groups


def _measured(
    parameters: list[Tensor] | list[nn.Parameter],
    live: Mapping[nn.Parameter, SparseWeight],
    masks: Mapping[Tensor, Tensor] | None,
    ratio: Tensor | None = None,
) -> Iterator[Tensor]:
    for parameter in parameters:
        own = live.get(parameter)  # type: ignore[call-overload]
        if own is not None and own.gradient is not None and masks is not None:
            yield _times(torch.from_numpy(own.gradient), ratio)
        elif parameter.grad is not None and masks is not None and parameter in masks:
            # not by indexing: how many there are a GPU would have to tell first
            yield _times(torch.where(masks[parameter], parameter.grad, 0.0), ratio)
        elif parameter.grad is not None:
            yield parameter.grad
        elif own is not None and own.gradient is not None:
            raise ValueError("a norm over all positions needs the gradients of all positions")


def _times(gradient: Tensor, ratio: Tensor | None) -> Tensor:
    return gradient if ratio is None else gradient * ratio
