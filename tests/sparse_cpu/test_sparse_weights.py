"""The index of kept weights: right in every order, made anew when a mask changed, and only then."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparse_lab.models import dyrelu, weight_sharing
from sparse_lab.models.registry import build
from sparse_lab.sparse_cpu.sparse_weights import SparseWeight, sparse_weights
from sparse_lab.sparsity.masks import Masks


def masked(*layers: nn.Module, density: float = 0.2) -> tuple[nn.Module, Masks]:
    torch.manual_seed(0)
    model = nn.Sequential(*layers)
    masks = Masks(model)
    masks.set({name: torch.rand(mask.shape) < density for name, mask in masks.masks().items()})
    return model, masks


def wanted(layer: nn.Module) -> list[int]:
    return layer.mask.view(-1).nonzero()[:, 0].tolist()


def test_every_weight_with_a_mask_is_live_and_no_other() -> None:
    model = build("resnet34", 10, 0.125, 16)
    weight_sharing.share(model)
    dyrelu.install(model, 16)
    masks = Masks(model)
    assert list(sparse_weights(model)) == list(masks.weights().values())


def test_positions_and_values_are_those_of_the_mask() -> None:
    model, _ = masked(nn.Conv2d(5, 7, 3), nn.Linear(40, 9))
    for layer in model:
        live = SparseWeight(layer)
        assert live.positions.dtype == np.int64
        assert live.positions.tolist() == wanted(layer)
        assert np.array_equal(live.values, layer.weight.detach()[layer.mask].numpy())
        live.values[:] = 9.0
        assert layer.weight.max() < 9.0, "the values are no copy"


@given(
    outputs=st.integers(1, 4), inputs=st.integers(1, 4), rows=st.integers(1, 4), columns=st.integers(1, 4),
    groups=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_both_orders_hold_each_kept_weight_once_and_sorted(
    outputs: int, inputs: int, rows: int, columns: int, groups: int, seed: int
) -> None:
    shape = (outputs * groups, inputs, rows, columns)
    layer = nn.Conv2d(inputs * groups, outputs * groups, (rows, columns), groups=groups)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    Masks(layer).set({"": mask})
    kept = mask.nonzero().numpy()
    # by output: (channel, row); by input: (channel in the whole map, row from the last to the first)
    channel_in = kept[:, 1] + kept[:, 0] // outputs * inputs
    buckets = {
        "output": (kept[:, 0] * rows + kept[:, 2], shape[0] * rows, channel_in),
        "input": (channel_in * rows + rows - 1 - kept[:, 2], inputs * groups * rows, kept[:, 0]),
    }
    live = SparseWeight(layer)
    for side, (bucket, number, other) in buckets.items():
        order = live.order(side, shape, groups)
        entries = np.argsort(bucket, kind="stable")
        assert np.array_equal(order.entries, entries)
        assert np.array_equal(order.first, np.searchsorted(bucket[entries], np.arange(number + 1)))
        assert np.array_equal(order.inner, other[entries])
        assert np.array_equal(order.row, kept[entries, 2])
        assert np.array_equal(order.column, kept[entries, 3])


def flipped(mask: torch.Tensor) -> torch.Tensor:
    """As many kept, elsewhere."""
    return mask.flatten().roll(1).view(mask.shape)


def by_set(model: nn.Module, masks: Masks) -> None:
    masks.set({"0": flipped(masks["0"])})


def by_state(model: nn.Module, masks: Masks) -> None:
    other = copy.deepcopy(model.state_dict())
    other["0.mask"] = flipped(other["0.mask"])
    model.load_state_dict(other)


def by_assigned_state(model: nn.Module, masks: Masks) -> None:
    other = copy.deepcopy(model.state_dict())
    other["0.mask"] = flipped(other["0.mask"])
    model.load_state_dict(other, assign=True)


def in_place(model: nn.Module, masks: Masks) -> None:
    mask = masks["0"]
    first = mask.view(-1).nonzero()[0]
    mask.view(-1)[first] = False


CHANGES: dict[str, Callable[[nn.Module, Masks], None]] = {
    "Masks.set": by_set,
    "load_state_dict": by_state,
    "load_state_dict, assigned": by_assigned_state,
    "one position": in_place,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_mask_is_noticed_and_other_layers_keep_their_index(name: str) -> None:
    model, masks = masked(nn.Conv2d(5, 7, 3), nn.Conv2d(7, 6, 3), nn.Linear(40, 9))
    first, *rest = (SparseWeight(layer) for layer in model)
    old = first.positions
    kept = [live.positions for live in rest]
    orders = [live.order("output", tuple(live.weight.shape) + (1,) * (4 - live.weight.dim()), 1) for live in rest]
    stale = first.order("output", (7, 5, 3, 3), 1)
    first.gradient = np.ones(len(old), np.float32)
    CHANGES[name](model, masks)
    assert first.positions.tolist() == wanted(model[0]) != old.tolist()
    assert first.gradient is None, "a gradient of other positions"
    assert first.order("output", (7, 5, 3, 3), 1) is not stale
    for live, positions, order in zip(rest, kept, orders, strict=True):
        assert live.positions is positions
        assert live.order("output", tuple(live.weight.shape) + (1,) * (4 - live.weight.dim()), 1) is order


def test_an_unchanged_mask_that_is_set_again_keeps_index_and_gradient() -> None:
    model, masks = masked(nn.Conv2d(5, 7, 3))
    live = SparseWeight(model[0])
    positions, order = live.positions, live.order("input", (7, 5, 3, 3), 1)
    live.gradient = gradient = np.ones(len(positions), np.float32)
    masks.set(copy.deepcopy(masks.masks()))
    assert live.positions is positions
    assert live.order("input", (7, 5, 3, 3), 1) is order
    assert live.gradient is gradient


def test_masks_that_come_and_go_unseen_are_not_mistaken_for_one_another() -> None:
    model, _ = masked(nn.Conv2d(5, 7, 3))
    live = SparseWeight(model[0])
    assert live.positions.tolist() == wanted(model[0])
    for _ in range(50):  # memory, and with it identity, is soon used again
        model[0].mask = flipped(model[0].mask.clone())
        model[0].mask = flipped(model[0].mask.clone())
        assert live.positions.tolist() == wanted(model[0])


def test_a_step_after_a_change_uses_the_new_positions(twins: type) -> None:
    torch.manual_seed(0)
    pair = twins(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 3, stride=2)))
    images = torch.randn(6, 4, 7, 7)
    for seed in range(4):
        pair.draw(0.05 * (seed + 1), seed)
        with torch.no_grad():  # what has grown is not zero
            for model in (pair.dense, pair.sparse):
                torch.manual_seed(seed)
                for layer in model:
                    layer.weight.copy_(torch.randn(layer.weight.shape) * layer.mask)
        errors = pair.step(images)
        assert max(errors.values()) < 1e-12, errors


def test_gradients_of_two_uses_add_up_until_they_are_cleared() -> None:
    model, _ = masked(nn.Conv2d(5, 7, 3))
    live = SparseWeight(model[0])
    live.add(np.arange(3.0))
    live.add(np.arange(3.0))
    assert live.gradient is not None
    assert live.gradient.tolist() == [0.0, 2.0, 4.0]
    live.gradient = None
    live.add(np.ones(3))
    assert live.gradient.tolist() == [1.0, 1.0, 1.0]
