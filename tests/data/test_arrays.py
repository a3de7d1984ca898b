"""Images and labels in .npz files made here: read as they are, or refused in one line; figures against numpy."""

from __future__ import annotations

import dataclasses
import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparse_lab.config import AugmentConfig, DatasetConfig, TrainingConfig
from sparse_lab.data import build, check, fingerprint_of, look_again
from sparse_lab.data.facts import filled, own_parts
from sparse_lab.errors import UserError

RNG = np.random.default_rng(0)
TRAINING = TrainingConfig(batch_size=8)


def images(*shape: int, kind: Any = np.uint8) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8).astype(kind)


def labels(count: int, classes: int = 4) -> np.ndarray:
    return np.arange(count) % classes


def save(path: Path, **arrays: np.ndarray) -> DatasetConfig:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    return of(path)


def of(path: Path) -> DatasetConfig:
    return DatasetConfig(name="arrays", file=str(path), num_classes=None, image_size=None, channels=None)


def raw(loader: Any, scale: int = 255) -> np.ndarray:
    """What the loader's images were before they were normalised."""
    mean, std = (np.array(one)[:, None, None] for one in (loader.mean, loader.std))
    return np.concatenate([batch.numpy() for batch, _ in loader]) * std * scale + mean * scale


SPELLINGS = [
    ("images", "labels", "val_images", "val_labels", "test_images", "test_labels"),
    ("train_images", "train_labels", "val_images", "val_labels", "test_images", "test_labels"),
    ("x_train", "y_train", "x_val", "y_val", "x_test", "y_test"),
    ("X_train", "y_train", "X_val", "y_val", "X_test", "y_test"),
    ("X", "y"),
    ("x", "y"),
]


@pytest.mark.parametrize("keys", [keys[:count] for keys in SPELLINGS for count in (2, 4, 6) if count <= len(keys)])
def test_every_spelling_and_every_part(keys, tmp_path):
    counts = (40, 12, 20)
    arrays = {}
    for place, count in zip(range(0, len(keys), 2), counts, strict=False):
        arrays |= {keys[place]: images(count, 8, 8), keys[place + 1]: labels(count)}
    dataset = save(tmp_path / "a.npz", **arrays)
    data = build(dataclasses.replace(dataset, validation=0.25, test=0.2), TRAINING, seed=1)
    assert (data.num_classes, data.shape, data.scale) == (4, (1, 8, 8), 255)
    test = arrays[keys[4]] if len(keys) == 6 else None
    assert data.test.count == (20 if test is not None else 8)
    assert data.validation.count == (12 if len(keys) >= 4 else round(0.25 * 32))
    assert data.train.count == 40 - (0 if test is not None else 8) - (0 if len(keys) >= 4 else 8)
    if test is not None:
        assert np.abs(raw(data.test)[:, 0] - test).max() < 1e-3
    assert own_parts(dataset) == {"validation", "test"} & {*(["validation"] if len(keys) >= 4 else []),
                                                          *(["test"] if len(keys) == 6 else [])}  # fmt: skip


LAYOUTS = [
    ((9, 28, 28), {}, (1, 28, 28), "HW"),
    ((9, 8, 12), {}, (1, 8, 12), "HW"),
    ((9, 1, 28, 28), {}, (1, 28, 28), "CHW"),
    ((9, 28, 28, 1), {}, (1, 28, 28), "HWC"),
    ((9, 3, 8, 12), {}, (3, 8, 12), "CHW"),
    ((9, 8, 12, 3), {}, (3, 8, 12), "HWC"),
    ((9, 2, 8, 8), {}, (2, 8, 8), "CHW"),
    ((9, 13, 16, 16), {}, (13, 16, 16), "CHW"),
    ((9, 16, 16, 13), {}, (13, 16, 16), "HWC"),
    ((9, 12, 10, 13), {"channels": 13}, (13, 12, 10), "HWC"),
    ((9, 13, 12, 10), {"channels": 13}, (13, 12, 10), "CHW"),
    ((9, 13, 12, 10), {"image_size": [12, 10]}, (13, 12, 10), "CHW"),
    ((9, 3, 32, 3), {"image_size": [32, 3]}, (3, 32, 3), "CHW"),
]


@pytest.mark.parametrize(("shape", "said", "wanted", "order"), LAYOUTS)
def test_every_layout_that_can_be_told(shape, said, wanted, order, tmp_path):
    whole, test = images(*shape), images(*shape)
    dataset = save(tmp_path / "a.npz", images=whole, labels=labels(9, 2), test_images=test, test_labels=labels(9, 2))
    dataset = dataclasses.replace(dataset, **said)
    assert filled(dataset).shape == wanted
    data = build(dataset, TRAINING, seed=1)
    expected = {"HW": lambda: test[:, None], "CHW": lambda: test, "HWC": lambda: np.moveaxis(test, 3, 1)}[order]()
    assert data.shape == wanted and np.abs(raw(data.test) - expected).max() < 1e-3


@pytest.mark.parametrize("shape", [(9, 24, 40, 13), (9, 3, 32, 3), (9, 2, 5, 4)])
def test_a_layout_that_cannot_be_told_is_refused(shape, tmp_path):
    dataset = save(tmp_path / "a.npz", images=images(*shape), labels=labels(9, 2))
    with pytest.raises(UserError, match=r"could be \[N, C, H, W\] or \[N, H, W, C\]: give dataset.channels or"):
        filled(dataset)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, ">f4", np.int16, np.uint16])
def test_other_numbers_stay_as_they_are(kind, tmp_path):
    values = (RNG.normal(300, 50, (40, 8, 8, 5))).astype(kind)
    dataset = save(tmp_path / "a.npz", X=np.asfortranarray(values), y=labels(40))
    data = build(dataset, TRAINING, seed=1)
    assert data.scale == 1 and data.train.images.dtype == torch.float32  # type: ignore[attr-defined]
    used = data.train.images.numpy().astype(np.float64)  # type: ignore[attr-defined]
    assert np.allclose(data.mean, used.mean((0, 2, 3)), rtol=1e-12)
    assert np.allclose(data.std, used.std((0, 2, 3)), rtol=1e-9)
    there = {image.tobytes() for image in np.moveaxis(values, 3, 1).astype(np.float32)}
    assert {np.ascontiguousarray(image).tobytes() for image in used.astype(np.float32)} <= there
    out = np.concatenate([batch.numpy() for batch, _ in build(
        dataset, TrainingConfig(batch_size=8, augment=AugmentConfig(crop_padding=0)), seed=1).train])  # fmt: skip
    assert np.abs(out.mean((0, 2, 3))).max() < 0.2 and np.abs(out.std((0, 2, 3)) - 1).max() < 0.1


def test_mean_and_std_are_numpys_of_the_training_images_alone(tmp_path):
    """In parts, with a large mean, and with a channel that does not vary."""
    whole = images(3000, 3, 8, 8)
    whole[:, 1] = whole[:, 1] // 50 + 200
    whole[:, 2] = 7
    data = build(save(tmp_path / "a.npz", X=whole, y=labels(3000)), TRAINING, seed=1)
    used = data.train.images.numpy() / 255.0  # type: ignore[attr-defined]
    assert len(used) == data.train.count == 2160
    assert np.allclose(data.mean, used.mean((0, 2, 3)), rtol=1e-12)
    assert np.allclose(data.std[:2], used.std((0, 2, 3))[:2], rtol=1e-12) and data.std[2] == 1.0


def test_statistics_in_parts_are_those_of_the_whole(monkeypatch):
    from sparse_lab.data import source

    monkeypatch.setattr(source, "LOOKED_AT", 1000)
    values = torch.from_numpy(RNG.normal(1e4, 1e-2, (50, 2, 8, 8)).astype(np.float32))
    zeros = torch.zeros(50, dtype=torch.int64)
    found = source.ImageSet(values, zeros, values, zeros, {}, True)
    mean, std = found.statistics(torch.arange(50), DatasetConfig(name="arrays"))
    exact = values.numpy().astype(np.float64)
    assert np.allclose(mean, exact.mean((0, 2, 3)), rtol=1e-14) and np.allclose(std, exact.std((0, 2, 3)), rtol=1e-8)


def test_zero_padding_of_floats_is_the_value_zero(tmp_path):
    values = np.full((40, 1, 6, 6), 5.0, dtype=np.float32)
    values[:, :, 2:4, 2:4] = RNG.normal(9, 1, (40, 1, 2, 2))
    dataset = dataclasses.replace(save(tmp_path / "a.npz", X=values, y=labels(40)), mean=[2.0], std=[4.0])
    out = torch.cat([batch for batch, _ in build(dataset, TRAINING, seed=1).train]) * 4 + 2
    assert {0.0, 5.0} <= set(out.round(decimals=4).flatten().tolist()) and out.min() == 0.0


LABELS: dict[str, tuple[np.ndarray, str | None]] = {
    "int8": (labels(40).astype(np.int8), None),
    "uint64": (labels(40).astype(np.uint64), None),
    "a column": (labels(40)[:, None], None),
    "two classes": (labels(40, 2), None),
    "one-hot": (np.eye(4, dtype=np.float32)[labels(40)], r"one label an image.*labels.argmax\(1\)"),
    "floats": (labels(40).astype(np.float32), r"whole numbers; as in labels.astype\('int64'\)"),
    "text": (labels(40).astype(str), "whole numbers"),
    "truth": (labels(40) > 1, "whole numbers"),
    "from one": (labels(40) + 1, r"goes from 1 to 4: labels begin at 0; save labels - 1, or"),
    "from two": (labels(40) + 2, "goes from 2 to 5: labels are 0 to"),
    "negative": (labels(40) - 1, "goes from -1 to 2: labels are 0 to"),
    "gaps": (labels(40) * 2, r"goes from 0 to 6, but no training image has 1: .*dataset.num_classes=7"),
    "one class": (labels(40, 1), "all images are of one class"),
    "too few": (labels(39), "40 images need as many labels"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels(name, tmp_path):
    given, said = LABELS[name]
    dataset = save(tmp_path / "a.npz", X=images(40, 8, 8), y=given)
    if said is None:
        data = build(dataset, TRAINING, seed=1)
        assert data.num_classes == int(given.max()) + 1 and data.test.labels.dtype == torch.int64
        return
    with pytest.raises(UserError, match=said) as caught:
        filled(dataset)
    assert "\n" not in str(caught.value)


def test_a_number_of_classes_that_is_given_may_have_gaps_and_none_beyond(tmp_path):
    dataset = save(tmp_path / "a.npz", X=images(40, 8, 8), y=labels(40) * 2)
    assert build(dataclasses.replace(dataset, num_classes=9), TRAINING, seed=1).num_classes == 9
    with pytest.raises(UserError, match=r"y goes from 0 to 6, but dataset.num_classes=6 allows 0 to 5"):
        build(dataclasses.replace(dataset, num_classes=6), TRAINING, seed=1)
    beyond = save(tmp_path / "b.npz", x_train=images(40, 8, 8), y_train=labels(40), x_test=images(4, 8, 8),
                  y_test=labels(4) + 1)  # fmt: skip
    with pytest.raises(UserError, match=r"y_test goes from 1 to 4, but dataset.num_classes=4"):
        build(beyond, TRAINING, seed=1)


def of_bytes(path: Path, content: bytes) -> DatasetConfig:
    path.write_bytes(content)
    return of(path)


def truncated(path: Path) -> DatasetConfig:
    save(path, X=images(40, 8, 8), y=labels(40))
    return of_bytes(path, path.read_bytes()[:2000])


def lying(path: Path) -> DatasetConfig:
    """An array whose header promises more than there is."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 8, 8)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("X.npy", file.getvalue())
    return of(path)


def flipped(path: Path) -> DatasetConfig:
    """A bit of the compressed images is wrong; headers and labels are whole."""
    save(path, X=images(4000, 8, 8), y=labels(4000))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    return of_bytes(path, bytes(content))


REFUSED: dict[str, tuple[Callable[[Path], DatasetConfig], str]] = {
    "no file given": (lambda path: dataclasses.replace(of(path), file=None), "say which .npz file, as in dataset"),
    "no file": (of, "is neither in data .paths.data. nor here"),
    "no npz": (lambda path: of_bytes(path, b"images"), "is no .npz file, or a damaged one"),
    "an npy": (
        lambda path: (np.save(path.with_suffix(".npy"), images(4, 8, 8)), of(path.with_suffix(".npy")))[1],
        "is no .npz file, or a damaged one",
    ),
    "another zip": (
        lambda path: (zipfile.ZipFile(path, "w").writestr("images.txt", "x"), of(path))[1], "is no .npz file, or",
    ),
    "truncated": (truncated, "is no .npz file, or a damaged one"),
    "a header that lies": (lying, "X.npy: it is not as long as its header says"),
    "flipped": (flipped, "X cannot be read"),
    "other keys": (
        lambda path: save(path, data=images(4, 8, 8), target=labels(4)), "holds data, target: its arrays are to be",
    ),
    "more than that": (
        lambda path: save(path, X=images(4, 8, 8), y=labels(4), ids=labels(4)), "holds X, ids, y: .* nothing else",
    ),
    "no labels": (lambda path: save(path, images=images(4, 8, 8)), "holds images: its arrays are"),
    "a test set without labels": (
        lambda path: save(path, images=images(4, 8, 8), labels=labels(4), test_images=images(4, 8, 8)),
        "holds images, labels, test_images: its arrays",
    ),
    "vectors": (lambda path: save(path, X=images(4, 64), y=labels(4)), r"X is uint8 \[4, 64\]: images are \[N, H, W\]"),
    "no images": (lambda path: save(path, X=images(0, 8, 8), y=labels(0)), r"X is uint8 \[0, 8, 8\]: images are"),
    "int64": (
        lambda path: save(path, X=images(4, 8, 8, kind=np.int64), y=labels(4)), r"X is int64 .*astype\('float32'\)",
    ),
    "truth": (lambda path: save(path, X=images(4, 8, 8) > 9, y=labels(4)), "X is bool"),
    "parts that differ": (
        lambda path: save(path, images=images(9, 8, 8), labels=labels(9), test_images=images(9, 9, 9),
                          test_labels=labels(9)),
        r"test_images is uint8 \[9, 9, 9\] and images uint8 \[9, 8, 8\]: save them alike",
    ),
    "another size": (
        lambda path: dataclasses.replace(save(path, X=images(9, 8, 8), y=labels(9)), image_size=32),
        r"does not fit dataset.channels=null dataset.image_size=\[32, 32\]: null takes the file's own",
    ),
    "no number": (
        lambda path: save(path, X=np.where(images(40, 8, 8) > 250, np.nan, 1.0), y=labels(40)),
        r"X\[\d\] .and \d+ more. holds values that are no float32 numbers",
    ),
    "too large for float32": (
        lambda path: save(path, X=images(40, 8, 8, kind=np.float64) * 1e37, y=labels(40)),
        r"X\[0\] .*no float32 numbers",
    ),
    "nothing to test on": (
        lambda path: dataclasses.replace(save(path, X=images(8, 8, 8), y=labels(8)), test=0.01),
        r"dataset.test draws no test image of 8: raise it",
    ),
    "one image": (lambda path: save(path, images=images(1, 8, 8), labels=labels(1), test_images=images(4, 8, 8),
                                    test_labels=labels(4)), "all images are of one class"),
    "nothing to learn": (
        lambda path: save(path, X=images(1, 8, 8).repeat(40, 0), y=labels(40)), "are the same image, so nothing can",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_each_mistake_is_one_line(name, tmp_path):
    make, said = REFUSED[name]
    with pytest.raises(UserError, match=said) as caught:
        build(make(tmp_path / "a.npz"), TRAINING, seed=1)
    assert "\n" not in str(caught.value)


def test_a_relative_name_is_looked_for_in_the_data_folder_and_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = save(tmp_path / "data" / "a.npz", X=images(40, 8, 8), y=labels(40))
    for name in ("a.npz", "data/a.npz"):
        check(dataclasses.replace(there, file=name))
    shutil.copy(tmp_path / "data" / "a.npz", tmp_path / "a.npz")
    with pytest.raises(UserError, match=r"a\.npz is in data and here: give the whole path"):
        check(dataclasses.replace(there, file="a.npz"))
    (tmp_path / "a.npz").unlink()
    (tmp_path / "a.npz").symlink_to("data/a.npz")
    check(dataclasses.replace(there, file="a.npz"))


def test_the_fingerprint_is_of_the_content_whatever_the_file_is_called(tmp_path):
    look_again()
    one = save(tmp_path / "k\N{LATIN SMALL LETTER A WITH DIAERESIS}.npz", X=images(40, 8, 8), y=labels(40))
    other = save(tmp_path / "b.npz", X=images(40, 8, 8), y=labels(40))
    shutil.copy(str(one.file), tmp_path / "c.npz")
    first, second, third = (fingerprint_of(set_, tmp_path / "out") for set_ in (one, other, of(tmp_path / "c.npz")))
    assert first == third and "" != first != second != ""
    shutil.copy(str(other.file), tmp_path / "c.npz")
    look_again()
    assert fingerprint_of(of(tmp_path / "c.npz"), tmp_path / "out") == second
    assert fingerprint_of(of(tmp_path / "none.npz"), tmp_path / "out") == ""


def test_the_facts_are_looked_at_once_and_again_when_the_file_has_changed(tmp_path, monkeypatch):
    from sparse_lab.data import npz

    dataset = save(tmp_path / "a.npz", X=images(40, 8, 8), y=labels(40))
    assert filled(dataset).num_classes == 4
    read: list[str] = []
    real = npz.array
    monkeypatch.setattr(npz, "array", lambda path, key: read.append(key) or real(path, key))
    assert [filled(dataset).num_classes for _ in range(100)] == [4] * 100 and not read
    save(tmp_path / "a.npz", X=images(40, 9, 8), y=labels(40, 5))
    assert (filled(dataset).num_classes, filled(dataset).image_size) == (5, [9, 8]) and read == ["y"], (
        "no image is read"
    )
