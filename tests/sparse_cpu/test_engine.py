"""When torch computes, which gradients are left, and what calls leave alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from sparse_lab import models
from sparse_lab.sparse_cpu import timers
from sparse_lab.sparse_cpu.engine import DENSE_ABOVE, SparseArithmetic
from sparse_lab.sparsity.masks import Masks

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def resnet(density: float) -> tuple[nn.Module, Masks]:
    torch.manual_seed(0)
    model = models.build("resnet34", 10, 0.125, 16)
    masks = Masks(model)
    masks.set({name: torch.rand(mask.shape) < density for name, mask in masks.masks().items()})
    return model, masks


def step(arithmetic: SparseArithmetic) -> torch.Tensor:
    loss = functional.cross_entropy(arithmetic(IMAGES), torch.arange(6))
    loss.backward()
    return loss.detach()


def test_density_is_the_kept_share() -> None:
    model, masks = resnet(0.2)
    assert SparseArithmetic(model).density() == masks.kept() / masks.unique()


def test_a_dense_network_is_torchs_and_its_gradients_are_dense() -> None:
    model, _ = resnet(1.25 * DENSE_ABOVE)
    twin = copy.deepcopy(model)
    arithmetic = SparseArithmetic(model)
    for live in arithmetic.live.values():
        live.gradient = np.zeros(len(live.positions), np.float32)
    loss = step(arithmetic)
    wanted = functional.cross_entropy(twin(IMAGES), torch.arange(6))
    wanted.backward()
    assert torch.equal(loss, wanted.detach())
    for weight, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(weight.grad, other.grad)
    assert all(live.gradient is None for live in arithmetic.live.values())


def test_a_network_becomes_sparse_and_dense_again_as_its_masks_say() -> None:
    model, masks = resnet(0.5)
    arithmetic = SparseArithmetic(model)
    full = {name: mask.clone() for name, mask in masks.masks().items()}
    for thin in (False, True, False):
        masks.set({name: mask & (torch.rand(mask.shape) < 0.2) if thin else mask for name, mask in full.items()})
        model.zero_grad()
        step(arithmetic)
        for weight, live in arithmetic.live.items():
            assert (weight.grad is None) == thin
            assert (live.gradient is not None) == thin


def test_dense_gradients_come_beside_the_compact_ones_and_only_while_asked_for() -> None:
    model, _ = resnet(0.1)
    arithmetic = SparseArithmetic(model)
    for asked in (False, True, False):
        model.zero_grad()
        for live in arithmetic.live.values():
            live.gradient = None
        arithmetic.dense_gradients = asked
        step(arithmetic)
        for weight, live in arithmetic.live.items():
            assert live.gradient is not None
            assert live.gradient.shape == live.positions.shape
            assert live.gradient.dtype == np.float32
            assert (weight.grad is not None) == asked
            if asked:
                pruned = torch.from_numpy(~np.isin(np.arange(weight.numel()), live.positions))
                assert weight.grad.view(-1)[pruned].any()


def test_gradients_of_two_batches_add_up() -> None:
    torch.manual_seed(0)
    model = resnet(0.1)[0].double().eval()
    twin = copy.deepcopy(model)
    arithmetic = SparseArithmetic(model)
    for batch in IMAGES.double().split(3):
        arithmetic(batch).square().sum().backward()
        twin(batch).square().sum().backward()
    for weight, other in zip(model.parameters(), twin.parameters(), strict=True):
        live = arithmetic.live.get(weight)
        wanted = other.grad if live is None else other.grad.view(-1)[torch.from_numpy(live.positions)]
        got = weight.grad if live is None else torch.from_numpy(live.gradient)
        assert (got - wanted).norm() <= 1e-11 * wanted.norm()


def test_a_second_backward_pass_is_refused_and_not_silently_empty() -> None:
    arithmetic = SparseArithmetic(resnet(0.1)[0])
    loss = arithmetic(IMAGES).square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_evaluation_records_nothing_and_changes_nothing() -> None:
    model, _ = resnet(0.1)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        logits = SparseArithmetic(model)(IMAGES)
    assert not logits.requires_grad
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_a_network_that_is_handed_a_tensor_computes_as_ever() -> None:
    model, _ = resnet(0.1)
    model.eval()
    with torch.no_grad():
        before = model(IMAGES)
        SparseArithmetic(model)(IMAGES)
        assert torch.equal(model(IMAGES), before)


def test_images_keep_their_numbers() -> None:
    images = IMAGES.clone()
    step(SparseArithmetic(resnet(0.1)[0]))
    assert torch.equal(images, IMAGES)


STEP = {
    "pack",
    "forward convolution",
    "normalisation, activation, pooling",
    "gradient of normalisation",
    "weight gradient",
    "input gradient",
}


def test_seconds_are_counted_by_kind_while_somebody_records() -> None:
    arithmetic = SparseArithmetic(resnet(0.1)[0])
    step(arithmetic)
    with timers.recording() as seconds:
        step(arithmetic)
    assert set(seconds) >= STEP
    assert "dense gradient" not in seconds
    assert all(0.0 < one < 60.0 for one in seconds.values())
    counted = dict(seconds)
    step(arithmetic)
    assert seconds == counted, "it went on after its end"
    arithmetic.dense_gradients = True
    with timers.recording() as outer:
        with timers.recording() as inner, torch.no_grad():
            arithmetic(IMAGES)
        step(arithmetic)
    assert set(inner) == {"pack", "forward convolution", "normalisation, activation, pooling"}
    assert set(outer) >= STEP | {"dense gradient"}


def test_nothing_is_counted_where_nobody_records() -> None:
    assert timers.timed("anything") is timers.timed("something else")
