"""Whole runs on images of one's own: photos in folders, arrays in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparse_lab.config import Config
from sparse_lab.data import folder
from sparse_lab.errors import UserError
from sparse_lab.experiment.identity import run_dir
from sparse_lab.experiment.runner import run
from sparse_lab.experiment.validate import check_request
from sparse_lab.export.load_run import finished, images
from sparse_lab.report.load.records import read
from sparse_lab.report.tables.data_used import partial

WHOLE = ("dataset.train_limit=null", "dataset.eval_limit=null", "training.batch_size=8", "training.finetune.epochs=1",
         "training.select_on_few=true")  # fmt: skip


@pytest.fixture
def on(compose: Callable[..., Config]) -> Callable[..., Config]:
    return lambda *words: compose(*WHOLE, *words)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Dark cats and bright dogs, 12 of each, one of them cut."""
    drawn = np.random.default_rng(0)
    for name, mean in (("cat", 90), ("dog", 160)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(12):
            pixels = drawn.normal(mean, 30, (40, 50, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number:02}.jpg")
    cut = tmp_path / "photos" / "dog" / "11.jpg"
    cut.write_bytes(cut.read_bytes()[:400])
    return tmp_path / "photos"


def test_photos(on, photos, tmp_path, quiet):
    words = (
        "dataset=folder",
        f"paths.data={photos}",
        f"paths.outputs={tmp_path / 'out'}",
        "dataset.image_size=[32,40]",
    )
    with pytest.raises(
        UserError, match=r"dog/11\.jpg cannot be read as an image \(.*\): replace or delete it, or leave out"
    ):
        run(on(*words, "method=dense"), "x", quiet)
    words = (*words, "dataset.skip_corrupt=true")
    config = on(*words, "method=oneshot", "sparsity=s90")
    result = run(config, "x", quiet)
    assert result["config"]["dataset"]["num_classes"] == 2 and result["config"]["dataset"]["image_size"] == [32, 40]
    assert result["data"]["skipped"] == 1 and result["data"]["skipped_files"] == ["dog/11.jpg"]
    assert result["data"]["fingerprint"] and result["images"]["test"] == {"used": 4, "whole": 4}
    assert len(result["normalise"]["mean"]) == 3 and result["normalise"]["scale"] == 255
    assert run_dir(config).name != run_dir(on(*words[:-1], "method=oneshot", "sparsity=s90")).name
    oneshot = [one for one in read(tmp_path).results if one.result["method"] == "oneshot"]
    assert [partial(one) for one in oneshot] == [["left out 1 file(s) that cannot be read"]]


def test_arrays_of_floats(on, tmp_path, quiet):
    drawn = np.random.default_rng(0)
    labels = np.arange(40) % 2
    np.savez(tmp_path / "a.npz", X=drawn.normal(labels[:, None, None, None], 1, (40, 32, 48, 5)), y=labels)
    words = ("dataset=arrays", f"dataset.file={tmp_path / 'a.npz'}")
    config = on(*words, "method=static", "sparsity=s90", "sparsity.connected_init=true", "dataset.channels=5")
    result = run(config, "x", quiet)
    assert result["normalise"]["scale"] == 1 and np.allclose(result["normalise"]["mean"], 0.5, atol=0.05)
    assert result["layers"][0]["total"] % (5 * 9) == 0, "the first convolution reads five channels"
    exported = finished(run_dir(config).path)
    assert exported.normalise == result["normalise"] and exported.shape == (5, 32, 48)
    found, said = images(exported, 4)
    assert said == "test images of arrays" and found.shape == (4, 5, 32, 48) and abs(found.mean()) < 0.5


@pytest.mark.parametrize("fits", [True, False])
def test_photos_go_on_bit_for_bit_with_more_or_less_memory(
    fits: bool,
    on: Callable[..., Config],
    photos: Path,
    tmp_path: Path,
    quiet,
    plug: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
):
    """Stopped where they fit into memory, gone on with where they do not, and the other way round."""

    def asked(outputs: str) -> Config:
        return on("dataset=folder", f"paths.data={photos}", f"paths.outputs={tmp_path / outputs}", "method=dense",
                        "dataset.skip_corrupt=true")  # fmt: skip

    def room(fits: bool) -> None:
        folder._last.clear()
        monkeypatch.setattr(folder, "available_memory", lambda: 10**9 if fits else 1000)

    room(True)
    whole = run(asked("whole"), "x", quiet)
    room(fits)
    plug(1)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run(asked("stopped"), "x", quiet)
    plug(0)
    room(not fits)
    again = run(asked("stopped"), "x", quiet)
    assert again["name"] == whole["name"] and again["levels"][0]["test_accuracy"] == whole["levels"][0]["test_accuracy"]
    one, other = (run_dir(asked(outputs)).path / "metrics.csv" for outputs in ("whole", "stopped"))
    drop = ("seconds", "images_per_second", "peak")
    for row, there in zip(one.read_text().splitlines(), other.read_text().splitlines(), strict=True):
        names = one.read_text().splitlines()[0].split(",")
        for name, value, theirs in zip(names, row.split(","), there.split(","), strict=True):
            assert value == theirs or any(word in name for word in drop), name
    assert json.loads((run_dir(asked("stopped")).path / "result.json").read_text())["kept"] == whole["kept"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("model=resnet34", "dataset.image_size=8", "training.batch_size=1"), "one image a step, and its BatchNorm"),
        (("model=resnet34", "dataset.image_size=8", "dataset.train_limit=1"), "one image a step, and its BatchNorm"),
        (("model=vgg16", "dataset.image_size=32", "training.batch_size=1", "dataset.train_limit=3"), None),
        (("model=vgg16", "dataset.image_size=32", "dataset.train_limit=9", "training.batch_size=4"), None),
    ],
)
def test_a_step_of_one_image_is_refused_where_a_map_has_one_pixel(words, said, compose, quiet):
    config = compose("method=dense", "training.epochs=1", *words)
    if said is None:
        check_request(config)
        assert run(config, "x", quiet)["kept"]
        return
    with pytest.raises(UserError, match=said):
        check_request(config)


def test_a_file_with_one_training_image_is_refused_before_it_trains(on, tmp_path, quiet):
    values = np.random.default_rng(0).integers(0, 256, (6, 8, 8), np.uint8)
    np.savez(tmp_path / "a.npz", images=values[:1], labels=[0], val_images=values[1:4], val_labels=[0, 1, 0],
             test_images=values[4:], test_labels=[0, 1])  # fmt: skip
    config = on("dataset=arrays", f"dataset.file={tmp_path / 'a.npz'}", "model=resnet34", "dataset.num_classes=2",
                "method=dense")  # fmt: skip
    with pytest.raises(UserError, match="one image a step, and its BatchNorm over maps of one pixel needs two"):
        run(config, "x", quiet)
