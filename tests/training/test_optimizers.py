"""Learning rates against torch's own schedulers and closed forms; optimizers as the recipe says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sparse_lab.config import RecipeConfig
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.optimizer_state import reset_state
from sparse_lab.training.lightning_module import Classifier
from sparse_lab.training.optimizers import learning_rate, make_optimizer


def test_cosine_equals_torchs_scheduler():
    recipe = RecipeConfig(lr=0.3, lr_schedule="cosine")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    for step in range(50):
        assert learning_rate(recipe, step, 50) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_step_drops_at_its_milestones():
    recipe = RecipeConfig(lr=1.0, lr_schedule="step", milestones=[0.5, 0.75], gamma=0.1)
    rates = [learning_rate(recipe, step, 100) for step in (0, 49, 50, 74, 75, 99)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def rates_of_a_phase(recipe: RecipeConfig, clock: Clock) -> list[float]:
    """What the training module gives its optimizer at every step of a round of `clock`."""
    module = Classifier(torch.nn.Linear(1, 1), recipe, clock)
    optimizer = torch.optim.SGD(module.parameters(), lr=9.0)
    module._trainer = SimpleNamespace(optimizers=[optimizer])
    rates = []
    for _ in range(clock.steps_a_round):
        module.on_train_batch_start((torch.zeros(1), torch.zeros(1)), 0)
        rates.append(optimizer.param_groups[0]["lr"])
        clock.tick()
    return rates


@pytest.mark.parametrize(("steps", "warm"), [(50, 10), (20, 2), (8, 7), (40, 1)])
def test_warmup_equals_torchs_linear_and_then_cosine_schedulers(steps, warm):
    """The k-th step (from 0) of w has (k + 1) / w of the peak: none trains at 0, and the last one is at the peak."""
    wanted, optimizer = [], torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    linear = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm, total_iters=warm - 1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - warm)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [linear, cosine], milestones=[warm])
    for _ in range(steps):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        both.step()
    recipe = RecipeConfig(lr=2.0, lr_schedule="cosine", warmup=warm / steps)
    clock = Clock(rounds=2, epochs_a_round=1, steps_an_epoch=steps)
    for _ in range(2):  # a second phase as the first
        assert rates_of_a_phase(recipe, clock) == pytest.approx(wanted, abs=1e-12)
        clock.end_round()


@pytest.mark.parametrize("shape", ["constant", "cosine", "step"])
@pytest.mark.parametrize("warmup", [0.01, 0.05, 0.5, 0.99])
def test_no_step_trains_at_rate_0_however_short_the_phase(shape, warmup):
    recipe = RecipeConfig(lr=0.5, lr_schedule=shape, warmup=warmup, milestones=[1.0])
    for steps in range(1, 30):
        rates = rates_of_a_phase(recipe, Clock(rounds=1, epochs_a_round=1, steps_an_epoch=steps))
        assert 0 < min(rates) <= max(rates) <= 0.5
        if warmup * steps <= 1:
            assert rates[0] == 0.5, f"{steps} step(s), of which {warmup * steps:g} warm up, start at {rates[0]}"
    assert rates[0] == pytest.approx(0.5 * min(1, 1 / (warmup * 29)))


def test_constant_stays():
    recipe = RecipeConfig(lr=3e-4, lr_schedule="constant")
    assert {learning_rate(recipe, step, 7) for step in range(7)} == {3e-4}


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
