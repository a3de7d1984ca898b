"""Clipping by the norm of the gradient: over all positions, or over live ones; dense gradients and live ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sparse_lab.sparse_cpu.sparse_weights import SparseWeight


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
) -> None:
    """Scale all gradients, dense and live, by min(1, largest / (norm + 1e-6)), as torch's clip_grad_norm_ does.

    The norm is over whole gradients; with `masks` over what they keep, so that dense and sparse arithmetic agree.
    Raises ValueError when the norm is to be over whole gradients and a weight has a live one alone.
    """
    parameters = list(parameters)
    measured = list(_measured(parameters, live, masks))
    if not measured:
        return
    norms = [one for group in _alike(measured).values() for one in torch._foreach_norm(group)]
    factor = torch.clamp(largest / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6), max=1.0)
    dense = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for (device, dtype), gradients in _alike(dense).items():
        torch._foreach_mul_(gradients, factor.to(device, dtype))
    for parameter in parameters:
        own = live.get(parameter)
        if own is not None and own.gradient is not None:
            own.gradient *= own.gradient.dtype.type(float(factor))


def _alike(tensors: Iterable[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return groups


def _measured(
    parameters: list[nn.Parameter], live: Mapping[nn.Parameter, SparseWeight], masks: Mapping[Tensor, Tensor] | None
) -> Iterator[Tensor]:
    for parameter in parameters:
        own = live.get(parameter)
        if own is not None and own.gradient is not None and masks is not None:
            yield torch.from_numpy(own.gradient)
        elif parameter.grad is not None:
            masked = masks is not None and parameter in masks
            # not by indexing: how many there are a GPU would have to tell first
            yield torch.where(masks[parameter], parameter.grad, 0.0) if masked else parameter.grad  # type: ignore[index]
        elif own is not None and own.gradient is not None:
            raise ValueError("a norm over all positions needs the gradients of all positions")
