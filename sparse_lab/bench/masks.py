"""`sparse-lab bench masks`: what it costs that masks hold after every optimizer step, and that they change."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparse_lab.bench.interleaved import Times, interleaved
from sparse_lab.bench.patterns import build
from sparse_lab.bench.training import DenseStep
from sparse_lab.methods.sparsify import sparsify

UPDATE_EVERY = 100  # RigL's own
STEP, HOLDING, UPDATING = "ResNet-34 training step", "RigL attached, a step", "RigL attached, a step with an update"
MEAN = f"RigL attached, mean of {UPDATE_EVERY} steps"


def measure(repeats: int) -> tuple[Times, dict[str, str]]:
    """Enforcing masks on VGG16 and its optimizer state, and RigL attached to ResNet-34 at 99%, each beside the whole
    dense step of that network: seconds, and what each is a share of.
    """
    candidates: dict[str, Callable[[], object]] = {}
    base: dict[str, str] = {}
    for optimizer in ("sgd", "adamw"):
        step = DenseStep(build("vgg16", 1.0), 128, optimizer=optimizer)
        step.masks.set({name: torch.rand(mask.shape) < 0.01 for name, mask in step.masks.masks().items()})
        whole, enforcing = f"VGG16 training step, {optimizer}", f"enforcing masks, {optimizer}"
        candidates[whole] = step
        candidates[enforcing] = lambda step=step: step.masks.enforce(step.optimizer)  # type: ignore[misc]
        base |= dict.fromkeys((whole, enforcing), "VGG16 training step, sgd")
    candidates |= _attached()
    times = interleaved(candidates, repeats)
    times[MEAN] = [
        ((UPDATE_EVERY - 1) * holding + updating) / UPDATE_EVERY
        for holding, updating in zip(times[HOLDING], times[UPDATING], strict=True)
    ]
    return times, base | dict.fromkeys((STEP, HOLDING, UPDATING, MEAN), STEP)


def _attached() -> dict[str, Callable[[], object]]:
    """RigL on ResNet-34: what its hooks do around an optimizer step, with that step's gradients at hand."""
    network = build("resnet34", 1.0)
    step = DenseStep(network, 128)
    handle = sparsify(network, "rigl", 0.99, total_steps=10**6, update_every=UPDATE_EVERY)
    handle.attach(step.optimizer)
    step()

    def hooks(number: int) -> Callable[[], object]:
        def run() -> None:
            for one in handle.algorithms:
                one.step = number
            for hook in step.optimizer._optimizer_step_pre_hooks.values():
                hook(step.optimizer, (step.optimizer,), {})
            for hook in step.optimizer._optimizer_step_post_hooks.values():
                hook(step.optimizer, (step.optimizer,), {})

        return run

    return {STEP: DenseStep(build("resnet34", 1.0), 128), HOLDING: hooks(1), UPDATING: hooks(UPDATE_EVERY - 1)}
