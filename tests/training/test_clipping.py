"""Clipping against torch's own: over whole gradients, and over live ones in dense and in sparse form."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparse_lab.sparse_cpu.sparse_weights import sparse_weights
from sparse_lab.sparsity.masks import Masks
from sparse_lab.training.clipping import clip, masks_of

SMALL, LARGE = 0.5, 1e6


@pytest.fixture
def network() -> nn.Sequential:
    """A masked network with a dense gradient everywhere."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(5, 6)).double()
    masks = Masks(network)
    masks.set({name: torch.rand(mask.shape) < 0.3 for name, mask in masks.masks().items()})
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    return network


def gradients(network: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in network.parameters()]


def fill(network: nn.Module, keep_dense: bool):
    """Live gradients beside the dense ones, or in their place."""
    live = sparse_weights(network)
    for weight, one in live.items():
        one.gradient = weight.grad.numpy().reshape(-1)[one.positions]
        if not keep_dense:
            weight.grad = None
    return live


@pytest.mark.parametrize("largest", [SMALL, LARGE])
def test_over_all_positions_it_is_torchs(network, largest):
    wanted = copy.deepcopy(network)
    for one, other in zip(network.parameters(), wanted.parameters(), strict=True):
        other.grad = one.grad.clone()
    nn.utils.clip_grad_norm_(wanted.parameters(), largest)
    live = fill(network, keep_dense=True)
    clip(network.parameters(), live, largest, None)
    assert all(torch.allclose(a, b, rtol=1e-14) for a, b in zip(gradients(network), gradients(wanted), strict=True))
    for weight, one in live.items():
        assert torch.equal(torch.from_numpy(one.gradient), weight.grad.reshape(-1)[one.positions])


@pytest.mark.parametrize("largest", [SMALL, LARGE])
@pytest.mark.parametrize("form", ["dense", "live", "both"])
def test_over_live_positions_what_is_masked_does_not_count(network, largest, form):
    squares = [p.grad.square().sum() for p in network.parameters()]
    for module in (network[0], network[2]):
        squares.append(-(module.weight.grad * ~module.mask).square().sum())
    factor = min(1.0, largest / (float(sum(squares)) ** 0.5 + 1e-6))
    before = [parameter.grad.clone() for parameter in network.parameters()]
    live = {} if form == "dense" else fill(network, keep_dense=form == "both")
    clip(network.parameters(), live, largest, masks_of(network))
    for parameter, old in zip(network.parameters(), before, strict=True):
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, old * factor, rtol=1e-13)
        if parameter in live:
            wanted = (old * factor).reshape(-1)[live[parameter].positions]
            assert torch.allclose(torch.from_numpy(live[parameter].gradient), wanted, rtol=1e-13)
    assert any(p.grad is None for p in network.parameters()) is (form == "live")


def test_a_norm_over_all_positions_needs_them(network):
    with pytest.raises(ValueError, match="all positions"):
        clip(network.parameters(), fill(network, keep_dense=False), SMALL, None)


def test_without_gradients_nothing_happens():
    weight = nn.Parameter(torch.arange(3.0))
    clip([weight], {}, SMALL, None)
    assert weight.grad is None and torch.equal(weight.detach(), torch.arange(3.0))
