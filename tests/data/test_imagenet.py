from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from sparse_lab.config import AugmentConfig, DatasetConfig, TrainingConfig
from sparse_lab.data import build, check
from sparse_lab.errors import UserError

CLASSES = ["n01", "n02", "n03"]
TRAINING = TrainingConfig(batch_size=4)


def write(path: Path, size: tuple[int, int], mode: str, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    noise = rng.integers(0, 256, (6, 7, *channels), dtype=np.uint8)
    Image.fromarray(noise, mode=mode).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> DatasetConfig:
    """8 + 3 photos a class, of several sizes; one in grey, one with transparency."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 3)):
        for name in CLASSES:
            for number in range(count):
                kind = "RGB" if number else "L"
                write(tmp_path / "imagenet" / part / name / f"{number}.JPEG", (40 + 5 * number, 60), kind, rng)
    write(tmp_path / "imagenet" / "val" / "n01" / "clear.png", (50, 50), "RGBA", rng)
    return DatasetConfig(name="imagenet", root=str(tmp_path), num_classes=3, image_size=28, validation=0.25, workers=0)


def test_sizes_labels_and_shapes(photos: DatasetConfig) -> None:
    data = build(photos, TRAINING, seed=1)
    assert (data.train.count, data.validation.count, data.test.count) == (18, 6, 10)
    assert (len(data.train), len(data.validation), len(data.test)) == (4, 2, 3)
    images, labels = next(iter(data.train))
    assert images.shape == (4, 3, 28, 28) and images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert torch.cat([labels for _, labels in data.test]).tolist() == [0] * 4 + [1] * 3 + [2] * 3
    assert data.official and list(data.md5) == ["imagenet"]


def test_training_and_validation_photos_are_disjoint_and_cover_the_folder(photos: DatasetConfig) -> None:
    data = build(photos, TRAINING, seed=1)
    parts = [data.train.paths, data.validation.paths]  # type: ignore[attr-defined]
    assert sorted(parts[0] + parts[1]) == sorted(map(str, (Path(photos.root) / "imagenet" / "train").rglob("*.JPEG")))


def test_evaluation_resizes_and_cuts_the_centre(photos: DatasetConfig) -> None:
    data = build(dataclasses.replace(photos, mean=[0.5] * 3, std=[0.25] * 3), TRAINING, seed=1)
    images = torch.cat([images for images, _ in data.test])
    for path, image in zip(data.test.paths, images, strict=True):  # type: ignore[attr-defined]
        with Image.open(path) as photo:
            whole = photo.convert("RGB")
        scale = 32 / min(whole.size)
        scaled = whole.resize((int(whole.width * scale), int(whole.height * scale)), Image.Resampling.BILINEAR)
        left, top = round((scaled.width - 28) / 2), round((scaled.height - 28) / 2)
        window = np.asarray(scaled.crop((left, top, left + 28, top + 28)), dtype=np.float64)
        wanted = (torch.from_numpy(window).permute(2, 0, 1) / 255 - 0.5) / 0.25
        assert (image.double() - wanted).abs().max() < 1e-5


def test_an_epoch_depends_on_seed_and_epoch_not_on_workers_or_the_global_state(photos: DatasetConfig) -> None:
    alone = build(photos, TRAINING, seed=1).train
    helped = build(dataclasses.replace(photos, workers=2), TRAINING, seed=1).train
    torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate()
    first = list(alone)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    torch.manual_seed(4)
    for (images, labels), (there, there_labels) in zip(first, helped, strict=True):
        assert torch.equal(images, there) and torch.equal(labels, there_labels)
    alone.sampler.set_epoch(1)
    assert not torch.equal(first[0][0], next(iter(alone))[0])
    alone.set_epoch(0)
    assert torch.equal(first[0][0], next(iter(alone))[0])


def test_the_same_photo_looks_different_in_the_next_epoch(photos: DatasetConfig) -> None:
    train = build(dataclasses.replace(photos, train_limit=1), TRAINING, seed=1).train
    first = next(iter(train))[0]
    train.set_epoch(1)
    assert not torch.equal(first, next(iter(train))[0])


def test_the_flip_can_be_switched_off(photos: DatasetConfig) -> None:
    """With the flip off, one photo's crops run the same way in every epoch; with it on, about half are mirrored."""
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))
    for number, path in enumerate((Path(photos.root) / "imagenet" / "train").rglob("*.JPEG")):
        Image.fromarray(ramp - ramp // (number + 2)).save(path)
    shares = {}
    for name, flip, mirror in (("on", True, True), ("flip off", False, True), ("mirror off", True, False)):
        training = TrainingConfig(batch_size=18, augment=AugmentConfig(flip=flip))
        train = build(dataclasses.replace(photos, mirror=mirror), training, seed=1).train
        falls = []
        for epoch in range(4):
            train.set_epoch(epoch)
            images, _ = next(iter(train))
            falls.append((images[..., 0].mean((1, 2)) > images[..., -1].mean((1, 2))).double().mean().item())
        shares[name] = sum(falls) / 4
    assert shares["flip off"] == shares["mirror off"] == 0
    assert 0.3 < shares["on"] < 0.7


def test_ranks_decode_disjoint_photos_of_the_same_batches(photos: DatasetConfig) -> None:
    whole = list(build(photos, TRAINING, seed=1).train)
    ranks = [list(build(photos, TRAINING, seed=1, rank=rank, world_size=2).train) for rank in (0, 1)]
    for (images, _), (even, _), (odd, _) in zip(whole, *ranks, strict=True):
        assert torch.equal(images[0::2], even) and torch.equal(images[1::2], odd)


def test_fixed_batches_are_plain_and_the_same_whatever_the_epoch(photos: DatasetConfig) -> None:
    train = build(photos, TRAINING, seed=1).train
    first = train.fixed(2)
    train.set_epoch(5)
    again = train.fixed(2)
    assert len(first) == 2 and all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    plain = torch.cat([images for images, _ in train._decoded([torch.arange(18)], _plain(28), 0)])  # type: ignore[attr-defined]
    for image in first[0][0]:
        assert (plain == image).flatten(1).all(1).sum() == 1


def _plain(size: int) -> v2.Compose:
    return v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), v2.PILToTensor()])


def test_a_root_that_holds_train_and_val_itself_is_used(photos: DatasetConfig) -> None:
    inner = dataclasses.replace(photos, root=str(Path(photos.root) / "imagenet"))
    assert build(inner, TRAINING, seed=1).md5 == build(photos, TRAINING, seed=1).md5


def test_the_md5_tells_other_files_apart(photos: DatasetConfig) -> None:
    before = build(photos, TRAINING, seed=1).md5
    path = Path(photos.root) / "imagenet" / "train" / "n02" / "3.JPEG"
    path.write_bytes(path.read_bytes() + b"\0")
    assert build(photos, TRAINING, seed=1).md5 != before


def test_each_mistake_is_one_line(photos: DatasetConfig, tmp_path: Path) -> None:
    base = tmp_path / "imagenet"
    with pytest.raises(UserError, match=r"no train/ and val/.*paths.data=DIR"):
        check(dataclasses.replace(photos, root=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"3 classes, but dataset\.num_classes=1000"):
        check(dataclasses.replace(photos, num_classes=1000))
    (base / "train" / "n04").mkdir()
    with pytest.raises(UserError, match=r"different classes.*n04"):
        check(photos)
    (base / "val" / "n04").mkdir()
    with pytest.raises(UserError, match="n04"):
        build(dataclasses.replace(photos, num_classes=4), TRAINING, seed=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_photo_is_named_in_one_line(photos: DatasetConfig, workers: int) -> None:
    path = Path(photos.root) / "imagenet" / "val" / "n01" / "0.JPEG"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])  # its head is fine
    data = build(dataclasses.replace(photos, workers=workers), TRAINING, seed=1)
    with pytest.raises(UserError) as caught:
        list(data.test)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    path.write_bytes(whole[:100])
    with pytest.raises(UserError, match="cannot be read as an image"):
        build(photos, TRAINING, seed=1)


def test_photos_go_on_within_an_epoch_that_is_set_after_the_iterator_is_made(photos: DatasetConfig) -> None:
    whole, again = build(photos, TRAINING, seed=1).train, build(photos, TRAINING, seed=1).train
    whole.set_epoch(5)
    wanted = list(whole)
    again.load_state_dict({"taken": 1})
    rest = iter(again)
    again.set_epoch(5)
    for (images, labels), (want, want_labels) in zip(rest, wanted[1:], strict=True):
        assert torch.equal(images, want) and torch.equal(labels, want_labels)
