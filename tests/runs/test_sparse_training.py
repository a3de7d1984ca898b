"""Sparse from the first step: exact schedules, what drops and grows, what the record and the diagnostics say."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch
from rich.console import Console
from torch.nn import functional

from sparse_lab import models
from sparse_lab.algorithms.after_step import MaskUpdate
from sparse_lab.algorithms.drop_and_grow import DropAndGrow
from sparse_lab.algorithms.enforce import EnforceMasks
from sparse_lab.experiment.identity import run_dir, run_name
from sparse_lab.experiment.runner import run
from sparse_lab.models.dyrelu import DyReLU
from sparse_lab.training.checkpoint_io import load_checkpoint, load_network
from sparse_lab.training.lightning_module import Classifier

NARROW = ("model=resnet34", "sparsity.target=0.9", "training.epochs=10")  # 20 steps, 83,468 weights


def lines(config, name="updates") -> list[dict]:
    return [json.loads(line) for line in (run_dir(config).path / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.full
@pytest.mark.parametrize("shape", ["cosine", pytest.param("triangular", marks=pytest.mark.full)])
def test_density_follows_the_cycles_to_the_weight_and_ends_at_the_target(shape, compose, quiet):
    """Against the closed form: cycles of 6 and 8 steps (0.3 and 0.4 of 20), changes every 2 steps, then drop and
    grow.
    """
    config = compose(
        "method=east", *NARROW, f"method.cycles.shape={shape}", "method.cycles.lengths=[0.3,0.4]",
        "method.cycles.every=2", "method.drop_and_grow.update_every=3", "diagnostics.layers=true",
    )  # fmt: skip
    result = run(config, "x", quiet)
    wanted = {0: 0.1}
    for start, length in ((0, 6), (6, 8)):
        for since in range(2, length, 2):
            p = since / length
            rise = (1 - math.cos(2 * math.pi * p)) / 2 if shape == "cosine" else 1 - abs(2 * p - 1)
            wanted[start + since] = 0.1 + 0.2 * rise
        wanted[start + length] = 0.1
    wanted |= {15: 0.1, 18: 0.1}
    rows = lines(config)
    assert {row["step"]: row["kept"] for row in rows} == {step: round(d * 83_468) for step, d in wanted.items()}
    assert all(row["asked"] == row["kept"] for row in rows)
    assert [row["change"] for row in rows] == ["prune"] + ["cycle"] * 7 + ["drop_and_grow"] * 2
    assert result["kept"] == 8_347 and result["kept_with_reuse"] > 8_347 and result["unique"] == 44_012
    assert all(a["explored"] <= b["explored"] for a, b in pairwise(rows))
    positions = {layer["name"]: layer["macs"] // layer["total"] for layer in result["layers"]}
    macs = {row["step"]: sum(positions[name] * layer["kept"] for name, layer in row["layers"].items()) for row in rows}
    mean = sum((after - step) * macs[step] for step, after in pairwise([*sorted(wanted), 20])) / 20
    # 20 steps of 16 images, three passes each, two operations a multiply-add
    assert result["flops"]["training_sparse"] == round(6 * 20 * 16 * mean)


@pytest.mark.parametrize("method", [pytest.param("set", marks=pytest.mark.full), "rigl"])
def test_what_drops_is_smallest_and_what_grows_starts_at_zero(method, compose, quiet, monkeypatch):
    """RigL: grown where |gradient| is largest, by float64 autograd on the same batch; SET: elsewhere."""
    seen = []

    def spied(self, optimizer):
        before = {name: (mask.clone(), module_.weight.detach().clone()) for (name, mask), module_ in zip(
            self.masks.masks().items(), self.masks.layers.values(), strict=True)}  # fmt: skip
        gradients = {name: weight.grad.clone() for name, weight in self.masks.weights().items()}
        original(self, optimizer)
        for name, layer in self.masks.layers.items():
            mask, weight = before[name]
            now = self.masks[name]
            grown, dropped = now & ~mask, mask & ~now
            assert int(grown.sum()) == int(dropped.sum()) == min(math.ceil(fraction(self) * int(mask.sum()) - 1e-9),
                                                                 int((~mask).sum()))  # fmt: skip
            assert not layer.weight[grown].any() and not optimizer.state[layer.weight]["momentum_buffer"][grown].any()
            assert not optimizer.state[layer.weight]["momentum_buffer"][~now].any()
            if dropped.any():
                assert weight[dropped].abs().max() <= weight[mask & now].abs().min()
            by_gradient = gradients[name].abs()
            if grown.any() and bool((~mask & ~now).any()):
                seen.append(bool(by_gradient[grown].min() >= by_gradient[~mask & ~now].max()))

    def fraction(update):
        return 0.15 * (1 + math.cos(math.pi * update.step / 9))  # alpha 0.3, T_end 0.75 * 12

    original = MaskUpdate._update
    monkeypatch.setattr(MaskUpdate, "_update", spied)
    # SET reads no gradients, and those of pruned weights are then cut: left whole here, to see that it ignores them
    monkeypatch.setattr(MaskUpdate, "reads_gradients", lambda self: self._is_due(self.step + 1))
    run(compose(f"method={method}", *NARROW, "training.epochs=6", "method.drop_and_grow.update_every=4"), "x", quiet)
    assert len(seen) > 50
    assert all(seen) if method == "rigl" else not all(seen)


def test_growth_sees_the_dense_gradients_of_the_training_step(compose, quiet, monkeypatch):
    """Float64 autograd of the same batch in a network of the same weights, before the step; pruned positions too."""
    caught = {}

    def remember(module, batch, batch_idx):
        sets_rate(module, batch, batch_idx)
        plain = models.build("vgg16", width=0.0625).double().train()
        state = {name: value.double() for name, value in module.model.state_dict().items() if "mask" not in name}
        plain.load_state_dict(state)
        images, labels = batch
        functional.cross_entropy(plain(images.double()), labels).backward()
        caught.update({name: layer.weight.grad for name, layer in plain.named_modules() if hasattr(layer, "weight")})

    def compare(self, step, drop, grow, generator):
        for name, score in grow.items():
            assert torch.allclose(score, caught[name].abs(), rtol=1e-8, atol=1e-12), name
        caught["compared"] = True
        return original(self, step, drop, grow, generator)

    original, sets_rate = DropAndGrow.update, Classifier.on_train_batch_start
    monkeypatch.setattr(Classifier, "on_train_batch_start", remember)
    monkeypatch.setattr(DropAndGrow, "update", compare)
    exact = ("trainer.precision=64-true", "training.epochs=2")  # in float32 flips of ReLUs move gradients by percents
    run(compose("method=rigl", "sparsity.target=0.9", "method.drop_and_grow.update_every=1", *exact), "x", quiet)
    assert caught["compared"]


@pytest.mark.every(2)
@pytest.mark.parametrize(("when", "clipped"), [("after_clipping", True), ("before_clipping", False)])
def test_gradients_are_taken_after_clipping_or_before_it(when, clipped, compose, quiet, monkeypatch):
    norms = []

    def spied(self, step, drop, grow, generator):
        norms.append(math.sqrt(sum(float(score.double().square().sum()) for score in grow.values())))
        return original(self, step, drop, grow, generator)

    original = DropAndGrow.update
    monkeypatch.setattr(DropAndGrow, "update", spied)
    overrides = (
        "training.clip_norm=1e-3",
        f"method.gradients={when}",
        "method.drop_and_grow.update_every=2",
        "training.epochs=4",
    )
    run(compose("method=rigl", "sparsity.target=0.9", *overrides), "x", quiet)
    assert norms and all((norm <= 1e-3 * (1 + 1e-4)) is clipped for norm in norms)


def test_explored_is_the_share_of_weights_that_were_ever_alive(compose, quiet, monkeypatch):
    ever: dict[str, torch.Tensor] = {}

    def watched(self, optimizer):
        original(self, optimizer)
        for name, mask in self.masks.masks().items():
            ever[name] = mask.clone() | ever.get(name, mask)

    original = EnforceMasks.after_step
    monkeypatch.setattr(EnforceMasks, "after_step", watched)
    result = run(
        compose("method=set", "sparsity.target=0.9", "training.epochs=5", "method.drop_and_grow.update_every=3"),
        "x",
        quiet,
    )
    share = sum(int(mask.sum()) for mask in ever.values()) / result["total"]
    assert 0.1 < share == pytest.approx(result["explored"], abs=1e-12)


@pytest.mark.parametrize(
    "width", [pytest.param(0.25, marks=pytest.mark.full), pytest.param(1, marks=pytest.mark.nightly)]
)
def test_at_99_99_rigl_trains_where_layers_hold_a_handful_and_the_record_names_the_dead(width, compose, capsys):
    """At full width ResNet-34 has 2,127 weights in 37 layers, 9 in the stem; at a quarter of it 133."""
    small = ("dataset.train_limit=32", "dataset.eval_limit=32", "training.batch_size=16", "training.epochs=2")
    config = compose(
        "method=rigl", "model=resnet34", f"model.width={width}", "sparsity=s99_99", *small,
        "method.drop_and_grow.update_every=1",
        "diagnostics.layers=true",
    )  # fmt: skip
    result = run(config, "x", Console(width=200))
    wanted = {0.25: (133, 1_330_352), 1: (2_127, 21_265_088)}[width]
    assert (result["kept"], result["total"]) == wanted
    kept = {layer["name"]: layer["kept"] for layer in result["layers"]}
    assert kept["conv1"] == min(kept.values()) == {0.25: 1, 1: 9}[width]
    assert width < 1 or max(kept.values()) == 130
    rows = lines(config)
    assert len(rows) == 3 and all(row["kept"] == wanted[0] for row in rows)
    dead = [name for name, layer in rows[-1]["layers"].items() if layer["effective"] == 0]
    assert result["dead_layers"] == dead == rows[-1]["dead_layers"] and dead
    said = capsys.readouterr().out
    assert "CUTS THE NETWORK" in said or all(name in said for name in rows[0]["dead_layers"])


@pytest.mark.parametrize(
    "method", ["static", *(pytest.param(name, marks=pytest.mark.full) for name in ("east", "rigl", "set"))]
)
def test_a_connected_start_crosses_every_layer_with_the_same_counts(method, compose, quiet):
    overrides = (f"method={method}", "model=resnet34", "sparsity.target=0.9985", "training.epochs=1")
    apart = compose(*overrides, "diagnostics.layers=true")
    joined = compose(*overrides, "diagnostics.layers=true", "sparsity.connected_init=true")
    assert run_name(apart) != run_name(joined)
    first = []
    for config in (apart, joined):
        run(config, "x", quiet)
        first.append(lines(config)[0])
    kept = [{name: layer["kept"] for name, layer in row["layers"].items()} for row in first]
    assert kept[0] == kept[1] and sum(kept[0].values()) == round(0.0015 * 83_468)
    assert first[0]["connected"] is False
    assert first[1]["connected"] is True and first[1]["dead_layers"] == []
    assert all(layer["effective"] >= 1 for layer in first[1]["layers"].values())


@pytest.mark.full
def test_diagnostics_say_what_they_should_and_change_nothing(compose, quiet, tmp_path):
    overrides = (
        "method=east",
        *NARROW,
        "training.epochs=4",
        "method.cycles.every=2",
        "method.drop_and_grow.update_every=3",
    )
    plain = compose(*overrides, f"paths.outputs={tmp_path / 'plain'}")
    watched = compose(
        *overrides, f"paths.outputs={tmp_path / 'watched'}",
        "diagnostics.layers=true", "diagnostics.activations=true", "diagnostics.gradients=true",
    )  # fmt: skip
    assert run_name(plain) == run_name(watched)
    for config in (plain, watched):
        run(config, "x", quiet)
    one, two = (load_network(run_dir(config).best) for config in (plain, watched))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not (run_dir(plain).path / "activations.jsonl").exists() and "layers" not in lines(plain)[0]
    for row in lines(watched):
        assert sum(layer["kept"] for layer in row["layers"].values()) == row["kept"]
        assert sum(layer["effective"] for layer in row["layers"].values()) == row["effective"]
    activations, gradients = lines(watched, "activations"), lines(watched, "gradients")
    assert [row["epoch"] for row in activations] == [1, 2, 3, 4]
    assert activations[0]["beta"] == 1.0 and activations[-1]["beta"] == 0.0
    assert all(len(row["layers"]) == 33 and all(0 <= s <= 1 for s in row["layers"].values()) for row in activations)
    assert {"live weights", "pruned positions", "BatchNorm", "DyReLU", "sharing scales"} == set(gradients[0]["parts"])
    assert "DyReLU" not in gradients[-1]["parts"]


def test_no_epoch_with_dyrelu_counts_as_best_and_nothing_of_it_is_left(compose, quiet):
    config = compose("method=static", *NARROW, "training.epochs=5", "method.dyrelu={}", "method.dyrelu.end=0.8")
    result = run(config, "x", quiet)
    assert result["selected_on"] == "validation" and result["levels"][0]["best_epoch"] == 5
    checkpoint = load_checkpoint(run_dir(config).last)
    network = models.build("resnet34", width=0.0625)
    parameters = sum(1 for _ in network.parameters())
    assert len(checkpoint["optimizer_states"][0]["param_groups"][0]["params"]) == parameters
    assert len(checkpoint["optimizer_states"][0]["state"]) == parameters
    assert not any(".reduce." in name or ".expand." in name for name in checkpoint["state_dict"])


def test_dyrelu_phases_out_of_vgg16_too(compose, quiet, monkeypatch):
    betas = []
    forward = DyReLU.forward
    monkeypatch.setattr(DyReLU, "forward", lambda self, x: betas.append(float(self.beta)) or forward(self, x))
    overrides = ("method=static", "method.dyrelu={}", "sparsity.target=0.9", "training.epochs=4")
    run(compose(*overrides, "method.dyrelu.begin=0.25", "method.dyrelu.end=0.75"), "x", quiet)
    training = betas[::13]  # 13 activations; two steps, then two validation batches, an epoch
    assert training[0] == 1.0 and min(training) == 0.25 and sorted(training, reverse=True) == training


@pytest.mark.full
def test_what_a_training_is_too_short_for_is_said(compose, capsys):
    run(compose("method=east", *NARROW, "training.epochs=3"), "x", Console(width=200))
    said = capsys.readouterr().out
    assert "nothing is ever dropped and grown" in said and "or lower method.drop_and_grow.update_every" in said
    assert "density does not move in a cycle" in said


def test_nothing_is_exchanged_after_the_last_step(compose, quiet):
    """What grew there would not be trained any more."""
    config = compose(
        "method=rigl", "sparsity=s90", "method.drop_and_grow.update_every=1", "method.drop_and_grow.end=1.0"
    )
    run(config, "x", quiet)
    assert [row["step"] for row in lines(config) if row["change"] == "drop_and_grow"] == [1, 2, 3]
