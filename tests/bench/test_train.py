"""`sparse-lab bench train`: what its numbers are made of, what it refuses, and one small bench from end to end."""

from __future__ import annotations

import csv
import math
import time
from dataclasses import replace

import pytest

from sparse_lab.algorithms.dyrelu_phasing import beta
from sparse_lab.bench import together, train_table
from sparse_lab.bench.phases import phases
from sparse_lab.bench.together import Together, overlapped
from sparse_lab.bench.train import BARE, PLAIN, Pace, Settings, Stopwatch, candidates, request
from sparse_lab.cli.bench import main
from sparse_lab.errors import UserError
from sparse_lab.host.machine import usable_cores
from sparse_lab.methods.dyrelu import phasing_steps
from sparse_lab.methods.recipes import clock_of

TINY = Settings(
    model="vgg16",
    methods=("dense", "static"),
    sparsity=90.0,
    device="cpu",
    compile="off",
    deterministic=False,
    batch=4,
    width=0.0625,
    steps=2,
    epochs=2,
    repeats=1,
    workers=0,
)


def test_throughput_counts_the_time_in_which_all_train():
    """Two processes, 100 images an epoch: one from 0 to 4 in epochs of 1 s, one from 1 to 5 in epochs of 2 s. Between 1
    and 4 the first makes 300 images, the second 150.
    """
    first = [[float(second), second + 1.0] for second in range(4)]
    second = [[1.0, 3.0], [3.0, 5.0]]
    assert overlapped([first, second], 100) == pytest.approx(450 / 3)


def test_runs_at_once_are_set_against_one_within_a_repeat():
    said = str(Together(4, 1, [300.0, 400.0, 380.0], [100.0, 100.0, 100.0]))
    assert said == (
        "4 runs at once, 1 thread each: 380 images/s in all, 3.80 times one run with 1 thread (100), 0.95 a run"
    )


def test_the_table_holds_medians_and_ratios_within_a_repeat():
    found = {
        "dense": [Pace([90.0, 100.0, 110.0], [50.0], 7.0), Pace([200.0], [150.0], 9.0)],
        "rigl": [Pace([80.0], [40.0], 8.0), Pace([100.0], [90.0], 8.0)],
        BARE: [Pace([125.0]), Pace([200.0])],
        PLAIN: [Pace([25.0]), Pace([50.0])],
    }
    dense, rigl, bare, plain = train_table.rows(found)
    assert dense == ["dense", "105", "90", "200", "100", "0.900", "4.000", "", "9"]  # 100/125, 200/200; 100/25, 200/50
    assert rigl == ["rigl", "90", "80", "100", "65", "0.570", "2.600", "+62.5%", "8"]  # 100/80, 200/100
    assert bare[5:8] == ["1.000", "4.500", ""] and plain[5:8] == ["0.225", "1.000", ""]
    lines = train_table.text(found).splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1


def test_only_methods_that_train_from_scratch_are_timed(tmp_path):
    with pytest.raises(UserError, match="bench train: method oneshot starts from another run"):
        request(TINY, "oneshot", tmp_path)


EAST = replace(TINY, model="resnet34", sparsity=99.0, width=0.25, options=("training=east",))


def test_east_has_four_phases(tmp_path):
    """250 epochs: DyReLU for 124, in cycles of 50 and 100. With ReLU the densest moment is where DyReLU goes, at 74 of
    the 100 epochs of the second cycle: 1 + 2 (1 - cos(2 pi 0.74)) / 2 times the target's density.
    """
    found = phases(request(EAST, "east", tmp_path))
    densest = 1.0 - math.cos(2.0 * math.pi * 0.74)
    assert list(found) == [
        "DyReLU, shared weights, 99%",
        "DyReLU, shared weights, 97%",
        f"ReLU, shared weights, {100 - (1 + densest):.6g}%",
        "ReLU, shared weights, 99%",
    ]
    for number, (name, words) in enumerate(found.items()):
        config = request(EAST, "east", tmp_path, words)
        assert config.training.epochs == 4, "one more, in which DyReLU goes"
        assert (config.method.dyrelu is not None) is (number < 2) and config.method.cycles is None
        assert f"{100 * config.sparsity.target:.6g}%" == name.rpartition(" ")[2]
        assert config.method.drop_and_grow.update_every == (4000 if number == 3 else 100)
        if number < 2:
            clock = clock_of(config, EAST.steps)
            assert [beta(step, *phasing_steps(config, clock)) for step in range(3 * EAST.steps)] == [1.0] * 6


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("method.dyrelu=null",), ["shared weights, 97%", "shared weights, 99%"]),
        (("method.cycles=null", "method.sharing=null"), ["DyReLU, 99%", "ReLU, 99%"]),
        (("method.cycles=null", "method.dyrelu=null"), []),
    ],
)
def test_a_method_without_some_of_easts_parts_has_fewer_phases(words, names, tmp_path):
    assert list(phases(request(replace(EAST, options=(*EAST.options, *words)), "east", tmp_path))) == names


def test_each_phase_is_a_candidate():
    names = [name for name, _ in candidates(replace(EAST, methods=("rigl", "east")), lambda line: None)]
    assert len(names) == 1 + 4 + 2 and names[0] == "rigl" and names[1] == "east: DyReLU, shared weights, 99%"


@pytest.mark.parametrize("words", [["--steps", "0"], ["--epochs", "0"], ["--workers", "-1"], ["--together", "-2"]])
def test_numbers_out_of_range_are_refused(words):
    with pytest.raises(UserError, match=f"bench train: {words[0]} must be at least"):
        main(["train", *words])


@pytest.mark.full
def test_a_bench_from_end_to_end(tmp_path, capsys):
    """Whole runs and both loops; no rate is above what fits into the time that the bench took."""
    file = tmp_path / "train.csv"
    numbers = ["--batch", "4", "--width", "0.0625", "--steps", "2", "--epochs", "2", "--repeats", "1", "--workers", "0"]
    words = ["--method", "dense", "static", "--sparsity", "90", "--device", "cpu", "--csv", str(file)]
    start = time.perf_counter()
    assert main(["train", *numbers, *words]) == 0
    took = time.perf_counter() - start
    with open(file, encoding="utf-8") as opened:
        rows = {row["candidate"]: row for row in csv.DictReader(opened)}
    assert list(rows) == ["dense", "static", BARE, PLAIN]
    for row in rows.values():
        assert float(row["lowest"]) >= 4 * 2 / took - 1
        assert float(row["peak MiB"]) > 0 and row["model"] == "vgg16" and row["sparsity"] == "90"
    assert "x plain" in capsys.readouterr().out


@pytest.mark.full
def test_several_runs_at_once(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = together.measure(replace(TINY, together=2), "static", lambda line: None)
    assert found is not None and found.threads == max(1, usable_cores() // 2)
    assert len(found.rates) == len(found.alone) == 1 and min(*found.rates, *found.alone) > 0


def test_the_first_epoch_and_those_after_the_timed_ones_are_not_timed():
    class Trainer:
        current_epoch = 0
        is_last_batch = True

    class Module:
        from torch import device

        device = device("cpu")

    watch, trainer, ready = Stopwatch(8, 2, lambda: ready.append(trainer.current_epoch)), Trainer(), []
    for epoch in range(4):
        trainer.current_epoch = epoch
        watch.on_train_epoch_start(trainer, Module)
        watch.on_train_batch_end(trainer, Module, None, None, 0)
    watch.on_train_end(trainer, Module)
    assert len(watch.pace.steps) == len(watch.pace.whole) == len(watch.spans) == 2 and ready == [1]
