"""A run of a network by plugin is exported where the plugin is not."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import sparse_lab
from sparse_lab.cli.main import main
from sparse_lab.experiment import plugins
from sparse_lab.export import latency

PLUGIN = """
import torch
from pathlib import Path
from torch import nn
from torch.nn import functional

sparse_lab.register_choices(Path(__file__).with_name("conf"))

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.norm = nn.LayerNorm(8)
        self.up, self.head = nn.Linear(8, 16), nn.Linear(16, num_classes)
        self.register_buffer("turn", torch.arange(8).flip(0), persistent=False)

    def forward(self, x):
        x = self.norm(self.stem(x).permute(0, 2, 3, 1)[..., self.turn])
        return self.head(functional.gelu(self.up(x)).mean((1, 2)))

@sparse_lab.register_model
def own(num_classes: int) -> nn.Module:
    return Net(num_classes)
"""
REQUEST = ["dataset=digits", "training=digits", "dataset.train_limit=128", "training.epochs=1", "model=own"]


@pytest.fixture
def run(plugin, tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A finished run, and its plugin, which is not loaded any more."""
    monkeypatch.setattr(latency, "ROUNDS", 2)
    path = plugin(PLUGIN)
    (path.parent / "conf" / "model").mkdir(parents=True)
    (path.parent / "conf" / "model" / "own.yaml").write_text("name: own\n")
    more = ["method=oneshot", "sparsity=s90", "training.finetune.epochs=1", f"paths.outputs={tmp_path / 'out'}"]
    assert main(["--plugin", str(path), *REQUEST, *more]) == 0
    plugins.forget()
    return next(found for found in (tmp_path / "out" / "runs").iterdir() if "oneshot" in found.name), path


def test_without_its_plugin_all_but_torch_is_written(run, tmp_path, capsys) -> None:
    folder, plugin = run
    assert main(["export", str(folder), "--to", "packed"]) == 0
    images = torch.randn(5, 3, 32, 32)
    logits = sparse_lab.load(folder / "network.sparse")(images)

    capsys.readouterr()
    assert main(["export", str(folder), "--to", "torch"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "plugin mine" in said and "--plugin" in said

    assert main(["--plugin", str(plugin), "export", str(folder), "--to", "torch"]) == 0
    from sparse_lab.export.state_dict import read

    with torch.no_grad():
        wanted = copy.deepcopy(read(folder / "network.pt")).double()(images.double())
    assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_its_onnx_is_the_same_network(run) -> None:
    pytest.importorskip("onnxscript")
    folder, _ = run
    assert main(["export", str(folder)]) == 0
    from sparse_lab.export.onnx import runner

    images = torch.randn(3, 3, 32, 32)
    packed = sparse_lab.load(folder / "network.sparse")(images)
    assert (runner(folder / "network.onnx")(images) - packed).abs().max() <= 1e-5 * packed.abs().max()
    assert not (folder / "network.pt").exists()  # that needs the plugin


@pytest.mark.full
def test_a_trace_that_is_not_the_runs_is_refused(run, capsys) -> None:
    folder, _ = run
    trace = folder / "checkpoints" / "trace.ckpt"
    content = trace.read_bytes()
    for changed in (content[:-1], content[:200] + bytes([content[200] ^ 1]) + content[201:]):
        trace.write_bytes(changed)
        capsys.readouterr()
        assert main(["export", str(folder), "--to", "packed"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    trace.unlink()
    assert main(["export", str(folder), "--to", "packed"]) == 2
    assert "--plugin" in capsys.readouterr().err
