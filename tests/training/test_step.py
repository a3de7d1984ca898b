"""The compiled training step against the eager one, and what happens where compiling fails. Without a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparse_lab.training import step as room
from sparse_lab.training.step import TrainingStep, compute


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(64, 5)).double()


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=generator),
            torch.randint(0, 5, (6,), generator=generator),
        )
        for _ in range(count)
    ]


def trained(model: nn.Module, step) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Figures of three steps of SGD, and the state that they lead to."""
    torch.manual_seed(7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seen = []
    for images, labels in batches(3):
        optimizer.zero_grad()
        loss, figures = step(images, labels)
        loss.backward()
        optimizer.step()
        seen.append(figures.clone())
    return seen, list(model.state_dict().values())


@pytest.mark.full
def test_the_compiled_step_is_the_eager_one():
    """Loss, hits, gradients (through the weights that they lead to), BatchNorm's statistics. No dropout: compiled code
    draws other numbers.
    """
    eager = network().eval()
    eager[1].train()
    fast, said = copy.deepcopy(eager), []
    wanted = trained(eager, lambda images, labels: compute(eager, images, labels, 0.1))
    step = TrainingStep(fast, 0.1, "full", said.append)
    found = trained(fast, step)
    assert step.failed is None and len(said) == 1 and said[0].startswith("training step ready in ")
    for ours, theirs in zip((*found[0], *found[1]), (*wanted[0], *wanted[1]), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def test_figures_are_the_sums_of_the_batch():
    model = network().eval()
    (images, labels), *_ = batches(1)
    loss, figures = compute(model, images, labels, 0.0)
    logits = model(images)
    by_hand = -logits.log_softmax(1)[range(6), labels]
    assert loss.item() == pytest.approx(by_hand.mean().item(), rel=1e-12)
    assert figures.tolist() == pytest.approx([by_hand.sum().item(), (logits.argmax(1) == labels).sum().item(), 6])
    assert not figures.requires_grad


def breaks(*args, **kwargs):
    raise OSError("no compiler\nand a long story")


def breaks_later(model, **kwargs):
    """What compiles, and fails when it is called: after it has moved BatchNorm's statistics."""

    def call(images, labels):
        model(images, labels)
        raise OSError("no compiler")

    return call


@pytest.mark.parametrize("broken", [breaks, breaks_later])
def test_where_compiling_fails_that_is_said_once_and_nothing_else_changes(monkeypatch, broken):
    monkeypatch.setattr(room.torch, "compile", broken)
    eager = network()
    fast, said = copy.deepcopy(eager), []
    wanted = trained(eager, lambda images, labels: compute(eager, images, labels, 0.0))
    step = TrainingStep(fast, 0.0, "full", said.append)
    found = trained(fast, step)
    assert said == ["trainer.compile=full fails here (OSError: no compiler): goes on in eager mode"]
    assert step.failed == "trainer.compile=full fails here (OSError: no compiler)"
    for ours, theirs in zip((*found[0], *found[1]), (*wanted[0], *wanted[1]), strict=True):
        assert torch.equal(ours, theirs)  # dropout too: the trial has drawn no number
    step.renew()
    step(*batches(1)[0])
    assert len(said) == 1


def test_graphs_alone_need_a_gpu(monkeypatch):
    said = []
    step = TrainingStep(network(), 0.0, "graphs", said.append)
    step(*batches(1)[0])
    assert said == ["trainer.compile=graphs fails here (RuntimeError: CUDA graphs need a GPU): goes on in eager mode"]


@pytest.mark.full
def test_after_renew_the_changed_network_is_computed():
    model = network().eval()
    step = TrainingStep(model, 0.0, "full", lambda line: None)
    batch = batches(1)[0]
    before = step(*batch)[0].item()
    model[2] = nn.Tanh()
    step.renew()
    after = step(*batch)[0].item()
    assert after == pytest.approx(compute(model, *batch, 0.0)[0].item(), rel=1e-12) and after != before
