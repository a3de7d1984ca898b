"""What is null is counted, any shape and number of channels comes out as it is asked for, and keys are read when they
are.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_lab.config import AugmentConfig, Config, DatasetConfig, TrainingConfig
from sparse_lab.data import build
from sparse_lab.data.augment import crop
from sparse_lab.data.facts import filled
from sparse_lab.errors import UserError
from sparse_lab.experiment.settings_read import unread, without_effect

GREY = {"mean": [0.5], "std": [0.25]}


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [32, [24, 40]])
@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_made_images_of_any_shape(name, size, channels):
    dataset = DatasetConfig(name=name, image_size=size, channels=channels, train_limit=64, **GREY)
    data = build(dataset, TrainingConfig(batch_size=16), seed=1)
    images, _ = next(iter(data.train))
    assert images.shape == (16, channels, *dataset.size) and data.shape == (channels, *dataset.size)
    assert (data.mean, data.std) == ([0.5] * channels, [0.25] * channels), "one number is that of every channel"


@pytest.mark.parametrize("given", [{"mean": [0.1, 0.2], "std": None}, {"mean": [0.1, 0.2, 0.3], "std": [1.0, 0.0, 2.0]},
                                   {"mean": [0.1, 0.2], "std": [1.0]}, {"mean": None, "std": [0.5]}])  # fmt: skip
def test_mean_and_std_are_a_number_a_channel(given):
    with pytest.raises(
        UserError, match=r"dataset\.(mean|std)=.*: 3 number\(s\), one a channel, std above 0; dataset.mean"
    ):
        build(DatasetConfig(name="synthetic", train_limit=64, **given), TrainingConfig(batch_size=16), seed=1)


@pytest.mark.parametrize("mode", ["zero", "reflect"])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_windows_of_images_that_are_no_squares(mode, kind):
    """Against numpy's padding, slice by slice; floats keep their values."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (25, 2, 5, 9))).to(kind)
    offsets = torch.stack([torch.arange(25) // 5, torch.arange(25) % 5])
    mirrored = torch.arange(25) % 3 == 0
    found = crop(images, 2, mode, offsets, mirrored)
    how = {"mode": "constant"} if mode == "zero" else {"mode": "reflect"}
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), **how)  # type: ignore[call-overload]
    for index, (row, column) in enumerate(offsets.T.tolist()):
        window = padded[index, :, row : row + 5, column : column + 9]
        wanted = window[..., ::-1] if mirrored[index] else window
        assert (found[index].numpy() == wanted).all()


def test_what_counts_is_counted_and_what_is_given_stays():
    assert filled(DatasetConfig(name="digits", image_size=[32, 32])).image_size == 32
    for wrong in ({"num_classes": None}, {"channels": None}, {"image_size": None}, {"image_size": [1, 2, 3]},
                  {"image_size": 2.5}, {"image_size": [True, 4]}):  # fmt: skip
        with pytest.raises(UserError, match=r"dataset\.(num_classes|channels|image_size)="):
            filled(dataclasses.replace(DatasetConfig(name="digits"), **wrong))


def photos(base: Path, *parts: str) -> DatasetConfig:
    for number, place in enumerate(Path(part, name) for part in parts for name in ("a", "b")):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        (base / place).mkdir(parents=True)
        Image.fromarray(pixels).save(base / place / "1.png")
    return DatasetConfig(name="folder", root=str(base), num_classes=None, **GREY)


def arrays(path: Path, *parts: str) -> DatasetConfig:
    held = {f"{part}_{kind}": np.arange(8) % 2 if kind == "labels" else np.zeros((8, 8, 8), np.uint8)
            for part in parts for kind in ("images", "labels")}  # fmt: skip
    np.savez(path, **held)
    return DatasetConfig(name="arrays", file=str(path), num_classes=None, image_size=None, channels=None)


def read(dataset: DatasetConfig) -> set[str]:
    keys = {"file", "test", "validation", "skip_corrupt", "workers", "root", "verify"}
    config = Config(dataset=filled(dataset))
    dead = without_effect(config).keys()
    assert {key for key in dead if key.startswith("dataset.")} <= {*unread(config), "dataset.mirror"}
    return {key for key in keys if f"dataset.{key}" not in dead}


def test_keys_are_read_by_the_data_sets_that_have_a_use_for_them(tmp_path):
    folder = {"skip_corrupt", "workers", "root"}
    assert read(photos(tmp_path / "1", "train", "test")) == folder | {"validation"}
    assert read(photos(tmp_path / "2", "train", "val", "test")) == folder
    assert read(photos(tmp_path / "3", "")) == folder | {"validation", "test"}
    assert read(arrays(tmp_path / "a.npz", "train")) == {"file", "validation", "test"}
    assert read(arrays(tmp_path / "b.npz", "train", "val", "test")) == {"file"}
    assert read(dataclasses.replace(DatasetConfig(name="synthetic"), **GREY)) == {"validation"}
    assert read(dataclasses.replace(DatasetConfig(name="cifar10"), **GREY)) == {"validation", "root", "verify"}
    gone = DatasetConfig(name="arrays", file="gone.npz", image_size=8)
    assert read(gone) == {"file", "root", "validation", "test"}, "nothing is known of it"


def test_imagenets_classes_are_counted_too_and_grey_is_read(tmp_path):
    photos(tmp_path, "train", "val")
    for name in ("a", "b"):
        Image.fromarray(np.random.default_rng(9).integers(0, 256, (8, 8, 3), np.uint8)).save(
            tmp_path / "train" / name / "2.png"
        )
    dataset = DatasetConfig(name="imagenet", root=str(tmp_path), num_classes=None, image_size=[8, 12], channels=1,
                            workers=0)  # fmt: skip
    data = build(dataset, TrainingConfig(batch_size=2, augment=AugmentConfig()), seed=1)
    assert data.num_classes == 2 and next(iter(data.train))[0].shape == (2, 1, 8, 12)
    assert len(data.mean) == len(data.std) == 1 and 0 < data.std[0] < 1


def test_facts_are_found_without_torch(tmp_path):
    photos(tmp_path / "photos", "train", "test")
    arrays(tmp_path / "a.npz", "train")
    code = f"""
import sys
from sparse_lab.config import DatasetConfig
from sparse_lab.data.facts import filled
folder = DatasetConfig(name="folder", root={str(tmp_path / "photos")!r}, num_classes=None)
arrays = DatasetConfig(name="arrays", file={str(tmp_path / "a.npz")!r}, image_size=None, channels=None)
assert filled(folder).num_classes == 2
assert "numpy" not in sys.modules
assert filled(arrays).shape == (1, 8, 8)
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
