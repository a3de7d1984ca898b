"""What is worked out once for a mask is worked out anew when anything that it depends on is another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_lab.sparse_cpu import sparse_weights
from sparse_lab.sparse_cpu.sparse_weights import SparseWeight
from sparse_lab.sparsity.masks import Masks

EXACT = 1e-10
Change = Callable[[Any, Tensor], Tensor | None]


def network() -> nn.Module:
    """Convolutions by rows and by taps, and channels that nothing feeds."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def without(*channels: int, layer: str, side: int) -> Change:
    """The mask of one layer keeps nothing of these output (side 0) or input channels (side 1) any more."""

    def change(twins: Any, images: Tensor) -> None:
        masks = {name: mask.clone() for name, mask in twins.masks[0].masks().items()}
        masks[layer].index_fill_(side, torch.tensor(channels), False)
        twins.set(masks)

    return change


def moved(twins: Any, images: Tensor) -> None:
    """As many kept weights in every layer, at other positions, in the same memory."""
    for masks in twins.masks:
        for name, mask in masks.masks().items():
            mask.copy_(mask.roll(1, 0).roll(1, 1))
            with torch.no_grad():
                masks.weights()[name].copy_(masks.weights()[name].roll(1, 0).roll(1, 1))


def replaced(twins: Any, images: Tensor) -> None:
    for masks in twins.masks:
        for layer in masks.layers.values():
            layer.mask = layer.mask.flip(0)
            layer.weight.data = layer.weight.data.flip(0)


def new_weights(twins: Any, images: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, weight in twins.masks[0].weights().items():
        drawn = torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * twins.masks[0][name]
        weight.data, twins.masks[1].weights()[name].data = drawn, drawn.clone()


def redrawn(twins: Any, images: Tensor) -> None:
    twins.draw(0.15, seed=1)
    new_weights(twins, images)  # regrown ones are zero


def revived(twins: Any, images: Tensor) -> None:
    """Channels that nothing fed vary from now on; the masks of the layers that read them stay as they are."""
    masks = {name: mask.clone() for name, mask in twins.masks[0].masks().items()}
    masks["0"][[2, 9], 0, 1, :2] = True
    twins.set(masks)
    new_weights(twins, images)


def setting(layer: int, **settings: object) -> Change:
    """What a convolution is told besides its weight."""

    def change(twins: Any, images: Tensor) -> None:
        for model in (twins.dense, twins.sparse):
            for name, value in settings.items():
                setattr(model[layer], name, value)

    return change


def dense_gradients(twins: Any, images: Tensor) -> None:
    twins.arithmetic.dense_gradients = True


def dead_norm(twins: Any, images: Tensor) -> None:
    """A layer in front of a convolution lets other channels through."""
    for model in (twins.dense, twins.sparse):
        model[2] = nn.Sequential(nn.ReLU(), nn.Tanh())


CHANGES: dict[str, Change] = {
    "mask in place": moved,
    "mask replaced": replaced,
    "mask redrawn": redrawn,
    "mask of the layer in front": without(0, 3, 7, layer="0", side=0),
    "mask of the layer in front, regrown": revived,
    "mask of the layer behind": without(1, 2, 5, 8, layer="7", side=1),
    "mask of a layer further behind": without(0, 1, 4, 6, layer="8", side=1),
    "weights": new_weights,
    "fewer images": lambda twins, images: images[:5],
    "smaller images": lambda twins, images: images[..., :6, :8],
    "as many images of another shape": lambda twins, images: images.reshape(12, 3, 8, 18),
    "stride": setting(7, stride=(2, 2)),
    "padding": setting(3, padding=(0, 0)),
    "dilation": setting(3, dilation=(2, 2), padding=(2, 2)),
    "evaluation": lambda twins, images: twins.train(False),
    "dense gradients": dense_gradients,
    "another activation": dead_norm,
}


@pytest.mark.parametrize("name", CHANGES)
def test_nothing_recorded_outlives_what_it_depends_on(twins: Any, name: str) -> None:
    pair = twins(network())
    without(2, 9, layer="0", side=0)(pair, torch.empty(0))
    images = torch.randn(12, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    for _ in range(2):  # made, and used again
        assert max(pair.step(images).values()) < EXACT
    changed = CHANGES[name](pair, images)
    for now in (images if changed is None else changed,) * 2:
        errors = pair.step(now)
        assert max(errors.values()) < EXACT, errors
    if changed is not None:
        assert max(pair.step(images).values()) < EXACT


def test_a_mask_that_changes_between_a_forward_and_a_backward_pass_has_gradients_of_its_own(twins: Any) -> None:
    pair = twins(network())
    images = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    pair.step(images)
    outcome = pair.arithmetic(images)
    pair.draw(0.05, seed=3)
    outcome.sum().backward()
    for live in pair.arithmetic.live.values():
        assert live.gradient.shape == live.positions.shape


def test_a_record_is_kept_until_the_mask_holds_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(6, 6)
    Masks(layer)
    live = SparseWeight(layer)
    record = live.record("key")
    assert record.once("answer", lambda: 42) == record.once("answer", lambda: 43) == 42
    assert live.record("key") is record
    assert live.record("another") is not record
    layer.mask.mul_(layer.mask)  # written to, and the same
    assert live.record("key") is record
    layer.mask[0, 0] = False
    assert live.record("key") is not record
    assert len(live.record("key").positions) == 35
    monkeypatch.setattr(sparse_weights, "RECORDS", 8)
    for number in range(100):
        live.record(number).once(number, list)
        record.once(number, list)
    assert len(live._records) <= 8
    assert len(record._found) <= 8
