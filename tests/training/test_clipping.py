"""Clipping against torch's own: over whole gradients, and over live ones in dense and in sparse form; over whole ones
as live ones let them be estimated, against the closed form.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparse_lab.algorithms.base import Algorithm
from sparse_lab.sparse_cpu.sparse_weights import sparse_weights
from sparse_lab.sparsity.masks import Masks
from sparse_lab.training.clipping import NormRatio, clip, masks_of

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


class Grows(Algorithm):
    """After the steps of these numbers it looks at all gradients, and lets every second weight live."""

    order = 30

    def __init__(self, masks: Masks, *steps: int) -> None:
        super().__init__()
        self.masks, self.steps = masks, steps

    def reads_gradients(self) -> bool:
        return self.step + 1 in self.steps

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.step in self.steps:
            self.masks.set(
                {name: torch.arange(m.numel()).view_as(m) % 2 == 0 for name, m in self.masks.masks().items()}
            )


def attached(network: nn.Module, *steps: int) -> tuple[NormRatio, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    ratio = NormRatio(network)
    for one in (ratio, Grows(Masks.of(network), *steps)):
        one.attach(optimizer)
    return ratio, optimizer


def squares(network: nn.Module, kind: str) -> float:
    """Of the gradients of 'live' and of 'masked' positions, and of 'other' parameters."""
    if kind == "other":
        return sum(float(p.grad.square().sum()) for name, p in network.named_parameters() if name not in WEIGHTS)
    masks = [(module.weight.grad, module.mask) for module in (network[0], network[2])]
    return sum(float((grad * (mask if kind == "live" else ~mask)).square().sum()) for grad, mask in masks)


WEIGHTS = ("0.weight", "2.weight")


@pytest.mark.parametrize("form", ["dense", "live", "both"])
def test_between_dense_gradients_the_norm_is_that_of_live_ones_times_the_last_ratio(network, form):
    """The ratio is of the masks that stood in its step, after which others came."""
    ratio, optimizer = attached(network, 1)
    last = ((squares(network, "live") + squares(network, "masked")) / squares(network, "live")) ** 0.5
    optimizer.step()
    assert network[0].mask.flatten()[::2].all() and float(ratio.ratio) == pytest.approx(last, rel=1e-14)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    norm = (squares(network, "other") + last**2 * squares(network, "live")) ** 0.5
    before = [parameter.grad.clone() for parameter in network.parameters()]
    live = {} if form == "dense" else fill(network, keep_dense=form == "both")
    clip(network.parameters(), live, SMALL, masks_of(network), ratio.ratio)
    for parameter, old in zip(network.parameters(), before, strict=True):
        wanted = old * SMALL / (norm + 1e-6)
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, wanted, rtol=1e-13)
        if parameter in live:
            kept = wanted.reshape(-1)[live[parameter].positions]
            assert torch.allclose(torch.from_numpy(live[parameter].gradient), kept, rtol=1e-13)


def test_the_ratio_is_measured_in_the_first_step_where_masks_change_and_after_a_hundred_steps(network):
    ratio, optimizer = attached(network, 30, 250)
    measured, before = [], None
    for step in range(1, 400):
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        if ratio.ratio is not before:
            measured.append(step)
        before = ratio.ratio
    assert measured == [1, 30, 130, 230, 250, 350]


def test_where_no_live_weight_has_a_gradient_the_ratio_is_one(network):
    ratio, optimizer = attached(network)
    for module in (network[0], network[2]):
        module.weight.grad[module.mask] = 0.0
    optimizer.step()
    assert float(ratio.ratio) == 1.0


def test_the_ratio_is_a_part_of_the_state(network):
    ratio, optimizer = attached(network)
    optimizer.step()
    other = NormRatio(network)
    assert other.reads_gradients() and not ratio.reads_gradients()
    other.load_state_dict(ratio.state_dict())
    assert torch.equal(other.ratio, ratio.ratio) and not other.reads_gradients() and other.step == 1
