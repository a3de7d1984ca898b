"""`sparse-lab export` on a run: files that load, agree, and are on record."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import sparse_lab
from sparse_lab import models
from sparse_lab.cli import export as command
from sparse_lab.cli.main import main
from sparse_lab.export import latency
from sparse_lab.records.atomic_io import damaged
from sparse_lab.training.checkpoint_io import load_network


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    request = ["method=oneshot", "sparsity=s90", "dataset=digits", "training=digits", "model.width=0.0625"]
    request += ["dataset.train_limit=128", "training.epochs=1", "training.finetune.epochs=1", f"paths.outputs={folder}"]
    assert main(request) == 0
    return next(path for path in (folder / "runs").iterdir() if "oneshot" in path.name)


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "ROUNDS", 2)


def test_all_formats_are_written_compared_timed_and_recorded(run, capsys) -> None:
    pytest.importorskip("onnxruntime")
    assert main(["export", str(run)]) == 0
    out = capsys.readouterr().out
    result = json.loads((run / "result.json").read_text())
    assert not damaged(result)
    found = result["export"]
    assert found["compared_on"] == "64 test images of digits" and found["compared_on"] in out
    for kind, name in (("packed", "network.sparse"), ("onnx", "network.onnx"), ("torch", "network.pt")):
        assert (run / name).stat().st_size == found["bytes"][kind]
        assert found["difference"][kind] <= 1e-5 and name in out
    assert found["macs"]["sparse"] < found["macs"]["dense"]
    assert set(found["latency_ms"]) == {"dense torch", "sparse", "onnxruntime"}
    assert all(times.keys() == {"1", "128"} and min(times.values()) > 0 for times in found["latency_ms"].values())


def test_what_is_loaded_computes_what_the_checkpoint_does(run, tmp_path) -> None:
    assert main(["export", str(run), "--to", "packed", "--out", str(tmp_path / "deep" / "net.sparse")]) == 0
    network = sparse_lab.load(tmp_path / "deep" / "net.sparse")
    state = load_network(run / "checkpoints" / "best.ckpt")
    model = models.build("vgg16", width=0.0625).eval().double()
    model.load_state_dict({name: value for name, value in state.items() if not name.endswith(".mask")})
    images = torch.randn(11, 3, 32, 32)
    with torch.no_grad():
        wanted = model(images.double())
    assert (network(images) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert network.about["normalise"].keys() == {"mean", "std", "scale"} and network.about["image_size"] == 32


def test_float16_is_smaller_and_says_how_far_off_it_is(run, tmp_path, capsys) -> None:
    sizes = []
    for values in ("fp32", "fp16"):
        file = tmp_path / f"{values}.sparse"
        assert main(["export", str(run), "--out", str(file), "--values", values]) == 0
        sizes.append(file.stat().st_size)
    assert sizes[1] < 0.75 * sizes[0]
    found = json.loads((run / "result.json").read_text())["export"]
    assert found["values"] == "fp16" and 1e-7 < found["difference"]["packed"] < 1e-2


def test_a_run_of_before_a_key_was_renamed_is_compared_on_its_own_images(run, tmp_path, capsys) -> None:
    config = run / "config.yaml"
    now = config.read_text()
    assert "drop_and_grow:" in now
    config.write_text(now.replace("drop_and_grow:", "rewire:").replace("init_from:", "starts_from:"))
    try:
        assert main(["export", str(run), "--to", "packed", "--out", str(tmp_path)]) == 0
    finally:
        config.write_text(now)
    assert "64 test images of digits" in capsys.readouterr().out


def test_without_the_data_random_images_are_compared_and_that_is_said(run, tmp_path, capsys) -> None:
    (run / "config.yaml").rename(tmp_path / "config.yaml")
    try:
        assert main(["export", str(run), "--to", "packed", "--out", str(tmp_path)]) == 0
    finally:
        (tmp_path / "config.yaml").rename(run / "config.yaml")
    assert "64 random images" in capsys.readouterr().out


def test_without_onnx_it_is_left_out_or_named(run, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["export", str(run), "--to", "onnx", "--out", str(tmp_path)]) == 2
    assert "pip install 'sparse_lab[onnx]'" in capsys.readouterr().err
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert main(["export", str(run), "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["network.pt", "network.sparse"]


@pytest.mark.full
def test_the_name_load_is_offered_without_bringing_torch() -> None:
    import subprocess

    check = "import sparse_lab, sys; sparse_lab.load; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
    with pytest.raises(AttributeError, match="lode"):
        sparse_lab.lode  # noqa: B018
