"""SET, RigL, GraNet and MEST in a plain loop that says nothing: what goes, what comes, how many stay, worked out by
hand.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparse_lab.algorithms.drop_and_grow import MEST, SET, GraNet, RigL
from sparse_lab.algorithms.prune import Prune
from sparse_lab.algorithms.selectors import WeightSelector
from sparse_lab.sparsity.masks import Masks
from sparse_lab.sparsity.schedules import Bounds, Constant, Cubic, DropFraction

STEPS, EVERY, END = 24, 4, 20
TOTAL = 20 * 30 + 30 * 10
LOSS = nn.functional.cross_entropy


class Loop:
    """A plain loop of a plain network; before and after each step, what the masks and weights were."""

    def __init__(self, make, start: float) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
        self.masks = Masks.of(self.network)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)
        Prune(self.network, WeightSelector(self.masks, "random", "uniform"), Constant(start)).attach(self.optimizer)
        make(self.network, self.masks, STEPS).attach(self.optimizer)
        self.kept: list[int] = []

    def step(self) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Of each layer: its mask before, the weights that the step alone leaves, dense gradients, its mask after."""
        images, labels = torch.randn(16, 20), torch.randint(0, 10, (16,))
        self.optimizer.zero_grad()
        LOSS(self.network(images), labels).backward()
        before = {name: (self.masks[name].clone(), layer.weight.detach().clone()) for name, layer in self.layers()}
        grads = {name: layer.weight.grad.clone() for name, layer in self.layers()}
        momenta = {name: self.momentum(layer) for name, layer in self.layers()}
        self.optimizer.step()
        seen = {}
        for name, layer in self.layers():
            mask, weight = before[name]
            if not self.kept:  # pruned within the first step
                mask = layer.weight != 0
            left = (weight - 0.2 * (0.9 * momenta[name] + grads[name] + 1e-3 * weight)) * mask
            seen[name] = mask, left, grads[name], self.masks[name].clone()
            assert not layer.weight[~self.masks[name]].any() and not self.momentum(layer)[~self.masks[name]].any()
        self.kept.append(self.masks.kept())
        return seen

    def layers(self):
        return [(name, layer) for name, layer in self.network.named_children() if isinstance(layer, nn.Linear)]

    def momentum(self, layer) -> torch.Tensor:
        state = self.optimizer.state.get(layer.weight, {})
        return state["momentum_buffer"].clone() if "momentum_buffer" in state else torch.zeros_like(layer.weight)


def fraction(step: int) -> float:
    return 0.3 * (1 + math.cos(math.pi * step / END)) / 2


@pytest.mark.parametrize("kind", [SET, RigL])
def test_the_smallest_go_and_as_many_come_where_the_gradient_is_largest_or_at_random(kind):
    loop = Loop(lambda *parts: kind(*parts, DropFraction(EVERY, 0, END, 0.3), seed=5), 0.9)
    changed = 0
    for step in range(1, STEPS + 1):
        for mask, left, grad, after in loop.step().values():
            if step % EVERY or step >= END:
                assert torch.equal(mask, after)
                continue
            number = math.ceil(fraction(step) * int(mask.sum()) - 1e-9)
            gone = left.abs().where(mask, torch.inf).flatten().argsort()[:number]
            stays = mask.flatten().clone()
            stays[gone] = False
            assert after.sum() == mask.sum() and after.flatten()[stays].all()
            if kind is RigL:
                comes = grad.abs().where(~mask, -1.0).flatten().argsort(descending=True)[:number]
                stays[comes] = True
                assert torch.equal(stays, after.flatten())
            changed += int((after & ~mask).sum())
    assert changed and loop.kept == [round(0.1 * 600) + round(0.1 * 300)] * STEPS


def test_granet_becomes_sparser_along_its_cubic_and_moves_meanwhile():
    pruning = Cubic(0.95, begin=0, end=16, every=EVERY, initial=0.5)
    loop = Loop(lambda *parts: GraNet(*parts, DropFraction(EVERY, 0, END, 0.3), pruning), 0.5)
    moved = 0
    for _ in range(STEPS):
        moved += sum(int((after & ~mask).sum()) for mask, _, _, after in loop.step().values())
    wanted = [round((1 - (0.95 - 0.45 * (1 - step / 16) ** 3)) * TOTAL) for step in (4, 8, 12, 16)]
    assert loop.kept == [450] * 3 + [n for n in wanted[:3] for _ in range(EVERY)] + [45] * 9 and wanted[3] == 45
    assert moved > 10


def test_mest_lets_more_live_until_its_milestones():
    bounds = Bounds((1.0, 1.0, 1.0), (1.5, 1.25, 1.0), (12, 20), EVERY)
    loop = Loop(lambda *parts: MEST(*parts, bounds, target=0.9), 0.9)
    for _ in range(STEPS):
        loop.step()
    assert loop.kept == [90] * 3 + [135] * 8 + [round(1.25 * 90)] * 8 + [90] * 5
