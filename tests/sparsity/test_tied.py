"""Layers tied by one Parameter are one layer: counted once, one mask, multiply-adds of each use. Against numpy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_lab.algorithms.drop_and_grow import RigL
from sparse_lab.algorithms.prune import Prune
from sparse_lab.algorithms.selectors import WeightSelector
from sparse_lab.sparsity.connectivity import connectivity
from sparse_lab.sparsity.distributions import DISTRIBUTIONS
from sparse_lab.sparsity.flops import OTHER, layer_costs
from sparse_lab.sparsity.masks import Masks, count, layers, num_kept
from sparse_lab.sparsity.schedules import Constant, DropFraction
from sparse_lab.sparsity.scores import SCORES, Probe, View
from sparse_lab.sparsity.structured.channels import groups


class Tied(nn.Module):
    """27 * 8 + 8 * 8 * 9 + 8 * 8 + 8 * 4 weights: the second convolution and the second hidden layer are tied."""

    SIZES = (3 * 8 * 9, 8 * 8 * 9, 8 * 8, 8 * 4)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.again = nn.Conv2d(8, 8, 3, padding=1, stride=2)
        self.hidden = nn.Linear(8, 8)
        self.echo = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)
        self.again.weight = self.first.weight
        self.echo.weight = self.hidden.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.first(self.stem(x).relu()).relu()).relu().mean((2, 3))
        return self.head(self.echo(self.hidden(x).relu()).relu())


@pytest.fixture
def tied() -> Tied:
    torch.manual_seed(0)
    return Tied()


def on_disk(model: nn.Module) -> int:
    """Nonzero conv and linear weights, each array in memory once."""
    found = {id(one): one.detach().numpy() for one in model.parameters() if one.dim() > 1}
    return sum(int(np.count_nonzero(one)) for one in found.values())


def test_a_tied_weight_counts_once(tied):
    assert list(layers(tied)) == ["stem", "first", "hidden", "head"]
    masks = Masks(tied)
    assert (count(tied), masks.total(), masks.unique(), masks.kept()) == (sum(Tied.SIZES),) * 4
    assert masks.kept_with_reuse() == sum(Tied.SIZES)


def test_the_multiply_adds_of_each_use_count(tied):
    costs = {cost.name: cost for cost in layer_costs(tied, 8)}
    stem, conv, hidden, head = Tied.SIZES
    assert {name: cost.macs for name, cost in costs.items()} == {
        "stem": stem * 64, "first": conv * (64 + 16), "hidden": 2 * hidden, "head": head,
    }  # fmt: skip
    assert sum(cost.total for cost in costs.values()) == sum(Tied.SIZES)
    masks = Masks(tied)
    masks.set({name: torch.rand(mask.shape) < 0.3 for name, mask in masks.masks().items()})
    first = int(np.count_nonzero(tied.again.weight.detach().numpy()))
    assert layer_costs(tied, 8)[1].sparse_macs == first * (64 + 16)


def test_the_multiply_adds_of_what_attention_puts_out_count():
    """What attention puts out is a counted layer that attention does not call."""
    attention = nn.MultiheadAttention(6, 2, batch_first=True)

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.attention = nn.Conv2d(3, 6, 4, stride=4), attention

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            return self.attention(tokens, tokens, tokens)[0].mean(1)

    with pytest.warns(UserWarning, match="in_proj_weight"):
        Masks(Attending())
    assert {cost.name: cost.macs for cost in layer_costs(Attending(), 16)} == {
        "embed": 3 * 6 * 16 * 16, "attention.out_proj": 6 * 6 * 16, OTHER: 3 * 6 * 6 * 16 + 2 * 6 * 16 * 16,
    }  # fmt: skip


def test_the_multiply_adds_of_a_linear_layer_count_each_position():
    """Tokens, or the pixels of a map with channels last."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix = nn.Conv2d(3, 6, 4, stride=4), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(self.embed(x).flatten(2).transpose(1, 2)).mean(1)

    assert [cost.macs for cost in layer_costs(Tokens(), 16)] == [3 * 6 * 16 * 16, 6 * 5 * 16]


@pytest.mark.parametrize("distribution", ["global", *DISTRIBUTIONS])
@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_masks_are_one_and_hold_in_any_loop(score, distribution, tied):
    masks = Masks.of(tied)
    optimizer = torch.optim.AdamW(tied.parameters(), lr=0.1, weight_decay=0.1)
    selector = WeightSelector(masks, score, distribution)
    Prune(tied, selector, Constant(0.8), total_steps=8).attach(optimizer)
    RigL(tied, masks, 8, DropFraction(2, 0, 8, 0.3)).attach(optimizer)
    for _ in range(8):
        optimizer.zero_grad()
        functional.cross_entropy(tied(torch.randn(6, 3, 8, 8)), torch.arange(6) % 4).backward()
        optimizer.step()
        assert masks.kept() == num_kept(0.8, sum(Tied.SIZES)) >= on_disk(tied)
        for one, other in ((tied.first, tied.again), (tied.hidden, tied.echo)):
            assert one.weight is other.weight and torch.equal(one.get_buffer("mask"), other.get_buffer("mask"))
            assert not other.weight[~other.get_buffer("mask")].any()
            assert not optimizer.state[other.weight]["exp_avg"][~other.get_buffer("mask")].any()


def test_the_mask_stays_one_through_a_copy_a_move_and_a_load(tied):
    masks = Masks(tied)
    masks.set({name: torch.rand(mask.shape) < 0.3 for name, mask in masks.masks().items()})
    moved = copy.deepcopy(tied)
    other = Masks(moved)
    moved._apply(Tensor.clone)  # as a move between devices: the Parameter stays one, each buffer is moved by itself
    assert moved.first.weight is moved.again.weight
    assert moved.first.get_buffer("mask") is not moved.again.get_buffer("mask")
    moved.load_state_dict(tied.state_dict())
    other.set({name: mask & (torch.rand(mask.shape) < 0.5) for name, mask in other.masks().items()})
    assert torch.equal(moved.first.get_buffer("mask"), moved.again.get_buffer("mask"))
    assert on_disk(moved) == other.kept() < masks.kept()


def test_filters_of_tied_layers_are_refused(tied):
    with pytest.raises(ValueError, match="tied to the weight of first"):
        groups(tied, 8, coupled=True)


def test_scores_and_paths_follow_a_tied_weight_through_all_its_uses(tied):
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % 4
    for name in ("gradient", "taylor", "snip", "synflow", "lamp"):
        assert list(SCORES[name](View(tied, [(images, labels)], probe=Probe(lambda: 8)))) == list(layers(tied)), name
    assert connectivity(tied, 8).effective == sum(Tied.SIZES)
    masks = Masks(tied)
    with torch.no_grad():
        tied.echo.bias.fill_(1.0)  # would light every logit, were it taken for a path
    masks.set({"stem": torch.zeros_like(masks["stem"])})
    found = connectivity(tied, 8)
    assert (found.connected, found.effective) == (False, 0)
