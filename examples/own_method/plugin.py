"""A score, a rule of dropping and growing with a setting, and a schedule: all that a method of one's own is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sparse_lab
from sparse_lab.algorithms import drop_and_grow
from sparse_lab.config import Config, DropAndGrowConfig, key
from sparse_lab.methods.drop_and_grow import DropAndGrow
from sparse_lab.methods.schedules import Kind
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.scores import Scores, View

sparse_lab.register_choices(Path(__file__).with_name("conf"))


@sparse_lab.register_score(of_weights=True)
def magnitude_with_gradient(view: View) -> Scores:
    """|w| (1 + |g| / max |g|): of two weights of one size the one goes that the loss feels less."""
    weights, gradients = view.weights(), view.gradients()
    largest = {name: gradient.abs().max().clamp_min(1e-30) for name, gradient in gradients.items()}
    return {name: weight.abs() * (1 + gradients[name].abs() / largest[name]) for name, weight in weights.items()}


@dataclass
class BlurredConfig(DropAndGrowConfig):
    """Drop and grow, where growth is blurred: |gradient| counts times u^blur, u drawn from [0, 1)."""

    blur: float = key(1.0, "0: by the gradient alone (RigL); the higher, the more by chance (SET)", low=0.0, high=100.0)


class BlurredUpdates(drop_and_grow.DropAndGrow):
    def __init__(self, *network: Any, blur: float, **how: Any) -> None:
        super().__init__(*network, **how)
        self.blur = blur

    def update(self, step: int, drop: Scores, grow: Scores, generator: torch.Generator) -> tuple[int, list[Scores]]:
        drawn = {name: torch.rand(one.shape, generator=generator).to(one) for name, one in grow.items()}
        blurred = {name: one * drawn[name] ** self.blur for name, one in grow.items()}
        return super().update(step, drop, blurred, generator)


class Blurred(DropAndGrow):
    part = "blurred"
    schedules = ("constant",)

    def create(self, settings: BlurredConfig, *network: Any, **how: Any) -> BlurredUpdates:
        return BlurredUpdates(*network, blur=settings.blur, **how)


sparse_lab.register_algorithm(Blurred(), BlurredConfig)


@dataclass
class StairsConfig:
    """Prune as much at each stair while it trains."""

    stairs: int = key(4, "how many there are", low=1, high=1000)
    end: float = key(0.5, "the last one, as a fraction of the training", low=0.0, high=1.0, open_low=True)


@dataclass(frozen=True)
class Stairs:
    """Which step of the training changes the mask, and how sparse the network is from a step on."""

    target: float
    stairs: int
    last: int

    def due(self, step: int) -> bool:
        return self.sparsity(step) > self.sparsity(step - 1)

    def sparsity(self, step: int) -> float:
        climbed = max(0, min(step, self.last)) * self.stairs // self.last
        return self.target * (climbed / self.stairs)


class StairsKind(Kind):
    dense_first = True

    def build(self, config: Config, clock: Clock) -> Stairs:
        chosen = config.schedule.stairs  # type: ignore[attr-defined]
        return Stairs(config.sparsity.target, chosen.stairs, max(1, clock.steps(chosen.end, "share")))


sparse_lab.register_schedule("stairs", StairsKind(), StairsConfig)
