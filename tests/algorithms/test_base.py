"""Algorithms in a plain loop: which moment comes when, what a skipped step counts, and that order has no say."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from sparse_lab.algorithms.base import Algorithm, StepHooks
from sparse_lab.algorithms.drop_and_grow import SET, RigL
from sparse_lab.algorithms.enforce import EnforceMasks
from sparse_lab.algorithms.prune import Prune
from sparse_lab.algorithms.selectors import WeightSelector
from sparse_lab.sparsity.masks import Masks
from sparse_lab.sparsity.schedules import Constant, DropFraction

MOMENTS = ("begin_step", "gradients_ready", "before_step", "after_step", "end_epoch")


def recorder(said: list[tuple], name: str, order: int) -> Algorithm:
    def note(moment):
        return lambda self, optimizer: said.append((name, moment, self.step))

    return type("Recorder", (Algorithm,), {"order": order, **{moment: note(moment) for moment in MOMENTS}})()


def small():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    return network, optimizer, Masks.of(network)


def train(network, optimizer, steps: int, closure: bool = False, skips: tuple[int, ...] = (), check=None) -> None:
    """A loop as anybody's, that says when a step begins; at `skips` the optimizer does not move."""
    source = torch.Generator().manual_seed(1)
    for step in range(steps):
        inputs, labels = torch.randn(16, 20, generator=source), torch.randint(0, 5, (16,), generator=source)
        StepHooks.of(optimizer).begin(optimizer)

        def compute(inputs=inputs, labels=labels):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(inputs), labels)
            loss.backward()
            return loss

        if closure:
            optimizer.step(compute)
        else:
            compute()
            if step not in skips:
                optimizer.step()
        if check is not None:
            check(step)


@pytest.mark.parametrize("closure", [False, True])
def test_moments_come_in_order_and_by_order(closure):
    network, optimizer, _ = small()
    said: list[tuple] = []
    late, early = recorder(said, "late", 9), recorder(said, "early", -9)
    late.attach(optimizer)
    early.attach(optimizer)
    train(network, optimizer, 2, closure)
    StepHooks.of(optimizer).end_epoch(optimizer)
    StepHooks.of(optimizer).end_epoch(optimizer)  # said twice, counted once
    wanted = []
    for step in range(2):
        for moment in MOMENTS[:3]:
            wanted += [("early", moment, step), ("late", moment, step)]
        wanted += [("early", "after_step", step + 1), ("late", "after_step", step + 1)]
    assert said == [*wanted, ("early", "end_epoch", 2), ("late", "end_epoch", 2)]
    late.detach()
    said.clear()
    train(network, optimizer, 1)
    assert {name for name, *_ in said} == {"early"}


def test_a_loop_that_clips_says_so_and_it_counts_once():
    network, optimizer, _ = small()
    said: list[tuple] = []
    recorder(said, "one", 0).attach(optimizer)
    hooks = StepHooks.of(optimizer)
    for skipped in (True, False):  # also after a step that did not happen
        hooks.begin(optimizer)
        network(torch.randn(3, 20)).sum().backward()
        hooks.gradients_ready(optimizer)
        hooks.gradients_ready(optimizer)
        if not skipped:
            optimizer.step()
    assert [moment for _, moment, _ in said] == [
        "begin_step", "gradients_ready", "gradients_ready", "before_step", "after_step",
    ]  # fmt: skip


def same_bits(network, other) -> None:
    for name, value in network.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def algorithms(network, masks, kind=RigL) -> list[Algorithm]:
    return [
        Prune(network, WeightSelector(masks, "random", "erk"), Constant(0.8), seed=5),
        kind(network, masks, 12, DropFraction(3, 0, 11, 0.5), seed=5),
        EnforceMasks(masks),
    ]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (1, 0, 2)])
@pytest.mark.parametrize("kind", [SET, RigL])
def test_the_order_of_attaching_has_no_say(order, kind):
    """And after every step masked weights and their momentum are zero, and the count is exact."""
    network, optimizer, masks = small()
    made = algorithms(network, masks, kind)
    for number in order:
        made[number].attach(optimizer)
    kept = round(0.2 * masks.total())

    def check(step):
        assert masks.kept() == kept
        for name, weight in masks.weights().items():
            assert not weight[~masks[name]].any() and not optimizer.state[weight]["momentum_buffer"][~masks[name]].any()

    train(network, optimizer, 12, check=check)
    other, another, others = small()
    for one in algorithms(other, others, kind):
        one.attach(another)
    train(other, another, 12)
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_a_skipped_step_changes_no_mask_and_advances_no_schedule():
    network, optimizer, masks = small()
    made = algorithms(network, masks)
    for one in made:
        one.attach(optimizer)
    seen = []

    def check(step):
        seen.append((made[1].step, {name: mask.clone() for name, mask in masks.masks().items()}))

    train(network, optimizer, 8, skips=(0, 2, 3), check=check)
    assert [step for step, _ in seen] == [0, 1, 1, 1, 2, 3, 4, 5]
    for (before, old), (after, new) in pairwise(seen):
        moved = any(bool((old[name] != new[name]).any()) for name in old)
        assert moved == (after == 3 and before == 2)


def test_state_goes_into_a_checkpoint_and_comes_back():
    network, optimizer, masks = small()
    made = algorithms(network, masks)
    for one in made:
        one.attach(optimizer)
    train(network, optimizer, 12)
    half, first, holding = small()
    begun = algorithms(half, holding)
    for one in begun:
        one.attach(first)
    train(half, first, 5)
    saved = (half.state_dict(), first.state_dict(), [one.state_dict() for one in begun])
    again, second, held = small()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1.0)
    again.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    resumed = algorithms(again, held)
    for one, state in zip(resumed, saved[2], strict=True):
        one.load_state_dict(state)
        one.attach(second)
    source = torch.Generator().manual_seed(1)
    for step in range(12):  # the same batches
        inputs, labels = torch.randn(16, 20, generator=source), torch.randint(0, 5, (16,), generator=source)
        if step < 5:
            continue
        StepHooks.of(second).begin(second)
        second.zero_grad()
        nn.functional.cross_entropy(again(inputs), labels).backward()
        second.step()
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True)
    )
