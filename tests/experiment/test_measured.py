"""compute=auto on a network that nobody has measured: measured once, kept; a run that has begun stays what it was."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from sparse_lab import models
from sparse_lab.config import Config
from sparse_lab.experiment import backend, measured, runner
from sparse_lab.experiment.identity import is_to_be_measured, run_dir, settled
from sparse_lab.experiment.measure import measure
from sparse_lab.experiment.measured import Measured
from sparse_lab.registering import REGISTERED, take_out
from sparse_lab.sweep.plan import Request


@pytest.fixture
def tiny() -> Iterator[str]:
    """A network that is not the project's own."""

    @models.register_model
    def tiny_for_tests(num_classes: int, width: float, image_size: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.SiLU(), nn.Conv2d(16, 24, 3, 2, 1), nn.GELU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(24, num_classes),
        )  # fmt: skip

    yield "tiny_for_tests"
    take_out([REGISTERED[-1]])


@pytest.fixture
def config(tiny: str, tmp_path: Path) -> Config:
    lines = ["method=static", "dataset=synthetic", "sparsity.target=0.9", "trainer=cpu", "training.epochs=1"]
    more = ["training.batch_size=16", "dataset.train_limit=256", "dataset.eval_limit=128", "compute=auto"]
    composed = Request.read([]).compose([*lines, *more, f"paths.outputs={tmp_path}"]).config()
    composed.model.name = tiny
    return composed


def steps(dense: float, sparse: float):  # type: ignore[no-untyped-def]
    return lambda config, bfloat16: Measured(dense, sparse)


def test_planning_measures_nothing_and_says_what_the_run_will_do(config, monkeypatch):
    monkeypatch.setattr("sparse_lab.experiment.measure.measure", lambda *any: pytest.fail("measured"))
    assert is_to_be_measured(config)
    chosen = backend.choose(config)
    assert chosen.compute == "dense" and "when the run begins" in chosen.line
    assert run_dir(config).name == run_dir(settled(config)).name
    assert not (Path(config.paths.outputs) / measured.FILE).exists()


@pytest.mark.parametrize(("dense", "sparse", "picked"), [(0.041, 0.063, "dense"), (0.08, 0.02, "sparse")])
def test_the_faster_one_is_taken_and_both_times_are_said(config, monkeypatch, dense, sparse, picked):
    monkeypatch.setattr("sparse_lab.experiment.measure.measure", steps(dense, sparse))
    backend.measure(config)
    assert not is_to_be_measured(config)
    chosen = backend.choose(config)
    assert chosen.compute == picked == settled(config).compute
    assert f"{1e3 * dense:.3g} ms" in chosen.line and f"{1e3 * sparse:.3g} ms" in chosen.line
    assert chosen.line.endswith(f"for {config.model.name}") and "\n" not in chosen.line


def test_it_is_measured_once_and_anew_where_the_file_is_damaged_or_the_batch_another(config, monkeypatch):
    times = []
    monkeypatch.setattr("sparse_lab.experiment.measure.measure", lambda *any: times.append(1) or Measured(2.0, 1.0))
    backend.measure(config)
    backend.measure(config)
    assert len(times) == 1
    config.training.batch_size = 17
    assert is_to_be_measured(config)
    backend.measure(config)
    assert len(times) == 2
    config.training.batch_size = 16
    assert not is_to_be_measured(config)
    path = Path(config.paths.outputs) / measured.FILE
    for damage in ("{", "[]", json.dumps({**json.loads(path.read_text()), "checksum": "0"}), "{}"):
        path.write_text(damage)
        assert is_to_be_measured(config)
    backend.measure(config)
    assert len(times) == 3 and not is_to_be_measured(config)


@pytest.mark.parametrize("began", ["dense", "sparse"])
def test_a_run_that_has_begun_keeps_its_arithmetic_whatever_is_measured_later(config, monkeypatch, began):
    monkeypatch.setattr(
        "sparse_lab.experiment.measure.measure", steps(*((1.0, 2.0) if began == "dense" else (2.0, 1.0)))
    )
    backend.measure(config)
    folder = run_dir(config)
    folder.path.mkdir(parents=True)
    (folder.path / "status.json").write_text("{}")
    (Path(config.paths.outputs) / measured.FILE).unlink()
    assert not is_to_be_measured(config) and run_dir(config).name == folder.name
    monkeypatch.setattr(
        "sparse_lab.experiment.measure.measure", steps(*((2.0, 1.0) if began == "dense" else (1.0, 2.0)))
    )
    backend.measure(config)
    assert backend.choose(config).compute != began
    assert settled(config).compute == began and run_dir(config).name == folder.name


def test_what_cannot_be_measured_is_dense_and_says_why(config, monkeypatch):
    def broken(*any):  # type: ignore[no-untyped-def]
        raise ValueError("no such layer")

    monkeypatch.setattr("sparse_lab.experiment.measure.build_model", broken)
    backend.measure(config)
    chosen = backend.choose(config)
    assert chosen.compute == "dense" and "no such layer" in chosen.line


def test_a_measurement_is_short_and_changes_no_random_number(config):
    before = torch.get_rng_state()
    found = measure(config, bfloat16=False)
    assert found.why is None and 0 < found.dense < 5 and 0 < found.sparse < 5
    assert torch.equal(torch.get_rng_state(), before)


def test_known_networks_and_explicit_choices_are_not_measured(config):
    for change in ({"compute": "dense"}, {"compute": "sparse"}):
        for name, value in change.items():
            setattr(config, name, value)
        assert not is_to_be_measured(config) and backend.ways(config) == []
    config.compute, config.model.name = "auto", "vgg16"
    assert not is_to_be_measured(config)


def test_a_run_measures_says_so_and_is_found_again(config, monkeypatch):
    monkeypatch.setattr("sparse_lab.experiment.measure.measure", steps(0.05, 0.02))
    said = io.StringIO()
    first = runner.run(config, "sparse-lab", Console(file=said, width=300))
    assert "compute=auto picks sparse: measured 20 ms a step against 50 ms dense" in said.getvalue()
    (Path(config.paths.outputs) / measured.FILE).unlink()
    monkeypatch.setattr("sparse_lab.experiment.measure.measure", lambda *any: pytest.fail("measured again"))
    again = runner.run(config, "sparse-lab", Console(file=said, width=300))
    assert again["name"] == first["name"] and "done already" in said.getvalue()
