"""Masks inside a real Lightning fit: every step, every optimizer, also in bf16, also when a step is skipped."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_lab.algorithms.enforce import EnforceMasks
from sparse_lab.callbacks.rounds import Rounds
from sparse_lab.callbacks.sparsify import Sparsify
from sparse_lab.config import RecipeConfig
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.masks import Masks
from sparse_lab.training.lightning_module import Classifier

OPTIMIZERS = {
    "momentum": RecipeConfig(optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=1e-3),
    "nesterov": RecipeConfig(optimizer="sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": RecipeConfig(optimizer="adam", lr=0.01, weight_decay=1e-3),
    "adamw": RecipeConfig(optimizer="adamw", lr=0.01, weight_decay=1e-2),
}


class Watch(pl.Callback):
    """Looks after every batch; counts what is alive outside the masks."""

    def __init__(self, masks: Masks) -> None:
        self.masks, self.steps, self.alive = masks, 0, 0

    def on_train_batch_end(self, trainer, *rest):
        self.steps += 1
        state = trainer.optimizers[0].state
        for name, module in self.masks.layers.items():
            outside = ~self.masks[name]
            tensors = [module.weight, *(v for v in state[module.weight].values() if v.shape == outside.shape)]
            self.alive += sum(int(torch.count_nonzero(tensor[outside])) for tensor in tensors)


def fit(recipe: RecipeConfig, precision: str, keep: bool, epochs: int = 4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    masks = Masks(model)
    masks.set({name: torch.rand(mask.shape) < 0.05 for name, mask in masks.masks().items()})
    images, labels = torch.randn(80, 3, 8, 8), torch.randint(0, 4, (80,))
    data = DataLoader(TensorDataset(images, labels), batch_size=16)
    clock = Clock(1, epochs, len(data))
    module = Classifier(model, recipe, clock)
    facts = {"sparsity": 0.9, "kept": 1}
    rounds = Rounds(model, module.figures, clock, "last", None, data, lambda: True, lambda: facts, lambda line: None)
    watch = Watch(masks)
    callbacks = [rounds, *([Sparsify(EnforceMasks(masks))] if keep else []), watch]
    trainer = pl.Trainer(
        max_epochs=epochs, precision=precision, accelerator="cpu", callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, data, data)
    return watch, clock


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_lives_outside_the_masks_after_any_step(name, precision):
    watch, _ = fit(OPTIMIZERS[name], precision, keep=True)
    assert watch.steps == 20 and watch.alive == 0


def test_without_the_callback_pruned_weights_revive():
    watch, _ = fit(OPTIMIZERS["momentum"], "32-true", keep=False)
    assert watch.alive > 0


def test_a_skipped_step_changes_nothing_and_ticks_no_clock(monkeypatch):
    """A gradient scaler that skips a step does not call optimizer.step; here every second call is skipped like that."""
    calls = []

    def sometimes(self, optimizer, model=None, closure=None, **kwargs):
        calls.append(1)
        closure()
        if len(calls) % 2:
            optimizer.step()

    monkeypatch.setattr(pl.plugins.precision.Precision, "optimizer_step", sometimes)
    watch, clock = fit(OPTIMIZERS["momentum"], "32-true", keep=True, epochs=2)
    assert len(calls) == 10 and watch.alive == 0
    assert clock.round == 1
    ticked = []
    monkeypatch.setattr(Clock, "tick", lambda self: ticked.append(1))
    fit(OPTIMIZERS["momentum"], "32-true", keep=True, epochs=2)
    assert len(ticked) == 5
