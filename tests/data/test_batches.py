from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from sparse_lab.config import AugmentConfig
from sparse_lab.data.batches import Batches
from sparse_lab.data.plan import Plan
from sparse_lab.errors import UserError

TRAIN = Plan(batch_size=16, shuffle=True, drop_last=True, seed=7)


def made(plan: Plan = TRAIN, count: int = 100, device: str = "cpu", **keys: Any) -> Batches:
    """Images whose first two channels hold 1 + row and 1 + column and whose third holds the image's index."""
    grid = torch.arange(1, 17, dtype=torch.uint8)
    images = torch.empty(count, 3, 16, 16, dtype=torch.uint8)
    images[:, 0], images[:, 1] = grid[:, None], grid[None, :]
    images[:, 2] = torch.arange(count, dtype=torch.uint8)[:, None, None]
    options: dict[str, Any] = {"augment": AugmentConfig(crop_padding=3), "mean": [0.0] * 3, "std": [1 / 255] * 3}
    labels = torch.arange(count) % 10
    return Batches(images=images.to(device), labels=labels.to(device), plan=plan, **(options | keys))


def everything(loader: Batches) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_shapes_types_and_length() -> None:
    batches = list(made())
    assert len(batches) == len(made()) == 6
    for images, labels in batches:
        assert images.shape == (16, 3, 16, 16) and images.dtype == torch.float32
        assert labels.shape == (16,) and labels.dtype == torch.int64
    assert made().batch_size == 16


def test_labels_stay_with_their_images() -> None:
    images, labels = everything(made(augment=None))
    index = images[:, 2, 0, 0].round().long()
    assert index.unique().numel() == 96
    assert torch.equal(index % 10, labels)


def test_without_augmentation_the_pixels_come_out_as_they_are() -> None:
    loader = made(Plan(batch_size=32), augment=None)
    images, _ = everything(loader)
    assert torch.allclose(images, loader.images.float(), atol=1e-4)


def test_windows_are_real_crops_at_every_offset() -> None:
    loader = made(Plan(batch_size=50, shuffle=True), count=200)
    corners = set()
    for epoch in range(10):
        loader.set_epoch(epoch)
        images, _ = everything(loader)
        # Pixel (8, 8) lies inside the image for every offset: it tells where the window began, and which way it runs.
        middle, beside = images[:, :2, 8, 8].round().long(), images[:, 1, 8, 9].round().long()
        columns = torch.where(beside > middle[:, 1], middle[:, 1] - 6, middle[:, 1] - 5)
        corners |= set(zip((middle[:, 0] - 6).tolist(), columns.tolist(), strict=True))
    assert corners == {(row, column) for row in range(7) for column in range(7)}


@pytest.mark.parametrize(
    ("flip", "mirror", "low", "high"), [(True, True, 0.4, 0.6), (True, False, 0, 0), (False, True, 0, 0)]
)
def test_half_of_the_images_are_mirrored_where_allowed(flip: bool, mirror: bool, low: float, high: float) -> None:
    loader = made(Plan(batch_size=200, shuffle=True), count=200, augment=AugmentConfig(flip=flip), mirror=mirror)
    shares = []
    for epoch in range(5):
        loader.set_epoch(epoch)
        images, _ = everything(loader)
        shares.append((images[:, 1, 8, 9] < images[:, 1, 8, 8]).double().mean().item())
    assert low <= sum(shares) / 5 <= high


def test_an_epoch_is_the_same_each_time_and_differs_from_the_next() -> None:
    loader, fresh = made(), made()
    first, again = everything(loader), everything(loader)
    assert torch.equal(first[0], again[0])
    loader.sampler.set_epoch(1)
    second = everything(loader)
    assert not torch.equal(first[1], second[1])
    fresh.set_epoch(1)
    assert torch.equal(everything(fresh)[0], second[0]), "no earlier epoch is needed to get to this one"


def test_augmentation_differs_between_epochs_even_where_the_order_is_fixed() -> None:
    loader = made(Plan(batch_size=100))
    first, _ = everything(loader)
    loader.set_epoch(1)
    assert not torch.equal(first, everything(loader)[0])


@pytest.mark.parametrize("ahead", [2, 4, 64])
@pytest.mark.parametrize(
    "plan", [TRAIN, Plan(16), Plan(16, shuffle=True, drop_last=True, seed=7, rank=1, world_size=2)]
)
def test_batches_made_ahead_are_the_same_batches(ahead: int, plan: Plan) -> None:
    """As on a GPU, where many are made at a time: also where a run goes on within an epoch."""
    one_by_one, ahead_of_time = made(plan), made(plan, ahead=ahead, layout=torch.channels_last)
    for skipped in (0, 3):
        for loader in (one_by_one, ahead_of_time):
            loader.load_state_dict({"taken": skipped})
        wanted, found = list(one_by_one), list(ahead_of_time)
        assert len(wanted) == len(found) == len(one_by_one) - skipped
        for (images, labels), (ours, our_labels) in zip(wanted, found, strict=True):
            assert torch.equal(images, ours) and torch.equal(labels, our_labels)
            assert ours.is_contiguous(memory_format=torch.channels_last)


def test_the_global_random_state_is_neither_used_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)["state"]["key"].copy()
    first, _ = everything(made())
    made().fixed(2)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state(legacy=False)["state"]["key"]).all()
    torch.manual_seed(2)
    assert torch.equal(first, everything(made())[0])


def test_two_ranks_see_the_images_of_one_process_augmented_alike() -> None:
    ranks = [made(Plan(16, shuffle=True, drop_last=True, seed=7, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [loader.batch_size for loader in ranks] == [8, 8]
    for (whole, _), (even, _), (odd, _) in zip(made(), *ranks, strict=True):
        assert torch.equal(whole[0::2], even) and torch.equal(whole[1::2], odd)


def test_fixed_batches_are_plain_training_images_and_leave_the_epoch_alone() -> None:
    loader = made()
    before, _ = everything(loader)
    batches = loader.fixed(3)
    assert len(batches) == 3 and loader.epoch == 0
    loader.set_epoch(4)
    for (images, labels), (again, _) in zip(batches, loader.fixed(3), strict=True):
        index = images[:, 2, 0, 0].round().long()
        assert torch.equal(index % 10, labels)
        assert torch.allclose(images, loader.images[index].float(), atol=1e-4), "no crop, no flip"
        assert torch.equal(images, again)
    loader.set_epoch(0)
    assert torch.equal(before, everything(loader)[0])


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(UserError, match=r"3 image.* 4 devices"):
        made(Plan(16, world_size=4), count=3)
    with pytest.raises(UserError, match="crop_padding"):
        made(augment=AugmentConfig(crop_padding=16, padding_mode="reflect"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_the_device_does_not_change_the_batches(mode: str) -> None:
    augment = AugmentConfig(padding_mode=mode)
    for (images, labels), (there, there_labels) in zip(
        made(augment=augment), made(augment=augment, device="cuda"), strict=True
    ):
        assert there.device.type == there_labels.device.type == "cuda"
        assert torch.equal(labels, there_labels.cpu())
        assert torch.allclose(images, there.cpu(), rtol=1e-6)


def test_a_loader_goes_on_within_an_epoch() -> None:
    """As Lightning does it: the state is put back, the iterator made, and only then is the epoch set."""
    whole = made()
    whole.set_epoch(3)
    wanted = list(whole)
    stopped = made()
    stopped.set_epoch(3)
    first = [batch for _, batch in zip(range(2), stopped, strict=False)]
    state = stopped.state_dict()
    again = made()
    again.load_state_dict(state)
    rest = iter(again)
    again.set_epoch(3)
    for (images, labels), (want, want_labels) in zip([*first, *rest], wanted, strict=True):
        assert torch.equal(images, want) and torch.equal(labels, want_labels)
    assert len(list(again)) == 6, "only the first pass leaves something out"


def test_at_the_end_of_an_epoch_nothing_is_left_out_of_the_next() -> None:
    loader = made()
    list(loader)
    again = made()
    again.load_state_dict(loader.state_dict())
    assert len(list(again)) == 6
