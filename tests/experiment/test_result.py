"""What a record says of a run, against closed forms."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from sparse_lab import models
from sparse_lab.experiment.identity import run_dir
from sparse_lab.experiment.result import finite
from sparse_lab.experiment.runner import run
from sparse_lab.models import build
from sparse_lab.sparsity.flops import layer_costs
from sparse_lab.training.checkpoint_io import load_network
from sparse_lab.training.figures import Figures


@pytest.mark.parametrize(
    ("words", "images"),
    [
        (("dataset.train_limit=50", "training.batch_size=128"), 50),  # one smaller batch, which is the only one
        (("dataset.train_limit=40", "training.batch_size=16"), 32),  # the smaller last batch is dropped
        (
            ("dataset.train_limit=48", "training.batch_size=16", "training.accumulate=2"),
            48,
        ),  # a smaller last step is not
        (("dataset.train_limit=64", "training.batch_size=16", "training.limit_batches=1"), 16),
        pytest.param(
            ("dataset.train_limit=50", "training.batch_size=128", "training.limit_batches=3"),
            50,
            marks=pytest.mark.full,
        ),
    ],
)
def test_training_flops_count_the_images_that_were_trained_on(words, images, compose, quiet):
    """Three passes an image, two operations a multiply-add, over two epochs."""
    found = run(compose("method=dense", *words), "x", quiet)["flops"]
    dense = sum(cost.macs for cost in layer_costs(build("vgg16", 10, 0.0625, 32), 32))
    assert found["inference_dense"] == 2 * dense
    wanted = 6 * dense * 2 * images
    said = f"{found['training_dense'] / wanted:.2f} times what {images} images an epoch cost"
    assert (found["training_dense"], found["training_sparse"]) == (wanted, wanted), said


def test_rounds_that_end_early_count_the_epochs_that_they_had(compose, quiet, updates, monkeypatch):
    """Three rounds of three epochs; patience ends the first and the last one early. Each weighs as many images as it
    saw, not as many as it might have seen.
    """
    config = compose(
        "method=iterative", "sparsity.target=0.9", "schedule.iterative.share=0.6", "training.finetune.epochs=9",
        "training.finetune.patience=1", "training.finetune.lr=1e-12", "diagnostics.layers=true",
        "dataset.train_limit=40",
    )  # fmt: skip
    dense = compose("method=dense", "dataset.train_limit=40")
    run(dense, "x", quiet)
    validation, take = [60.0, 50.0, 10.0, 20.0, 30.0, 60.0, 50.0], Figures.take

    def scripted(self, stage):
        loss, found = take(self, stage)
        return loss, validation.pop(0) if stage == "validation" else found

    monkeypatch.setattr(Figures, "take", scripted)
    result = run(config, "x", quiet)
    positions = {layer["name"]: layer["macs"] // layer["total"] for layer in result["layers"]}
    macs = [sum(positions[name] * layer["kept"] for name, layer in row["layers"].items()) for row in updates(config)]
    epochs = [level["epochs"] for level in result["levels"]]
    assert len(macs) == 3 and epochs == [2, 3, 2]
    assert result["flops"]["training_sparse"] == 6 * 32 * sum(n * cost for n, cost in zip(epochs, macs, strict=True))
    assert result["flops"]["training_dense"] == 3 * result["flops"]["inference_dense"] * 32 * sum(epochs)


def test_regrown_weights_that_stay_at_zero_are_told_from_those_that_train(compose, capsys):
    """At 99.5% few paths are left, so many a regrown weight has no gradient: counted by numpy in what was saved."""
    config = compose("method=oneshot_regrow", "sparsity.target=0.995", "method.regrow.steps=2")
    result = run(config, "x", Console(width=200))
    saved = load_network(run_dir(config).best)
    masks = {name: value.numpy() for name, value in saved.items() if name.endswith(".mask")}
    nonzero = sum(int(np.count_nonzero(saved[name.replace(".mask", ".weight")].numpy())) for name in masks)
    assert result["kept"] == sum(int(mask.sum()) for mask in masks.values())
    assert result["nonzero"] == result["levels"][-1]["nonzero"] == nonzero < result["kept"]
    assert all(level["nonzero"] <= level["kept"] for level in result["levels"])
    out = capsys.readouterr().out
    assert f"{result['kept']:,} of {result['total']:,} weights, {nonzero:,} not zero" in out
    dense = run(compose("method=dense"), "x", Console(quiet=True))
    assert dense["nonzero"] == dense["kept"] == dense["total"] and dense["uncounted"] == []


class WithMemory(nn.Module):
    """VGG16 with a recurrent layer of 2 * 30 * 10 weights behind it."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain, self.memory = plain, nn.GRU(10, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.memory(self.plain(x)[None])[0][0]


def test_what_is_not_counted_is_said_once_and_stands_in_the_record(compose, monkeypatch, capsys, recwarn):
    make_plain = models.make
    monkeypatch.setattr(models, "make", lambda *asked: WithMemory(make_plain(*asked)))
    result = run(compose("method=static", "sparsity.target=0.9", "training.epochs=1"), "x", Console(width=300))
    assert result["uncounted"] == [
        {"name": "memory.weight_ih_l0", "kind": "GRU", "weights": 300},
        {"name": "memory.weight_hh_l0", "kind": "GRU", "weights": 300},
    ]
    assert result["total"] == sum(layer["total"] for layer in result["layers"])
    said = [line for line in capsys.readouterr().out.splitlines() if "not counted" in line]
    assert len(said) == 1 and "600 weights are not counted" in said[0] and "memory.weight_ih_l0 (GRU, 300)" in said[0]
    assert not [one for one in recwarn if "counted" in str(one.message)]


def test_a_figure_that_is_no_number_is_null():
    made = finite({"a": [math.nan, 1.5, {"b": (math.inf, 2)}], "c": -math.inf, "d": "nan", "e": True})
    assert made == {"a": [None, 1.5, {"b": [None, 2]}], "c": None, "d": "nan", "e": True}
    assert json.loads(json.dumps(made, allow_nan=False)) == made
