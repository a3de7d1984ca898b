"""`sparse-lab bench masks`: what it costs that masks hold after every optimizer step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparse_lab.bench.interleaved import Times, interleaved
from sparse_lab.bench.patterns import build
from sparse_lab.bench.training import DenseStep


def measure(repeats: int) -> tuple[Times, str]:
    """Enforcing masks on VGG16 and its optimizer state, beside the whole dense step."""
    candidates: dict[str, Callable[[], object]] = {}
    for optimizer in ("sgd", "adamw"):
        step = DenseStep(build("vgg16", 1.0), 128, optimizer=optimizer)
        step.masks.set({name: torch.rand(mask.shape) < 0.01 for name, mask in step.masks.masks().items()})
        candidates[f"VGG16 training step, {optimizer}"] = step
        candidates[f"enforcing masks, {optimizer}"] = lambda step=step: step.masks.enforce(step.optimizer)  # type: ignore[misc]
    return interleaved(candidates, repeats), "VGG16 training step, sgd"
