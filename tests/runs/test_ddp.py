"""One run in two processes: the same name, the same exact count; never under -m."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from sparse_lab.cli.main import main
from sparse_lab.experiment.identity import run_name

# two steps an epoch in each process
DDP = ("trainer=ddp", "trainer.accelerator=cpu", "dataset.train_limit=128")
REGROW = ("method=oneshot_regrow", "sparsity.target=0.9", "dataset.train_limit=128", "training.batch_size=200")


@pytest.mark.full
def test_a_run_in_two_processes_ends_like_any_other(compose, small, tmp_path):
    request = [*small, *DDP, *REGROW, "trainer.devices=2"]  # a batch an epoch, smaller than it might be
    command = [sys.executable, "-m", "sparse_lab", *request, f"paths.outputs={tmp_path}"]
    done = subprocess.run(
        [part for part in command if part != "trainer=cpu"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    name = run_name(compose(*REGROW, "trainer.devices=2"))
    result = json.loads((tmp_path / "runs" / name / "result.json").read_text())
    assert result["kept"] == round(0.1 * result["total"])
    # one step of all 128 images in each of two epochs, three passes an image
    assert result["flops"]["training_dense"] == 3 * result["flops"]["inference_dense"] * 128 * 2
    assert "MEMBER: 2/2" in done.stderr + done.stdout
    # the whole test set, of which each process read a half, by the network that is kept
    assert sum(result["classes"]["test_images"]) == result["images"]["test"]["used"] == 30
    assert main(["evaluate", str(tmp_path / "runs" / name), "--out", str(tmp_path / "seen")]) == 0
    (path,) = (tmp_path / "seen").glob("*.json")
    seen = json.loads(path.read_text())
    assert (seen["images"], seen["top1"]) == (30, result["test_accuracy"])
    assert [one["accuracy"] for one in seen["per_class"].values()] == result["levels"][-1]["class_accuracy"]
    assert len(list(tmp_path.rglob("result.json"))) == 3


@pytest.mark.full
def test_east_loses_its_dyrelu_and_rewires_in_two_processes(small, tmp_path):
    """The parameters that leave are not waited for, and the masks follow the schedule to the weight."""
    east = (
        "method=east",
        "model=resnet34",
        "sparsity.target=0.9",
        "method.cycles.every=1",
        "method.drop_and_grow.update_every=1",
    )
    request = [part for part in (*small, *DDP, *east) if part != "trainer=cpu"]
    command = [sys.executable, "-m", "sparse_lab", *request, "trainer.devices=2", "training.epochs=4"]
    done = subprocess.run([*command, f"paths.outputs={tmp_path}"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.rglob("updates.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows}) and len(rows) > 5
    assert all(row["asked"] == row["kept"] for row in rows) and rows[-1]["kept"] == 8_347
    assert "DyReLU has faded" in done.stdout and done.stdout.count("DyReLU has faded") == 1


@pytest.mark.full
def test_compactors_are_folded_alike_in_two_processes(small, tmp_path):
    """Both processes must take the same filters out, or the network that is saved is not the one that was tested."""
    resrep = ("method=resrep", "sparsity.target=0.5", "method.compactors.begin=0", "method.compactors.every=1")
    request = [part for part in (*small, *DDP, *resrep) if part != "trainer=cpu"]
    command = [sys.executable, "-m", "sparse_lab", *request, "trainer.devices=2", "training.finetune.optimizer=sgd"]
    done = subprocess.run([*command, f"paths.outputs={tmp_path}"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (path for path in tmp_path.rglob("result.json") if "resrep" in str(path))
    result = json.loads(path.read_text())
    assert result["kept"] == result["small"]["weights"] <= round(0.5 * result["total"])
    assert result["small"]["difference"] < 1e-5
    assert done.stdout.count("filters are gone") == 1


def test_a_sweep_in_several_processes_is_refused(tmp_path, capsys):
    request = ["-m", "dataset=digits", "trainer=ddp", "seed=1,2", f"paths.outputs={tmp_path}"]
    assert main(request) == 2
    assert "one by one" in capsys.readouterr().err
