"""`sparse-lab evaluate`: which images are shown to which network, what is said and what is written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, log_loss, recall_score

from sparse_lab import models
from sparse_lab.cli.main import main
from sparse_lab.export import latency
from sparse_lab.training.checkpoint_io import load_network


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "ROUNDS", 2)


@pytest.fixture
def evaluated(tmp_path, capsys):
    """evaluated(RUN_OR_FILE, words...) -> its record, which is printed and written alike."""

    def ask(subject: Path, *words: str) -> dict[str, Any]:
        out = tmp_path / f"seen{len(list(tmp_path.iterdir()))}"
        capsys.readouterr()
        assert main(["evaluate", str(subject), *words, "--json", "--out", str(out)]) == 0
        printed = json.loads(capsys.readouterr().out)
        (path,) = out.glob("*.json")
        written = json.loads(path.read_text())
        del written["checksum"]
        assert written == printed and path.with_suffix(".png").is_file() and len(list(out.iterdir())) == 2
        return printed

    return ask


@pytest.fixture
def refused(capsys):
    """refused(RUN_OR_FILE, words...) -> the one line that says why."""

    def ask(subject: Path | str, *words: str) -> str:
        capsys.readouterr()
        assert main(["evaluate", str(subject), *words]) == 2
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if not line.startswith(("folder: ", "arrays: "))]
        assert len(lines) == 1 and not said.out, said
        return lines[0].removeprefix("sparse-lab: ")

    return ask


def answers(run: Path, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Softmax and labels of all photos below a folder, by torch and PIL alone."""
    result = json.loads((run / "result.json").read_text())
    model = models.build("vgg16", num_classes=3, width=0.0625).eval()
    state = load_network(run / "checkpoints" / "best.ckpt")
    model.load_state_dict({name: value for name, value in state.items() if not name.endswith(".mask")})
    paths = sorted(folder.glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths]).transpose(0, 3, 1, 2)
    mean, std = (np.array(result["normalise"][key], dtype=np.float32)[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        logits = model(torch.from_numpy((pixels.astype(np.float32) / 255 - mean) / std))
    return logits.double().softmax(1).numpy(), np.array(
        [["ape", "bee", "cat"].index(path.parent.name) for path in paths]
    )


def test_a_runs_own_test_set_is_the_one_that_its_record_speaks_of(run, evaluated, capsys):
    result, found = json.loads((run / "result.json").read_text()), evaluated(run)
    assert found["top1"] == result["test_accuracy"] > 50
    assert (found["data"]["split"], found["data"]["trained_on_these_files"]) == ("test", True)
    assert found["images"] == sum(result["classes"]["test_images"]) == 18
    assert result["classes"]["names"] == ["ape", "bee", "cat"] == list(found["per_class"])
    classes = [one["accuracy"] for one in found["per_class"].values()]
    assert classes == result["levels"][-1]["class_accuracy"]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(classes), abs=1e-3)
    assert main(["evaluate", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"the run's record says {result['test_accuracy']:.2f}%" in out and "as its run split it" in out


def test_other_photos_are_normalised_as_the_networks_were_and_matched_by_name(run, photos, evaluated, tmp_path):
    """Against torch, PIL and scikit-learn: two of three classes, brighter than any photo it was trained on."""
    found = evaluated(run, "--data", str(photos(tmp_path / "other", ("cat", "bee"), 8, seed=4)))
    shares, labels = answers(run, tmp_path / "other")
    predicted = shares.argmax(1)
    assert found["data"]["classes_without_an_image"] == ["ape"] and found["data"]["classes_matched_by"] == "name"
    assert (found["images"], found["data"]["split"], found["data"]["trained_on_these_files"]) == (16, "all", False)
    recall = recall_score(labels, predicted, labels=[1, 2], average=None)
    assert [found["per_class"][name]["accuracy"] for name in ("bee", "cat")] == pytest.approx(100 * recall)
    assert found["per_class"]["ape"] == {"images": 0, "accuracy": None}
    assert found["balanced_accuracy"] == pytest.approx(100 * recall.mean())
    assert found["loss"] == pytest.approx(log_loss(labels, shares, labels=[0, 1, 2]), rel=1e-4)
    for true, row in zip(("ape", "bee", "cat"), confusion_matrix(labels, predicted, labels=[0, 1, 2]), strict=True):
        counts = {name: int(one) for name, one in zip(("ape", "bee", "cat"), row, strict=True) if one}
        assert found["confusion"].get(true, {}) == counts


def test_the_test_part_of_other_photos_is_shown_where_there_is_one(run, photos, evaluated, tmp_path):
    folder = photos(tmp_path / "other", ("ape", "bee", "cat"), 4, ("train", "test"))
    found = evaluated(run, "--data", str(folder))
    assert (found["images"], found["data"]["split"]) == (12, "test") and "the test set of other" in found["data"][
        "said"
    ]
    assert found["per_class"] == evaluated(run, "--data", str(folder / "test"))["per_class"]
    assert evaluated(run, "--data", str(folder), "--split", "train")["images"] == 11  # one of them validates


def test_the_runs_own_photos_by_another_way_keep_their_split(run, outputs, evaluated):
    own = evaluated(run)
    photos = str(outputs / "photos")
    for words in ([photos], [f"paths.data={photos}"], ["dataset=folder", f"paths.data={photos}"]):
        assert evaluated(run, "--data", *words) == own
    few = evaluated(run, "--data", "dataset.eval_limit=5")
    assert (few["data"]["used"], few["data"]["whole"], few["images"]) == (5, 18, 5)
    assert evaluated(run, "--split", "validation")["images"] == 7
    assert evaluated(run, "--split", "train")["images"] == 65


def test_odd_names_and_few_photos_are_no_matter(run, photos, evaluated, tmp_path):
    folder = photos(tmp_path / "a=b, 'c' ü", ("ape", "bee"), 2)
    assert evaluated(run, "--data", str(folder))["images"] == 4
    arrays = tmp_path / "x=1, 'y'.npz"
    np.savez(arrays, images=np.zeros((6, 32, 32, 3), np.uint8), labels=np.arange(6) % 3)
    found = evaluated(run, "--data", str(arrays))
    assert (found["images"], found["data"]["classes_matched_by"]) == (6, "number")


def test_a_runs_own_data_that_have_changed_are_shown_as_its_test_set_and_that_is_said(
    outputs, run, evaluated, tmp_path
):
    moved = tmp_path / "moved"
    shutil.copytree(outputs / "photos", moved)
    (moved / "ape" / "3.png").unlink()
    found = evaluated(run, "--data", f"paths.data={moved}")
    assert (found["data"]["split"], found["images"]) == ("test", 18) and not found["data"]["trained_on_these_files"]


@pytest.mark.full
def test_every_kind_of_file_answers_alike(run, outputs, evaluated, photos, tmp_path):
    pytest.importorskip("onnxruntime")
    there = tmp_path / "there"
    assert main(["export", str(run), "--out", str(there)]) == 0
    other = str(photos(tmp_path / "other", ("cat", "ape"), 6, seed=2))
    wanted, own = evaluated(run, "--data", other), evaluated(run)
    for suffix, by in ((".sparse", "sparse kernels"), (".onnx", "onnxruntime"), (".pt", "torch")):
        found = evaluated(there / f"network{suffix}", "--data", other)
        assert found["computed"]["by"] == by and found["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert found["confusion"] == wanted["confusion"] and found["network"]["name"] == run.name
        assert found["data"]["trained_on_these_files"] is None
        shutil.copy(there / f"network{suffix}", run)  # in its run's folder it has that one's test set
        assert evaluated(run / f"network{suffix}")["confusion"] == own["confusion"]
    for name in ("best.ckpt", "last.ckpt"):
        assert evaluated(run / "checkpoints" / name)["confusion"] == own["confusion"]


def test_a_run_that_is_not_finished_is_evaluated_by_its_last_checkpoint(outputs, run, evaluated, refused, tmp_path):
    own = evaluated(run)
    half = tmp_path / "runs" / run.name
    shutil.copytree(run, half, ignore=shutil.ignore_patterns("result.json", "best.ckpt", "evaluations"))
    assert "last checkpoint can be evaluated" in refused(half)
    found = evaluated(half / "checkpoints" / "last.ckpt")
    assert found["confusion"] == own["confusion"]
    assert found["normalise"]["mean"] == pytest.approx(own["normalise"]["mean"])  # computed anew
    (tmp_path / "other").mkdir()
    half.rename(tmp_path / "other" / "name")
    assert "no checkpoint of the run name" in refused(tmp_path / "other" / "name" / "checkpoints" / "last.ckpt")


def test_a_run_of_before_has_no_class_names_in_its_record(run, evaluated, seal, tmp_path):
    old = tmp_path / run.name
    shutil.copytree(run, old, ignore=shutil.ignore_patterns("evaluations"))
    result = json.loads((old / "result.json").read_text())
    del result["classes"]
    for level in result["levels"]:
        del level["class_accuracy"]
    seal(old / "result.json", result)
    assert evaluated(old)["per_class"] == evaluated(run)["per_class"]  # the photos still name them
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report")]) == 0


def test_the_same_request_has_the_same_files_and_says_so(run, capsys):
    folder = run / "evaluations"
    shutil.rmtree(folder, ignore_errors=True)
    assert main(["evaluate", str(run)]) == 0
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert len(before) == 2 and "wrote" in capsys.readouterr().out
    assert main(["evaluate", str(run)]) == 0
    assert "says the same already" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    (path,) = folder.glob("*.json")
    path.write_text(path.read_text().replace('"top1": ', '"top1": 1'))
    assert main(["evaluate", str(run)]) == 0
    assert "in place of a file that was damaged" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_what_cannot_be_shown_is_one_line(run, outputs, photos, refused, tmp_path):
    two = photos(tmp_path / "two", ("bee", "dog"), 2)
    assert "knows no class 'dog'" in refused(run, "--data", str(two))
    pixels, labels = np.zeros((6, 32, 32, 3), np.uint8), np.arange(6) % 3
    for name, images, numbers, said in (
        ("small", pixels[:, :28, :28], labels, "takes images of 3x32x32, and those of small.npz are 3x28x28"),
        ("float", pixels.astype(np.float32), labels, "taken as they are, the network was trained on bytes"),
        ("many", pixels, labels + 1, "allows 0 to 2"),
    ):
        np.savez(tmp_path / f"{name}.npz", images=images, labels=numbers)
        assert said in refused(run, "--data", str(tmp_path / f"{name}.npz"))
    assert "the network knows 3 classes, and digits has 10" in refused(run, "--data", "dataset=digits")
    assert "images of 3x32x32" in refused(run, "--data", "dataset.image_size=48")
    assert "stay split as they were" in refused(run, "--data", "dataset.test=0.5")
    assert "normalised as the network's" in refused(run, "--data", "dataset.mean=[0,0,0]")
    assert "words for data are" in refused(run, "--data", "dataset=folder", "method=dense")
    assert "unknown dataset 'nothing'" in refused(run, "--data", "dataset=nothing")
    assert "no folder of photos" in refused(run, "--data", str(tmp_path / "nowhere"))
    assert "give one path, or words" in refused(run, "--data", str(two), "dataset.eval_limit=3")
    assert "give it one value" in refused(run, "--data", "dataset.eval_limit=1,2")


@pytest.mark.parametrize("suffix", [".sparse", ".onnx", ".pt", ".ckpt"])
def test_what_is_no_network_is_one_line_at_once(suffix, refused, photos, tmp_path):
    path = tmp_path / f"one{suffix}"
    words = ["--data", str(photos(tmp_path / "photos", ("ape", "bee"), 1))]
    assert "No such file" in refused(path, *words)
    os.mkfifo(path)
    assert "a pipe, a device or a socket" in refused(path, *words)
    path.unlink()
    for content in (b"", b"no network", b"PK\x03\x04" + bytes(400), bytes(5000)):
        path.write_bytes(content)
        assert str(path) in refused(path, *words)
    assert "is no run's folder and no network" in refused(__file__, *words)
    assert "not a finished run" in refused(tmp_path, *words)


def test_a_file_whose_data_nobody_knows_asks_for_them(run, refused, tmp_path):
    assert main(["export", str(run), "--to", "packed", "--out", str(tmp_path)]) == 0
    assert "say which images it is shown" in refused(tmp_path / "network.sparse")
    assert "say of which data set" in refused(tmp_path / "network.sparse", "--data", f"paths.data={tmp_path}")


def test_where_it_cannot_be_written_is_said_before_anything_is_computed(run, refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "choose another folder with --out" in refused(run, "--out", str(tmp_path / "file" / "below"))
