"""The whole bench on narrow networks: what it prints and writes, and how it ends early."""

from __future__ import annotations

import csv

import pytest

from sparse_lab.bench import compute, memory, rounds
from sparse_lab.bench.cells import TRAINING, Cell, Measured
from sparse_lab.bench.roofline import Machine
from sparse_lab.cli.main import main

SMALL = ["--model", "vgg16", "--width", "0.0625", "--batch", "8", "--repeats", "1"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(rounds, "TURN", 0.0)
    monkeypatch.setattr(compute, "machine", lambda: Machine(1e11, 1e10))
    monkeypatch.setattr(
        memory, "peak", lambda model, width, images, pattern, storage: (100.0, 300.0 if pattern else 400.0)
    )


def _rows(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_the_csv_and_the_picture_hold_every_cell(tmp_path, capsys):
    asked = ["--sparsity", "90", "99", "--masks", "erk", "global", "--against"]
    assert main(["bench", *SMALL, *asked, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    rows = _rows(tmp_path / "compute.csv")
    # one dense and four sparse cells in training, and for each of two batches in inference
    assert len(rows) == 3 * 5
    for row in rows:
        assert float(row["min_ms"]) <= float(row["median_ms"]) <= float(row["max_ms"])
        assert row["torch"] and row["numba"] and row["machine"] and row["date"] and row["width"] == "0.0625"
        assert row["peak_gflop_per_s"] == "100" and row["peak_gb_per_s"] == "10"
        dense = next(
            one
            for one in rows
            if one["candidate"] == "dense" and (one["what"], one["batch"]) == (row["what"], row["batch"])
        )
        ratio = float(dense["median_ms"]) / float(row["median_ms"])
        assert float(row["times_dense_median"]) == pytest.approx(ratio, rel=1e-3)
    sparse = [row for row in rows if row["candidate"] == "sparse"]
    assert {(row["masks"], row["sparsity"]) for row in sparse} == {
        (m, s) for m in ("erk", "global") for s in ("90", "99")
    }
    for row in sparse:
        assert int(row["kept"]) == round((1 - float(row["sparsity"]) / 100) * int(row["weights"]))
        seconds = float(row["median_ms"]) / 1000
        assert float(row["gflop_per_s"]) == pytest.approx(2e-9 * int(row["macs"]) / seconds, rel=1e-3)
        bound = max(2 * int(row["macs"]) / 1e11, int(row["bytes"]) / 1e10)
        assert float(row["percent_of_bound"]) == pytest.approx(100 * bound / seconds, rel=1e-3)
        assert bool(row["share: weight gradient"]) == (row["what"] == TRAINING)
    peaks = {(row["candidate"], row["masks"], row["sparsity"]): row["peak_mib"] for row in rows if row["peak_mib"]}
    assert peaks == {("dense", "", ""): "400", ("sparse", "erk", "99"): "300"}
    assert (tmp_path / "compute.png").read_bytes().startswith(b"\x89PNG")
    for said in ("vgg16, training step, batch 8", "inference, batch 1", "break-even", "GFLOP/s", "forward convolution"):
        assert said in printed


def test_a_budget_that_is_over_leaves_a_table_and_says_what_is_missing(tmp_path, capsys, monkeypatch):
    class Late:
        """Time for three turns of training and none of inference."""

        def __init__(self, seconds, weights):
            self.turns = iter([False] * 3 + [True] * 99)

        def part(self):
            return lambda: next(self.turns)

    monkeypatch.setattr(compute, "Budget", Late)
    assert main(["bench", *SMALL, "--sparsity", "90", "99", "99.5", "--against", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    found = [(row["candidate"], row["sparsity"]) for row in _rows(tmp_path / "compute.csv")]
    assert found == [("dense", ""), ("sparse", "99.5"), ("sparse", "99")]
    missing = printed.partition("not measured")[2]
    assert "vgg16, training, batch 8: sparse, erk 90%" in missing
    assert "vgg16, inference, batch 1: sparse, synflow 90% 99% 99.5%" in missing


def test_ctrl_c_prints_and_writes_what_there_is(tmp_path, capsys, monkeypatch):
    def interrupted(settings, measured, say):
        measured.add(Cell("vgg16", TRAINING, 8, "dense"), 1, 0.5)
        measured.add(Cell("vgg16", TRAINING, 8, "sparse", "erk", 99.0), 1, 0.1)
        raise KeyboardInterrupt

    monkeypatch.setattr(compute, "collect", interrupted)
    assert main(["bench", *SMALL, "--sparsity", "99", "--out", str(tmp_path)]) == 130
    printed = capsys.readouterr().out
    assert "interrupted" in printed and "99%" in printed
    assert len(_rows(tmp_path / "compute.csv")) == 2 and (tmp_path / "compute.png").exists()


def test_an_error_does_not_lose_what_was_measured(tmp_path, monkeypatch):
    def broken(settings, measured: Measured, say):
        measured.add(Cell("vgg16", TRAINING, 8, "dense"), 1, 0.5)
        raise RuntimeError("a bug")

    monkeypatch.setattr(compute, "collect", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["bench", *SMALL, "--sparsity", "99", "--out", str(tmp_path)])
    assert len(_rows(tmp_path / "compute.csv")) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sparsity", "100"], "--sparsity must be in [0, 100)"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--minutes", "0"], "--minutes must be above 0"),
        (["--width", "9"], "width must be above 0"),
        (["--width", "0.0625", "--sparsity", "99.99"], "choose a lower --sparsity or a larger --width"),
        (["--out", "/proc/nowhere"], "choose another --out"),
    ],
)
def test_a_wrong_request_is_one_line(words, said, capsys):
    assert main(["bench", "compute", "--model", "vgg16", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_small_benches_print_shares_of_a_step(tmp_path, capsys):
    from sparse_lab.bench import interleaved

    times = interleaved.interleaved({"step": lambda: sum(range(20_000)), "part": lambda: sum(range(10_000))}, 3)
    assert {name: len(values) for name, values in times.items()} == {"step": 3, "part": 3}
    times = {"step": [2.0, 4.0], "part": [1.0, 1.0]}
    interleaved.show("some", times, dict.fromkeys(times, "step"))
    assert "0.3750" in capsys.readouterr().out  # the median of 1/2 and 1/4
    interleaved.save(tmp_path / "some.csv", times, dict.fromkeys(times, "step"))
    assert _rows(tmp_path / "some.csv")[1] == {
        "candidate": "part",
        "median_ms": "1000.0",
        "min_ms": "1000.0",
        "max_ms": "1000.0",
        "share_of_base": "0.375",
    }


@pytest.mark.parametrize(
    "bench",
    [pytest.param(name, marks=pytest.mark.nightly(long=True)) for name in ("selection", "masks")],
)
def test_the_small_benches_run(bench, tmp_path):
    assert main(["bench", bench, "--repeats", "1", "--csv", str(tmp_path / "out.csv")]) == 0
    assert len(_rows(tmp_path / "out.csv")) >= 4
