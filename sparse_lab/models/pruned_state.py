"""State dicts of pruned networks: the plain network's that each of them equals, and its masks."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from sparse_lab.models.offsets import dct_basis

State = Mapping[str, Any]


class MasksLeft(UserWarning):
    """The file has masks, and they were not asked for."""


def plain_of(state: State, own: Container[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the state dict of the plain network that a pruned one equals, and the pruned one's masks by layer: zero
    where the mask is, with what a layer adds to its weight (`models.offsets`) added.

    own: names in the state dict of the network that is to take it, which mean there what they mean.
    """
    masks = masks_of(state, own)
    plain = {key: value for key, value in state.items() if key not in {f"{layer}.mask" for layer in masks}}
    for layer, mask in masks.items():
        weight = torch.where(mask, plain[f"{layer}.weight"], 0)
        mean = _added(plain, f"{layer}.mean", own)
        if mean is not None and mean.shape == weight.shape[:1]:
            weight = weight + mean.reshape(-1, *(1,) * (weight.dim() - 1)) * ~mask
            del plain[f"{layer}.mean"]
        plain[f"{layer}.weight"] = weight
    for layer in [key.removesuffix(".alpha") for key in plain if key.endswith(".alpha")]:
        weighted, alpha = plain.get(f"{layer}.weight"), _added(plain, f"{layer}.alpha", own)
        if alpha is not None and alpha.dim() == 0 and is_plain(weighted) and weighted.dim() > 1:
            plain[f"{layer}.weight"] = weighted + alpha * dct_basis(weighted).to(weighted)
            del plain[f"{layer}.alpha"]
    return plain, masks


def masks_of(state: State, own: Container[str] = ()) -> dict[str, Tensor]:
    """Return the masks in a state dict by layer: bool, each of the shape of the weight beside it."""
    found = {key.removesuffix(".mask"): value for key, value in state.items() if key.endswith(".mask")}
    return {
        layer: mask
        for layer, mask in found.items()
        if f"{layer}.mask" not in own
        and is_plain(mask)
        and mask.dtype == torch.bool
        and is_plain(weight := state.get(f"{layer}.weight"))
        and weight.is_floating_point()
        and weight.shape == mask.shape
    }


def is_plain(value: object) -> TypeGuard[Tensor]:
    """Is it a tensor whose numbers are there, one beside the other?"""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized and not value.is_meta


def has_offsets(state: State) -> bool:
    """Is there a dense part beside the weights, so that they are not zero where the mask is?"""
    return any(key.endswith((".alpha", ".mean")) and f"{key.rpartition('.')[0]}.mask" in state for key in state)


def _added(state: State, key: str, own: Container[str]) -> Tensor | None:
    found = state.get(key)
    return found if key not in own and is_plain(found) and found.is_floating_point() else None
