"""What is not in a run's name: each key and each property of a machine either leaves every bit as it is, or stands in
the record.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from sparse_lab.config import Config, parts_of
from sparse_lab.experiment.identity import run_dir, run_name
from sparse_lab.experiment.runner import run
from sparse_lab.training.checkpoint_io import load_network

# the same bits: tried below, all at once
BITS = {
    "dataset.root": None,  # set with paths.data
    "dataset.download": "true",
    "dataset.workers": "0",
    "training.select_on_few": "true",
    "trainer.accelerator": "auto",
    "trainer.checkpoint_every": "2",
    "trainer.progress": "true",
    "trainer.profiler": "simple",
    "diagnostics.layers": "true",
    "diagnostics.activations": "true",
    "diagnostics.gradients": "true",
    "logger.wandb": None,  # each in tests/loggers
    "logger.tensorboard": "true",
    "logger.mlflow": None,
    "logger.trackio": None,
    "logger.project": "other",
    "logger.mlflow_uri": "http://127.0.0.1:1",
    "paths.data": "elsewhere",
    "paths.outputs": None,  # by where the two runs lie
}
# words about a method, which nothing computes with
WORDS = {"method.kind", "method.paper", "method.summary"}
# in the name, by another way than as a setting
NAMED = {"trainer.devices", "dataset.file"}  # the file by its content
# may change the last bits, and are in the record: result["computed"]
RECORDED = {"trainer.compile": "compile", "trainer.deterministic": "deterministic"}


def unnamed(kind: type = Config, path: str = "") -> Iterator[str]:
    parts = parts_of(kind)
    for entry in dataclasses.fields(kind):
        inner = parts.get(entry.name)
        if inner is None and dataclasses.is_dataclass(default := _default(entry)):
            inner = type(default)
        if inner is not None:
            yield from unnamed(inner, f"{path}{entry.name}.")
        elif not entry.metadata.get("identity", True):
            yield f"{path}{entry.name}"


def _default(entry: dataclasses.Field) -> object:
    return entry.default_factory() if entry.default_factory is not dataclasses.MISSING else entry.default


def test_every_key_that_is_not_in_a_name_has_been_decided_on():
    decided = [*BITS, *WORDS, *NAMED, *RECORDED]
    assert sorted(unnamed()) == sorted(decided)


@pytest.mark.parametrize("request_of", [("method=rigl", "sparsity.target=0.9"),
                                        ("method=east", "sparsity.target=0.99", "model=resnet34")],
                         ids=["rigl", "east"])  # fmt: skip
@pytest.mark.every(2)
def test_what_is_said_to_change_no_bit_changes_none(request_of, compose_under, tmp_path, quiet):
    others = [f"{key}={value}" for key, value in BITS.items() if value is not None]
    first, second = (compose_under(tmp_path / place, *request_of, *more) for place, more in (("a", ()), ("b", others)))
    results = [run(config, "x", quiet) for config in (first, second)]
    assert run_name(first) == run_name(second)
    networks = [load_network(run_dir(config).best) for config in (first, second)]
    assert networks[0].keys() == networks[1].keys()
    assert all(torch.equal(value, networks[1][name]) for name, value in networks[0].items())
    keys = ("test_accuracy", "validation_accuracy", "kept", "flops", "cell", "hash")
    assert [results[0][key] for key in keys] == [results[1][key] for key in keys]


def test_what_may_change_bits_is_in_the_record(compose, quiet):
    config = compose("method=dense", "trainer.compile=off", "trainer.deterministic=false")
    [way] = run(config, "x", quiet)["computed"]
    assert way.keys() == {"device", "instructions", "torch", *RECORDED.values()}
    assert way["compile"] == "off" and way["deterministic"] is False
    assert way["torch"] == str(torch.__version__) and f"{torch.get_num_threads()} threads" in way["device"]


def test_a_run_that_goes_on_in_another_way_knows_of_both(compose, quiet, plug):
    words = ("method=dense", "training.epochs=3")
    plug(1)
    with pytest.raises(Exception, match="pulled"):
        run(compose(*words), "x", quiet)
    plug(0)
    ways = run(compose(*words, "trainer.deterministic=false"), "x", quiet)["computed"]
    assert [way["deterministic"] for way in ways] == [True, False]


def test_processes_of_a_run_are_in_its_name(compose):
    assert run_name(compose("trainer.devices=2")) != run_name(compose()) == run_name(compose("trainer.devices=1"))


def test_a_precision_that_the_machine_chooses_is_in_the_name_as_what_it_is(compose):
    names = {
        precision: run_name(compose(f"trainer.precision={precision}"))
        for precision in ("auto", "32-true", "bf16-mixed")
    }
    assert names["auto"] == names["32-true"] != names["bf16-mixed"], "on a CPU"


@pytest.mark.full
def test_the_number_of_threads_is_in_the_record(small, tmp_path):
    """In processes of their own: torch takes the number once."""
    found = {}
    for threads in ("1", "2"):
        command = [sys.executable, "-m", "sparse_lab", *small, "method=dense", f"paths.outputs={tmp_path / threads}"]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": threads})
        [path] = (tmp_path / threads).glob("runs/*/result.json")
        found[threads] = path.read_text()
    assert all(f"{threads} threads" in text for threads, text in found.items())
