"""Learning rates against torch's own schedulers and closed forms; optimizers as the recipe says."""

from __future__ import annotations

import math

import pytest
import torch

from sparse_lab.config import RecipeConfig
from sparse_lab.sparsity.optimizer_state import reset_state
from sparse_lab.training.optimizers import learning_rate, make_optimizer


def test_cosine_equals_torchs_scheduler():
    recipe = RecipeConfig(lr=0.3, lr_schedule="cosine")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    for step in range(50):
        assert learning_rate(recipe, step / 50) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_step_drops_at_its_milestones():
    recipe = RecipeConfig(lr=1.0, lr_schedule="step", milestones=[0.5, 0.75], gamma=0.1)
    rates = [learning_rate(recipe, progress) for progress in (0.0, 0.49, 0.5, 0.74, 0.75, 0.99)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_warmup_is_linear_and_meets_the_peak():
    recipe = RecipeConfig(lr=2.0, lr_schedule="cosine", warmup=0.2)
    assert [learning_rate(recipe, progress) for progress in (0.0, 0.1, 0.2)] == pytest.approx([0.0, 1.0, 2.0])
    assert learning_rate(recipe, 0.6) == pytest.approx(2.0 * 0.5 * (1 + math.cos(math.pi / 2)))


def test_constant_stays():
    recipe = RecipeConfig(lr=3e-4, lr_schedule="constant")
    assert {learning_rate(recipe, step / 7) for step in range(7)} == {3e-4}


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_optimizers_take_the_recipes_numbers_and_forget_all_state(name, kind):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer([parameter], RecipeConfig(optimizer=name, lr=0.02, weight_decay=0.01, nesterov=True))
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.02, 0.01)
    if name == "sgd":
        assert group["nesterov"] and group["momentum"] == 0.9
    parameter.sum().backward()
    optimizer.step()
    assert optimizer.state[parameter]
    reset_state(optimizer)
    assert not optimizer.state
