"""Live updates against torch.optim on masked dense gradients: weights, moments, step counts, hooks, checkpoints."""

from __future__ import annotations

import copy
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from sparse_lab.sparse_cpu.optimizer import LiveOptimizer
from sparse_lab.sparse_cpu.sparse_weights import sparse_weights
from sparse_lab.sparsity.masks import Masks

OPTIMIZERS = {
    "plain": (torch.optim.SGD, {"lr": 0.1}),
    "decay": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 1e-2}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
    "adam": (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 1e-2}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 1e-1}),
}


class Pair:
    """The same network twice: one moved by torch alone and masked after each step, one by LiveOptimizer."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.generator = torch.Generator().manual_seed(1)
        kind, options = OPTIMIZERS[name]
        layers = nn.Conv2d(5, 7, 3), nn.BatchNorm2d(7), nn.Linear(11, 6, bias=False)
        self.dense = nn.Sequential(*layers).to(dtype)
        self.sparse = copy.deepcopy(self.dense)
        self.masks, self.live_masks = Masks(self.dense), Masks(self.sparse)
        self.draw()
        self.torch = kind(self.dense.parameters(), **options)
        self.live = sparse_weights(self.sparse)
        self.ours = LiveOptimizer(kind(self.sparse.parameters(), **options), self.live)

    def draw(self, *, state: bool = False) -> None:
        """New masks; what grows starts at zero, with fresh state if `state`."""
        new = {
            name: torch.rand(mask.shape, generator=self.generator) < 0.2 for name, mask in self.masks.masks().items()
        }
        self.masks.set(new, self.torch if state else None)
        self.live_masks.set(new, self.ours if state else None)

    def step(self, *, beside: bool = False) -> None:
        """One step on random gradients. beside: live weights have a dense gradient too, for others to look at."""
        for weight, twin in zip(self.dense.parameters(), self.sparse.parameters(), strict=True):
            gradient = torch.randn(weight.shape, generator=self.generator, dtype=torch.float64).to(weight.dtype)
            weight.grad = gradient
            live = self.live.get(twin)
            if live is None:
                twin.grad = gradient.clone()
                continue
            live.gradient = gradient.numpy().reshape(-1)[live.positions]
            twin.grad = gradient.clone() if beside else None
        self.torch.step()
        self.masks.enforce(self.torch)
        self.ours.step()

    def check(self, ulps: float) -> None:
        for weight, twin in zip(self.dense.parameters(), self.sparse.parameters(), strict=True):
            close(weight, twin, ulps)
            state, ours = self.torch.state.get(weight, {}), self.ours.state.get(twin, {})
            assert state.keys() == ours.keys()
            for key, value in state.items():
                close(value, ours[key], ulps)


def close(first: torch.Tensor, second: torch.Tensor, ulps: float) -> None:
    first, second = first.detach(), second.detach()
    assert first.dtype == second.dtype and first.shape == second.shape
    unit = np.spacing(first.abs().max().numpy())  # sums may cancel: what counts is the size of their terms
    assert float((first - second).abs().max()) <= ulps * unit


@pytest.mark.parametrize(("name", "dtype"), product(OPTIMIZERS, (torch.float32, torch.float64)))
def test_one_step_is_torchs_to_a_bit_and_twenty_to_a_few(name, dtype):
    pair = Pair(name, dtype)
    pair.step()
    pair.check(ulps=1)
    for _ in range(19):
        pair.step()
    pair.check(ulps=8)


@pytest.mark.parametrize(("name", "dtype"), product(OPTIMIZERS, (torch.float32, torch.float64)))
def test_masks_may_change_between_steps(name, dtype):
    pair = Pair(name, dtype)
    for _ in range(4):
        for _ in range(3):
            pair.step()
        pair.draw(state=True)
    pair.step()
    pair.check(ulps=8)
    assert all(not weight.detach()[~pair.live_masks[name]].any() for name, weight in pair.live_masks.weights().items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_dense_gradient_beside_the_live_one_moves_nothing_and_stays(name):
    pair = Pair(name, torch.float64)
    pair.step(beside=True)
    pair.check(ulps=1)
    assert all(
        torch.equal(w.grad, t.grad) for w, t in zip(pair.dense.parameters(), pair.sparse.parameters(), strict=True)
    )
    assert pair.ours.stepped == set(pair.live)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_without_live_gradients_move_as_torch_moves_them(name):
    """Steps of dense arithmetic in between: the whole weight moves, and momentum goes on."""
    pair = Pair(name, torch.float64)
    for turn in range(4):
        pair.step()
        pair.ours.zero_grad()
        for weight, twin in zip(pair.dense.parameters(), pair.sparse.parameters(), strict=True):
            weight.grad = torch.randn(weight.shape, generator=pair.generator, dtype=torch.float64)
            twin.grad = weight.grad.clone()
        pair.torch.step()
        pair.ours.step()
        assert pair.ours.stepped == frozenset(), turn
        pair.masks.enforce(pair.torch)
        pair.live_masks.enforce(pair.ours)
    pair.check(ulps=8)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_checkpoints_go_from_dense_to_sparse_and_back(name):
    pair = Pair(name, torch.float32)
    pair.step()
    saved, ours = copy.deepcopy(pair.torch.state_dict()), copy.deepcopy(pair.ours.state_dict())
    assert saved["param_groups"] == ours["param_groups"] and saved["state"].keys() == ours["state"].keys()
    pair.ours.load_state_dict(saved)
    pair.torch.load_state_dict(ours)
    pair.step()
    pair.step()
    pair.check(ulps=8)


def test_hooks_run_once_a_step_and_after_the_dense_gradients_are_back():
    pair = Pair("nesterov", torch.float32)
    seen = []
    weight = next(iter(pair.live))
    pair.ours.register_step_post_hook(lambda optimizer, *_: seen.append(weight.grad is not None))
    before = weight._version
    pair.step(beside=True)
    assert seen == [True] and weight._version > before


def test_zero_grad_takes_both_kinds_of_gradient():
    pair = Pair("adam", torch.float32)
    pair.step(beside=True)
    pair.ours.zero_grad()
    assert all(live.gradient is None for live in pair.live.values())
    assert all(parameter.grad is None for parameter in pair.sparse.parameters())


def test_a_closure_is_called_once_with_gradients_on():
    pair = Pair("momentum", torch.float32)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        return 3.0

    assert pair.ours.step(closure) == 3.0 and calls == [True]


def test_what_recipes_do_not_set_is_refused():
    parameter = nn.Parameter(torch.zeros(2))
    with pytest.raises(TypeError, match="RMSprop"):
        LiveOptimizer(torch.optim.RMSprop([parameter]), {})
    with pytest.raises(ValueError, match="amsgrad"):
        LiveOptimizer(torch.optim.Adam([parameter], amsgrad=True), {})
