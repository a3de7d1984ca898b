"""Batches that add up to one optimizer step, against the same images in one batch: no BatchNorm, float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from sparse_lab.algorithms.drop_and_grow import RigL
from sparse_lab.algorithms.enforce import EnforceMasks
from sparse_lab.callbacks.sparsify import Sparsify
from sparse_lab.config import RecipeConfig
from sparse_lab.sparse_cpu.engine import SparseArithmetic
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.mask_updates import prune_to
from sparse_lab.sparsity.masks import Masks
from sparse_lab.sparsity.schedules import DropFraction
from sparse_lab.training.accumulation import group_size, steps_after, steps_of
from sparse_lab.training.lightning_module import Classifier
from sparse_lab.training.step import Recorded

BATCHES, SIZE, ACCUMULATE, EPOCHS = 8, 6, 3, 2
GROUPS = [range(0, 3), range(3, 6), range(6, 8)]


@pytest.mark.parametrize("accumulate", range(1, 12))
@pytest.mark.parametrize("batches", range(1, 10))
def test_groups_are_those_that_a_list_is_cut_into(batches, accumulate):
    groups = [list(range(batches))[start : start + accumulate] for start in range(0, batches, accumulate)]
    assert steps_of(batches, accumulate) == len(groups)
    for group in groups:
        assert [group_size(batch, batches, accumulate) for batch in group] == [len(group)] * len(group)
        assert [steps_after(batch, batches, accumulate) for batch in group] == [False] * (len(group) - 1) + [True]


def network() -> nn.Sequential:
    torch.manual_seed(3)
    convs = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*convs, nn.MaxPool2d(4), nn.Flatten(), nn.Linear(12, 5)).double()
    masks = Masks.of(model)
    masks.set(prune_to(masks, 250, {name: weight.abs() for name, weight in masks.weights().items()}, "erk"))
    return model


def images() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(4)
    return [(torch.randn(SIZE, 3, 8, 8, dtype=torch.float64), torch.randint(0, 5, (SIZE,))) for _ in range(BATCHES)]


def rigl(model: nn.Module) -> list:
    """Updates after the second and the fourth of six steps, by gradients before they are clipped."""
    masks = Masks.of(model)
    schedule = DropFraction(2, 0, 6, 0.4)
    return [EnforceMasks(masks), RigL(model, masks, 6, schedule, gradients="before_clipping")]


RECIPE = RecipeConfig(lr=0.2, momentum=0.9, weight_decay=1e-2, epochs=EPOCHS, lr_schedule="constant", clip_norm=0.3)


def by_hand() -> Iterator[nn.Module]:
    """The network after each step on all images of a group at once."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-2)
    callback = Sparsify(*rigl(model))
    for one in callback.algorithms:
        one.attach(optimizer)
    rest = callback.algorithms[1]
    data = images()
    for _ in range(EPOCHS):
        for group in GROUPS:
            optimizer.zero_grad()
            whole = [torch.cat([data[batch][part] for batch in group]) for part in (0, 1)]
            functional.cross_entropy(model(whole[0]), whole[1]).backward()
            rest.gradients_ready(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            yield model


class Handed(pl.Callback):
    """The network after each optimizer step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if len(self.states) < trainer.global_step:
            self.states.append(copy.deepcopy(pl_module.model.state_dict()))


class _Graphed:
    """A step whose backward pass hands out what a CUDA graph would have computed: the same memory each time."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.recorded = Recorded.__new__(Recorded)
        self.recorded.parameters = list(model.parameters())
        self.recorded._gradients = tuple(torch.zeros_like(one) for one in self.recorded.parameters)

    def __call__(self, batch: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss = functional.cross_entropy(self.model(batch), labels)
        for own, new in zip(self.recorded._gradients, torch.autograd.grad(loss, self.recorded.parameters), strict=True):
            own.copy_(new)
        return loss.detach(), torch.ones(3, dtype=torch.float64)

    def backward(self, loss: Tensor, group: int) -> None:
        self.recorded.hand_out(group)


@pytest.mark.parametrize("how", ["dense", "sparse", "graph"])
def test_a_group_is_one_batch_of_its_images_to_the_optimizer_clipping_and_rigl(how):
    """The last group of an epoch has two batches of three: the mean is over its own images."""
    model, handed = network(), Handed()
    arithmetic = SparseArithmetic(model) if how == "sparse" else None
    step = _Graphed(model) if how == "graph" else None
    module = Classifier(model, RECIPE, Clock(1, EPOCHS, 3), arithmetic=arithmetic, step=step)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=RECIPE.clip_norm,
        callbacks=[Sparsify(*rigl(model)), handed],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(images(), batch_size=None))
    assert module.figures.trained == EPOCHS * BATCHES * SIZE
    assert len(handed.states) == 6
    moved = set()
    for number, (wanted, found) in enumerate(zip(by_hand(), handed.states, strict=True)):
        for name, value in wanted.state_dict().items():
            if value.dtype == torch.bool:
                assert torch.equal(value, found[name]), (number, name)
                moved |= {name} if not torch.equal(value, network().state_dict()[name]) else set()
            else:
                torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=f"step {number}: {name}")
    assert moved, "no mask has changed"
