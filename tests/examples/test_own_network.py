"""examples/own_network: a network and a data set from outside, as the package's own."""

from __future__ import annotations

import pytest
import torch

import sparse_lab
from sparse_lab.cli.main import main
from sparse_lab.experiment import plugins


def test_it_trains_and_is_exported(start, results, tmp_path, capsys):
    words = ("model=small_cnn", "dataset=stripes", "method=rigl", "sparsity=s90", "model.width=0.25")
    assert start(*words, "dataset.train_limit=256", "training.epochs=4", "training.lr=0.1", example="own_network") == 0
    [(name, result)] = results().items()
    assert name.startswith("small_cnn-stripes-rigl-90-seed1") and result["test_accuracy"] > 30
    assert result["data"]["official"] is True and result["data"]["fingerprint"] == ""
    run = tmp_path / "runs" / name
    plugins.forget()
    capsys.readouterr()
    assert main(["export", str(run), "--to", "torch"]) == 2
    said = capsys.readouterr().err
    assert "a network 'small_cnn' that is not known here: it was made with plugin plugin (" in said
    plugin = tmp_path.parent / "plugin.py"
    assert main(["export", str(run), "--to", "packed", f"--plugin={plugin}"]) == 2  # no such file


@pytest.mark.full
def test_its_packed_file_needs_no_plugin(start, results, examples, tmp_path):
    words = ("model=small_cnn", "dataset=digits", "method=oneshot", "sparsity=s90", "model.width=0.25")
    assert start(*words, example="own_network") == 0
    run = next(tmp_path / "runs" / name for name in results() if "oneshot" in name)
    assert main(["export", str(run), "--to", "packed"]) == 0
    plugins.forget()
    logits = sparse_lab.load(run / "network.sparse")(torch.zeros(2, 3, 32, 32))
    assert logits.shape == (2, 10)


@pytest.mark.full
def test_both_examples_go_together(examples, small, tmp_path, results):
    own = [f"--plugin={examples / name / 'plugin.py'}" for name in ("own_method", "own_network")]
    request = [*own, *small, "method=blurred_rigl", "model=small_cnn", "sparsity=s90", f"paths.outputs={tmp_path}"]
    assert main([*request, "model.width=1.0"]) == 0
    [result] = results().values()
    assert list(result["plugins"]) == ["plugin", "plugin (2)"]
