"""Candidates do the same work: a sparse step moves weights as the masked dense one does, and logits agree."""

from __future__ import annotations

import pytest
import torch

from sparse_lab.bench import inference, memory, training
from sparse_lab.bench.cells import Settings, Unavailable
from sparse_lab.bench.patterns import Patterns, build
from sparse_lab.errors import UserError

SMALL = 0.125


def test_a_sparse_step_is_a_masked_dense_step():
    pattern = Patterns("vgg16", SMALL, (90.0,))("erk", 90.0)
    dense, sparse = (build("vgg16", SMALL).double() for _ in range(2))
    one, other = training.DenseStep(dense, 8), training.SparseStep(sparse, 8)
    one._batch = other._batch = (one._batch[0].double(), one._batch[1])
    one.masks.set(pattern)
    other.install(pattern)
    for _ in range(3):
        one()
        other()
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(sparse.state_dict()[name], tensor, rtol=1e-8, atol=1e-10, msg=name)


def test_every_turn_of_sparse_training_begins_with_the_same_weights():
    patterns = Patterns("vgg16", SMALL, (90.0, 99.0))
    step = training.SparseStep(build("vgg16", SMALL), 8)
    step.install(patterns("erk", 90.0))
    step()
    step.install(patterns("erk", 99.0))
    start = build("vgg16", SMALL).state_dict()
    for name, mask in patterns("erk", 99.0).items():
        assert torch.equal(step.model.state_dict()[f"{name}.weight"], start[f"{name}.weight"] * mask)
    assert not step.optimizer.state


def test_shares_of_a_step_add_up():
    step = training.SparseStep(build("vgg16", SMALL), 8)
    step.install(Patterns("vgg16", SMALL, (95.0,))("erk", 95.0))
    step()
    shares = step.shares()
    assert {"forward convolution", "weight gradient", "input gradient", "optimizer", training.REST} <= set(shares)
    assert sum(shares.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("model", ["vgg16", "resnet34"])
def test_the_finished_network_has_the_logits_of_the_dense_one(model):
    patterns = Patterns(model, SMALL, (95.0,))
    network, facts = inference.Finished(model, SMALL, patterns)("erk", 95.0)
    masked = inference.settled(build(model, SMALL), patterns("erk", 95.0)).eval()
    images = training.batch_of(5)[0]
    with torch.no_grad():
        expected = masked.double()(images.double())
    assert facts.connected and expected.std() > 0.01
    torch.testing.assert_close(network(images).double(), expected, rtol=1e-3, atol=1e-4)


def test_onnxruntime_runs_the_dense_network():
    pytest.importorskip("onnxruntime")
    network = inference.settled(build("vgg16", SMALL), None).eval()
    images = training.batch_of(3)[0]
    with torch.no_grad():
        torch.testing.assert_close(inference.dense_onnx(network)(images), network(images), rtol=1e-3, atol=1e-4)


def test_what_is_not_installed_or_does_not_compile_is_unavailable(monkeypatch):
    def missing(path):
        raise UserError("onnxruntime is needed")

    def broken():
        raise RuntimeError("no C++ compiler\nmuch more")

    monkeypatch.setattr(inference.onnx, "runner", missing)
    with pytest.raises(Unavailable, match="onnxruntime is needed"):
        inference.dense_onnx(build("vgg16", SMALL))
    with pytest.raises(Unavailable, match=r"does not work here: no C\+\+ compiler$"):
        training.try_out(broken)


def test_entries_say_the_most_important_first_and_each_once():
    settings = Settings(("vgg16",), masks=("erk", "synflow"), sparsities=(90.0, 99.0), batch=8, width=SMALL)
    patterns = Patterns("vgg16", SMALL, settings.sparsities)
    steps = [entry.cell for entry in training.entries("vgg16", settings, patterns)]
    assert [(c.candidate, c.mask, c.sparsity) for c in steps] == [
        ("dense", "", 0.0),
        ("sparse", "erk", 99.0),
        ("sparse", "erk", 90.0),
        ("bf16", "", 0.0),
        ("sparse", "synflow", 99.0),
        ("sparse", "synflow", 90.0),
        ("compile", "", 0.0),
    ]
    passes = [entry.cell for entry in inference.entries("vgg16", settings, patterns)]
    assert len(set(passes)) == len(passes) == 2 * (2 * 2 + 4)
    assert {cell.batch for cell in passes} == {8, 1}


def test_the_process_that_measures_memory_prints_what_was_there_before_and_the_peak(tmp_path, capsys):
    path = tmp_path / "masks.pt"
    torch.save(dict(Patterns("vgg16", SMALL, (99.0,))("erk", 99.0)), path)
    for masks in ([], [str(path)]):
        assert memory.main(["vgg16", str(SMALL), "4", *masks]) == 0
        start, peak = map(float, capsys.readouterr().out.split())
        assert 50 < start <= peak < 100_000


@pytest.mark.full
def test_a_dense_step_takes_more_memory_in_a_process_of_its_own_than_no_step():
    start, peak = memory.peak("vgg16", 0.5, 64, None)
    assert peak > start + 50
    assert memory.peak("no_such_network", 1.0, 4, None) is None


@pytest.mark.nightly
def test_torch_compile_takes_its_turns_or_says_why_not():
    network = build("vgg16", SMALL)
    step = training.DenseStep(network, 4, forward=training.compiled(network))
    try:
        training.try_out(step)
        step()
    except Unavailable as why:
        assert "does not work here: " in str(why)
