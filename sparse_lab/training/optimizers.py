"""Optimizers and learning rates, made from a recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sparse_lab.config import RecipeConfig


def make_optimizer(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], recipe: RecipeConfig, fused: bool = False
) -> torch.optim.Optimizer:
    """The recipe's optimizer at its peak learning rate. Decay acts on every parameter, biases and BatchNorm too, but
    for parameter groups that say otherwise.

    fused: one kernel for all parameters; otherwise torch chooses by where they lie.
    """
    how = {"fused": True} if fused else {}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
            **how,  # type: ignore[arg-type]
        )
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    return kind(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, **how)  # type: ignore[arg-type]


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """All parameters of `model` for an optimizer: those of modules that have a `recipe` (momentum, weight decay)
    apart.
    """
    own: list[Any] = [module for module in model.modules() if hasattr(module, "recipe")]
    apart = {id(parameter) for module in own for parameter in module.parameters()}
    groups: list[dict[str, Any]] = [{"params": [one for one in model.parameters() if id(one) not in apart]}]
    if own:
        groups.append({"params": [one for module in own for one in module.parameters()], **own[0].recipe})
    return groups


def learning_rate(recipe: RecipeConfig, step: int, steps: int) -> float:
    """The rate of this step (from 0) of a phase of so many.

    Linear warm-up over the first w = warmup * steps, whose k-th step has (k + 1) / w of the peak, then constant, cosine
    to zero over the rest, or x gamma at each milestone. No step trains at 0: a phase of one step has the peak.
    """
    warm, progress = recipe.warmup * steps, step / steps
    if step < warm:
        return recipe.lr * min(1.0, (step + 1) / warm)
    if recipe.lr_schedule == "cosine":
        return recipe.lr * 0.5 * (1.0 + math.cos(math.pi * (progress - recipe.warmup) / (1.0 - recipe.warmup)))
    if recipe.lr_schedule == "step":
        return recipe.lr * recipe.gamma ** sum(progress >= milestone for milestone in recipe.milestones)
    return recipe.lr
