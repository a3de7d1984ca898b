"""Folders of photos made here, read right or refused in one line; pixels against arithmetic of their own."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_lab.config import AugmentConfig, DatasetConfig, TrainingConfig
from sparse_lab.data import build, check, fingerprint_of, folder, look_again
from sparse_lab.data.batches import Batches
from sparse_lab.data.facts import filled, own_parts
from sparse_lab.errors import UserError

TRAINING = TrainingConfig(batch_size=4, augment=AugmentConfig(crop_padding=2))


def noise(seed: int, height: int = 20, width: int = 30, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def write(path: Path, pixels: np.ndarray | None = None, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed) if pixels is None else pixels).save(path)
    return path


def tree(base: Path, counts: dict[str, int], classes: tuple[str, ...] = ("cat", "dog")) -> DatasetConfig:
    """counts: part -> photos a class; "" for class folders alone."""
    seed = 0
    for part, count in counts.items():
        for name in classes:
            for number in range(count):
                write(base / part / name / f"{number}.png", seed=seed)
                seed += 1
    return DatasetConfig(
        name="folder", root=str(base), num_classes=None, image_size=16, mean=[0.0], std=[1.0], validation=0.25
    )


def refused(dataset: DatasetConfig) -> str:
    with pytest.raises(UserError) as caught:
        check(dataset)
    assert "\n" not in str(caught.value) and "account" not in str(caught.value), "nothing of ImageNet's"
    return str(caught.value)


@pytest.mark.parametrize(
    ("counts", "wanted", "own"),
    [
        ({"train": 8, "val": 3}, (12, 4, 6), {"test"}),
        ({"train": 8, "test": 3}, (12, 4, 6), {"test"}),
        ({"train": 8, "val": 3, "test": 2}, (16, 6, 4), {"test", "validation"}),
        ({"train": 8, "valid": 3, "test": 2}, (16, 6, 4), {"test", "validation"}),
        ({"": 10}, (12, 4, 4), set()),
    ],
)
def test_every_layout(counts, wanted, own, tmp_path):
    dataset = tree(tmp_path, counts)
    data = build(dataset, TRAINING, seed=1)
    assert (data.train.count, data.validation.count, data.test.count) == wanted
    assert data.num_classes == 2 and own_parts(dataset) == own and data.scale == 255
    whole = wanted[0] + wanted[1]
    assert data.images == {"train": (wanted[0], whole - wanted[1]), "validation": (wanted[1],) * 2,
                           "test": (wanted[2],) * 2}  # fmt: skip
    assert sorted(data.test.labels.tolist()) == [0] * (wanted[2] // 2) + [1] * (wanted[2] // 2)


def pixels(loader: Batches) -> set[bytes]:
    assert isinstance(loader.images, torch.Tensor)
    return {image.tobytes() for image in loader.images.numpy()}


@pytest.mark.parametrize("counts", [{"train": 8, "val": 3, "test": 2}, {"": 10}, {"train": 6, "val": 3}])
def test_parts_are_disjoint_and_whole(counts, tmp_path):
    data = build(tree(tmp_path, counts), TRAINING, seed=1)
    found = [pixels(part) for part in (data.train, data.validation, data.test)]  # type: ignore[arg-type]
    assert len(set.union(*found)) == sum(map(len, found)) == 2 * sum(counts.values())


def test_a_drawn_test_set_is_the_same_for_all_seeds_and_the_validation_set_is_not(tmp_path):
    dataset = tree(tmp_path, {"": 20})
    one, two = (build(dataset, TRAINING, seed=seed) for seed in (1, 2))
    assert pixels(one.test) == pixels(two.test) and pixels(one.validation) != pixels(two.validation)  # type: ignore[arg-type]
    more = build(dataclasses.replace(dataset, test=0.5), TRAINING, seed=1)
    assert more.test.count == 20


def fit(photo: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of the right shape, by a triangle filter as wide as the scale, in float64."""
    rows, columns = photo.shape[:2]
    sides = min(rows, columns * height / width), min(columns, rows * width / height)
    for axis, (whole, size, side) in enumerate(zip((rows, columns), (height, width), sides, strict=True)):
        scale = side / size
        matrix = np.zeros((size, whole))
        for place in range(size):
            middle = (whole - side) / 2 + (place + 0.5) * scale
            reach = max(scale, 1.0)
            weights = np.maximum(0, 1 - np.abs(np.arange(whole) + 0.5 - middle) / reach)
            matrix[place] = weights / weights.sum()
        photo = np.moveaxis(np.tensordot(matrix, photo.astype(float), (1, axis)), 0, axis)
    return photo


@pytest.mark.parametrize("size", [16, [12, 25], [40, 24]])
@pytest.mark.parametrize("shape", [(20, 30), (33, 17)])
def test_a_photo_is_scaled_to_cover_the_size_and_its_middle_cut_out(size, shape, tmp_path):
    tree(tmp_path, {"train": 2, "test": 1})
    ramp = np.linspace(0, 255, shape[0] * shape[1]).reshape(shape).astype(np.uint8)
    image = np.dstack([ramp, ramp[::-1], noise(3, *shape)[..., 0] // 8 + ramp // 2])
    write(tmp_path / "test" / "cat" / "0.png", image)
    dataset = dataclasses.replace(tree(tmp_path, {}), image_size=size, mean=[0.0] * 3, std=[1.0] * 3)
    found = next(iter(build(dataset, TRAINING, seed=1).test))[0][0] * 255
    height, width = dataset.size
    assert found.shape == (3, height, width)
    assert np.abs(found.permute(1, 2, 0).numpy() - fit(image, height, width)).max() < 2


def test_a_photo_of_that_size_stays_as_it_is(tmp_path):
    tree(tmp_path, {"train": 2, "test": 1})
    image = noise(5, 16, 16)
    write(tmp_path / "test" / "cat" / "0.png", image)
    found = next(iter(build(tree(tmp_path, {}), TRAINING, seed=1).test))[0][0]
    assert torch.equal((found * 255).round().byte(), torch.from_numpy(image).permute(2, 0, 1))


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def none() -> None:
        folder._last.clear()
        monkeypatch.setattr(folder, "available_memory", lambda: 1000)

    return none


def odd(base: Path) -> DatasetConfig:
    """Every kind of file that is read."""
    tree(base, {"train": 3, "test": 2})
    cat = base / "train" / "cat"
    Image.fromarray(noise(70, channels=4), mode="CMYK").save(cat / "cmyk.jpg")
    Image.fromarray(noise(71, channels=4)).save(cat / "clear.png")
    Image.fromarray(noise(72)[..., 0] > 127).save(cat / "bits.png")
    Image.fromarray(noise(73)[..., 0]).save(cat / "grey.jpeg")
    Image.fromarray(noise(74)).quantize(16).save(cat / "palette.png", transparency=3)
    Image.fromarray(np.random.default_rng(75).integers(0, 65536, (20, 30), dtype=np.uint16)).save(cat / "deep.tif")
    return tree(base, {})


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("skip", [False, True])
def test_what_does_not_fit_gives_the_same_batches(channels, skip, tmp_path, no_memory, capsys):
    dataset = dataclasses.replace(odd(tmp_path), channels=channels, mean=None, std=None, skip_corrupt=skip)
    fits = build(dataset, TRAINING, seed=1)
    assert (
        f"16 photos of 2 classes, each {channels}x16x16: decoded once, {4 * channels}.0 KiB in memory"
        in capsys.readouterr().err
    )
    no_memory()
    without = build(dataclasses.replace(dataset, workers=0), TRAINING, seed=1)
    assert "KiB of memory available, so they are decoded batch by batch, in 1 thread(s)" in capsys.readouterr().err
    assert not isinstance(without.train.images, torch.Tensor)  # type: ignore[attr-defined]
    assert (fits.mean, fits.std) == (without.mean, without.std)
    for epoch in (0, 1):
        for one, other in ((fits.train, without.train), (fits.test, without.test)):
            one.set_epoch(epoch)
            other.set_epoch(epoch)
            for (images, labels), (theirs, their_labels) in zip(one, other, strict=True):
                assert torch.equal(images, theirs) and torch.equal(labels, their_labels)
    for (images, _), (theirs, _) in zip(fits.train.fixed(3), without.train.fixed(3), strict=True):
        assert torch.equal(images, theirs)
    stopped = build(dataset, TRAINING, seed=1).train
    stopped.load_state_dict({"taken": 1})
    stopped.set_epoch(1)
    assert torch.equal(next(iter(stopped))[0], list(without.train)[1][0]), "goes on bit for bit"


def test_grey_is_what_arithmetic_says(tmp_path):
    dataset = dataclasses.replace(tree(tmp_path, {"train": 2, "test": 1}), channels=1)
    image = noise(6, 16, 16)
    write(tmp_path / "test" / "cat" / "0.png", image)
    found = next(iter(build(dataset, TRAINING, seed=1).test))[0][0]
    assert found.shape == (1, 16, 16)
    wanted = image.astype(float) @ [0.299, 0.587, 0.114]  # ITU-R 601
    assert np.abs(found[0].numpy() * 255 - wanted).max() <= 1


def test_cmyk_of_a_jpeg_is_not_turned(tmp_path):
    """Adobe stores it inverted, and everybody follows."""
    dataset = tree(tmp_path, {"train": 2, "test": 1})
    ink = np.zeros((16, 16, 4), dtype=np.uint8)
    ink[..., 0], ink[:8, :, 1] = 255, 255  # cyan; blue in the upper half
    (tmp_path / "test" / "cat" / "0.png").unlink()
    Image.fromarray(ink, mode="CMYK").save(tmp_path / "test" / "cat" / "0.jpg", quality=100)
    found = next(iter(build(dataset, TRAINING, seed=1).test))[0][0]
    assert (found[:, 2, 8] - torch.tensor([0.0, 0.0, 1.0])).abs().max() < 0.02
    assert (found[:, 13, 8] - torch.tensor([0.0, 1.0, 1.0])).abs().max() < 0.02


def corrupt(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def test_corrupt_files_are_found_before_training_and_named(tmp_path, no_memory):
    dataset = tree(tmp_path, {"train": 6, "test": 2})
    for name in ("train/cat/1.png", "train/dog/2.png", "test/cat/0.png"):
        corrupt(tmp_path / name)
    (tmp_path / "train" / "dog" / "empty.jpg").touch()
    with pytest.raises(UserError) as caught:
        build(dataset, TRAINING, seed=1)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path}/train/cat/1.png cannot be read as an image (") and "truncated" in line
    assert line.endswith(
        "): replace or delete it, or leave out what cannot be read (it and 3 more) with dataset.skip_corrupt=true"
    )
    no_memory()
    with pytest.raises(UserError, match=r"cannot be read as an image"):
        build(dataclasses.replace(dataset, mean=None, std=None), TRAINING, seed=1)


@pytest.mark.parametrize("fits", [True, False])
def test_corrupt_files_are_left_out_by_name_where_that_is_asked_for(fits, tmp_path, no_memory, capsys):
    dataset = dataclasses.replace(tree(tmp_path, {"train": 6, "val": 3, "test": 2}), skip_corrupt=True)
    names = ("train/cat/1.png", "train/dog/2.png", "val/dog/0.png", "test/cat/0.png")
    for name in names:
        corrupt(tmp_path / name)
    if not fits:
        no_memory()
    data = build(dataset, TRAINING, seed=1)
    assert data.skipped == names
    assert (data.train.count, data.validation.count, data.test.count) == (10, 5, 3)
    assert data.test.labels.tolist() == [0, 1, 1]
    assert f"folder: left out 4 file(s) that cannot be read: {', '.join(names)}\n" in capsys.readouterr().err
    for name in ("0", "2", "3", "4", "5"):
        corrupt(tmp_path / "train" / "cat" / f"{name}.png")
    with pytest.raises(UserError, match=r"train/cat: no photo of the class can be read \(train/cat/0.png, .* cannot\)"):
        build(dataset, TRAINING, seed=1)


def test_a_kind_that_has_no_range_is_refused_all_the_same(tmp_path):
    dataset = dataclasses.replace(tree(tmp_path, {"train": 3, "test": 2}), skip_corrupt=True)
    Image.fromarray(noise(1)[..., 0].astype(np.float32)).save(tmp_path / "train" / "cat" / "float.tif")
    with pytest.raises(UserError, match=r"float\.tif is a TIFF of mode F"):
        build(dataset, TRAINING, seed=1)


def test_photos_are_decoded_once_for_all_runs_of_a_sweep(tmp_path, monkeypatch):
    dataset = tree(tmp_path, {"": 6})
    build(dataset, TRAINING, seed=1)
    decoded: list[str] = []
    real = folder.photo.fitted
    monkeypatch.setattr(folder.photo, "fitted", lambda path, *rest: decoded.append(path) or real(path, *rest))
    for seed in (1, 2):
        build(dataset, TRAINING, seed=seed)
    assert not decoded
    write(tmp_path / "cat" / "0.png", seed=99)
    build(dataset, TRAINING, seed=1)
    assert len(decoded) == 12
    build(dataclasses.replace(dataset, image_size=[8, 12]), TRAINING, seed=1)
    assert len(decoded) == 24


# layouts


LAYOUTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda base: base.rmdir(), "is no folder: point dataset=folder to your photos with paths.data=DIR"),
    "nothing": (lambda base: None, "holds no folders; dataset=folder takes train/ with val/ or test/"),
    "photos alone": (lambda base: write(base / "1.png"), "holds no folders; dataset=folder takes train/ with"),
    "one class": (lambda base: tree(base, {"": 2}, ("cat",)), "only the class folder cat/: it takes two at least"),
    "one class in train": (
        lambda base: tree(base, {"train": 2, "val": 1}, ("cat",)), "train holds only the class folder cat/",
    ),
    "train alone": (lambda base: tree(base, {"train": 2}), "holds train/ with folders in it, and that is no class"),
    "other names": (
        lambda base: tree(base, {"Train": 2, "Testing": 2}), "holds Testing/, Train/ with folders in it, and",
    ),
    "two validation sets": (
        lambda base: tree(base, {"train": 2, "val": 1, "valid": 1}), "holds val/ and valid/: keep one of them",
    ),
    "an empty class": (
        lambda base: (tree(base, {"": 2}), (base / "eel").mkdir()), "eel holds no photo: fill the class",
    ),
    "a class without photos": (
        lambda base: (tree(base, {"": 2}), (base / "eel").mkdir(), (base / "eel" / "a.txt").touch()),
        "eel holds no photo",
    ),
    "a class more in test": (
        lambda base: (tree(base, {"train": 2, "test": 1}), write(base / "test" / "eel" / "1.png")),
        "train/ and test/ hold different classes, for instance 'eel'",
    ),
    "a class less in val": (
        lambda base: (tree(base, {"train": 2, "val": 2, "test": 1}), write(base / "train" / "eel" / "1.png")),
        "train/ and val/ hold different classes, for instance 'eel'",
    ),
    "a photo without class": (
        lambda base: (tree(base, {"train": 2, "test": 1}), write(base / "train" / "1.png")),
        "train/1.png lies beside the class folders",
    ),
    "a link to nothing": (
        lambda base: (tree(base, {"": 2}), (base / "cat" / "x.png").symlink_to("nowhere")),
        "x.png is a link that leads nowhere: remove it",
    ),
    "a class that is a link to nothing": (
        lambda base: (tree(base, {"": 2}), (base / "eel").symlink_to("nowhere")), "eel is a link that leads nowhere",
    ),
    "a link to what it lies in": (
        lambda base: (tree(base, {"": 2}), (base / "cat" / "all").symlink_to(base)),
        "cat/all is a link to a folder that it lies in: remove it",
    ),
    "a link to itself": (
        lambda base: (tree(base, {"": 2}), (base / "cat" / "x").mkdir(), (base / "cat/x/up").symlink_to("..")),
        "cat/x/up is a link to a folder that it lies in",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_wrong_layout_is_one_line(name, tmp_path):
    make, said = LAYOUTS[name]
    (tmp_path / "photos").mkdir()
    make(tmp_path / "photos")
    dataset = DatasetConfig(name="folder", root=str(tmp_path / "photos"), num_classes=None)
    assert said in refused(dataset)
    assert fingerprint_of(dataset, tmp_path / "outputs") == ""


def test_other_numbers_and_channels_are_refused(tmp_path):
    dataset = tree(tmp_path, {"": 4})
    assert "holds 2 classes, but dataset.num_classes=3" in refused(dataclasses.replace(dataset, num_classes=3))
    assert "in colour (3) or in grey (1)" in refused(dataclasses.replace(dataset, channels=4))
    assert "dataset.image_size=None: a whole number" in refused(dataclasses.replace(dataset, image_size=None))
    with pytest.raises(UserError, match=r"dataset\.test draws no test photo of 8"):
        build(dataclasses.replace(dataset, test=0.01), TRAINING, seed=1)


def test_what_lies_about_is_left_alone(tmp_path):
    tree(tmp_path, {"train": 3, "test": 1})
    train = tmp_path / "train"
    for name in (".DS_Store", "labels.csv", "cat/._0.png", "cat/notes.txt", ".ipynb_checkpoints/0.png", "cat/.t/0.png"):
        (train / name).parent.mkdir(exist_ok=True)
        (train / name).write_bytes(b"nothing that could be read")
    (tmp_path / "raw").mkdir()
    data = build(tree(tmp_path, {}), TRAINING, seed=1)
    assert data.train.count + data.validation.count == 6 and data.num_classes == 2


def test_nested_folders_links_and_odd_names(tmp_path):
    odd = "k\N{LATIN SMALL LETTER A WITH DIAERESIS}tzchen \N{CJK UNIFIED IDEOGRAPH-732B}"
    raw = os.fsdecode(b"\xff")
    tree(tmp_path / "real", {"train": 2, "test": 1}, (odd, "dog"))
    cat = tmp_path / "real" / "train" / odd
    write(cat / "deep" / "er" / "a\nb.PNG", seed=50)
    Image.fromarray(noise(51)).save(cat / f"{raw}.png")
    write(tmp_path / "pool" / "1.png", seed=52)
    (cat / "linked").symlink_to(tmp_path / "pool")
    (cat / "again").symlink_to(tmp_path / "pool")  # the same photos: once
    (cat / "one.png").symlink_to(tmp_path / "pool" / "1.png")  # and so is a link to one of them
    (tmp_path / "root").symlink_to(tmp_path / "real")
    dataset = dataclasses.replace(tree(tmp_path / "real", {}), root=str(tmp_path / "root"))
    data = build(dataset, TRAINING, seed=1)
    assert data.train.count + data.validation.count == 7
    look_again()
    first = fingerprint_of(dataset, tmp_path / "outputs")
    assert first
    corrupt(cat / f"{raw}.png")
    corrupt(cat / "deep" / "er" / "a\nb.PNG")
    look_again()
    assert fingerprint_of(dataset, tmp_path / "outputs") not in ("", first)
    with pytest.raises(UserError) as caught:
        build(dataset, TRAINING, seed=1)
    assert str(caught.value).isprintable(), "one line, whatever the file is called"


@pytest.mark.parametrize("classes", [2, 1000])
def test_two_classes_and_a_thousand_are_counted(classes, tmp_path):
    names = [f"n{number:04}" for number in range(classes)]
    one = write(tmp_path / "one.png", noise(1, 8, 8))
    two = write(tmp_path / "two.png", noise(2, 8, 8))
    for name in names:
        for part, source in (("train", one), ("train/", two), ("test", one)):
            place = tmp_path / "photos" / part / name / f"{len(part)}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            os.link(source, place)
    dataset = DatasetConfig(name="folder", root=str(tmp_path / "photos"), num_classes=None, image_size=8)
    assert filled(dataset).num_classes == classes
    data = build(dataclasses.replace(dataset, validation=0.5), TRAINING, seed=1)
    assert data.num_classes == classes and int(data.test.labels.max()) == classes - 1
    (tmp_path / "photos" / "train" / "other").mkdir()
    assert filled(dataset).num_classes == classes + 1, "it is looked at again"


def test_a_batch_larger_than_the_set_is_the_set_and_one_validation_image_is_enough(tmp_path):
    data = build(dataclasses.replace(tree(tmp_path, {"": 4}), validation=0.01), TrainingConfig(batch_size=500), seed=1)
    assert [len(labels) for _, labels in data.train] == [5]
    assert [len(labels) for _, labels in data.validation] == [1]
