from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sparse_lab.report import read
from sparse_lab.report.load.traces import Trace, by_epoch, cells, course, spread, traces

Make = Callable[..., Path]
Update = Callable[..., dict[str, Any]]
Put = Callable[..., None]


def traced(root: Path) -> list[Trace]:
    found, warnings = read_all(root)
    assert not warnings
    return found


def read_all(root: Path) -> tuple[list[Trace], list[str]]:
    """Every trace with all its files read, and the warnings."""
    found, warnings = traces(read(root).results)
    for trace in found:
        assert all(part is not None for part in (trace.updates, trace.moments, trace.gradients, trace.metrics))
    return found, warnings


def test_runs_without_files_leave_nothing(make_run: Make, tmp_path: Path) -> None:
    make_run()
    [trace] = traced(tmp_path)
    assert trace.changes == len(trace.updates) == len(trace.moments) == len(trace.gradients) == len(trace.metrics) == 0
    assert not trace.by_layer and trace.layers is None and not trace.phased and not trace.densities
    assert not trace.has("updates.jsonl")


def test_a_file_is_read_when_it_is_asked_for(make_run: Make, put_lines: Put, update: Update, tmp_path: Path) -> None:
    put_lines(make_run(), "updates", [update(0), update(1)], torn="{")
    [trace], warnings = traces(read(tmp_path).results)
    assert trace.changes == 3 and not warnings
    assert len(trace.updates) == 2 and trace.layers is None and trace.updates is trace.updates
    assert len(warnings) == 1


def test_an_update_is_read_as_shares(make_run: Make, put_lines: Put, update: Update, tmp_path: Path) -> None:
    rows = [update(0.0, 100), update(1.5, 300, asked=200, effective=75, live_logits=4, explored=None)]
    put_lines(make_run(method="east"), "updates", rows)
    [trace] = traced(tmp_path)
    assert trace.place == ("vgg16", "cifar10", 0.99) and trace.label == "east" and trace.end == 160
    table = trace.updates
    assert list(table["epoch"]) == [0.0, 1.5]
    assert list(table["density"]) == [0.01, 0.03] and list(table["asked"]) == [0.01, 0.02]
    assert list(table["effective"]) == [0.6, 0.25] and list(table["live"]) == [1.0, 0.4]
    assert list(table["dead"]) == [0.1, 0.1]
    assert table["explored"][0] == 0.02 and math.isnan(table["explored"][1])
    assert trace.layers is None and not trace.by_layer


@pytest.mark.parametrize(
    "torn", ['{"step": 9, "epo', "[1, 2]", "null", "\x00", "[" * 100_000, '{"step": 1, "epoch": "two", "kept": 1}']
)
def test_lines_that_cannot_be_read_are_one_warning_a_file(
    make_run: Make, put_lines: Put, update: Update, tmp_path: Path, torn: str
) -> None:
    folder = make_run()
    put_lines(folder, "updates", [update(0), update(1)], torn=f"{torn}\n{torn}")
    put_lines(folder, "activations", [{"epoch": 1, "beta": None, "layers": {"a": 0.5}}], torn=torn)
    put_lines(folder, "gradients", [{"epoch": 1, "parts": {"biases": 0.5}}])
    [trace], warnings = read_all(tmp_path)
    assert len(trace.updates) == 2 and len(trace.moments) == 1 and len(trace.gradients) == 1
    assert [line.split(": ")[1].split(" lines")[0] for line in warnings] == ["2 of 4", "1 of 2"]
    assert str(folder / "updates.jsonl") in warnings[0] and str(folder / "activations.jsonl") in warnings[1]
    assert not any("\n" in line for line in warnings)


def test_a_file_that_cannot_be_opened_is_one_warning(make_run: Make, tmp_path: Path) -> None:
    (make_run() / "gradients.jsonl").mkdir()
    [trace], warnings = read_all(tmp_path)
    assert trace.gradients.empty and len(warnings) == 1 and "gradients.jsonl" in warnings[0]


@pytest.mark.parametrize(
    "wrong",
    [{"kept": -1}, {"kept": 10_001}, {"total": 0}, {"epoch": -1}, {"epoch": 1e300}, {"step": None}, {"total": "1"}],
)
def test_an_update_without_sense_is_left_out(
    make_run: Make, put_lines: Put, update: Update, tmp_path: Path, wrong: dict[str, object]
) -> None:
    put_lines(make_run(), "updates", [update(0), {**update(1), **wrong}, update(2)])
    [trace], warnings = read_all(tmp_path)
    assert list(trace.updates["epoch"]) == [0, 2] and len(warnings) == 1 and "1 of 3" in warnings[0]


def test_what_another_version_adds_or_leaves_out_does_no_harm(make_run: Make, put_lines: Put, tmp_path: Path) -> None:
    put_lines(make_run(), "updates", [{"step": 3, "epoch": 1, "kept": 5, "total": 50, "new": [1], "explored": 10**400}])
    [trace] = traced(tmp_path)
    assert trace.updates["density"][0] == 0.1
    assert trace.updates[["asked", "effective", "live", "dead", "explored"]].isna().all(axis=None)


def test_a_course_is_the_mean_of_what_each_seed_holds(
    make_run: Make, put_lines: Put, update: Update, tmp_path: Path
) -> None:
    put_lines(make_run(seed=1), "updates", [update(0, 100), update(2, 300)])
    put_lines(make_run(seed=2), "updates", [update(1, 200), update(3, 500)])
    [seeds] = cells(traced(tmp_path))
    line = course(seeds, "density", 10.0)
    assert list(line.epochs) == [0, 1, 2, 3, 10]
    np.testing.assert_allclose(line.mean, [0.01, 0.015, 0.025, 0.04, 0.04])
    np.testing.assert_allclose(line.low, [0.01, 0.01, 0.02, 0.03, 0.03])
    np.testing.assert_allclose(line.high, [0.01, 0.02, 0.03, 0.05, 0.05])
    assert list(course(seeds, "density").epochs) == [0, 1, 2, 3]


def test_one_seed_and_no_value_at_all(make_run: Make, put_lines: Put, update: Update, tmp_path: Path) -> None:
    put_lines(make_run(), "updates", [update(0, explored=None), update(2, explored=None)])
    [trace] = traced(tmp_path)
    one = course([trace], "live", 5.0)
    assert list(one.mean) == list(one.low) == list(one.high) == [1, 1, 1]
    assert np.isnan(course([trace], "explored", 5.0).mean).all()


def test_updates_that_stand_out_of_order_are_sorted(
    make_run: Make, put_lines: Put, update: Update, tmp_path: Path
) -> None:
    put_lines(make_run(), "updates", [update(2, 300), update(0, 100), update(1, 200)])
    [trace] = traced(tmp_path)
    assert list(trace.updates["density"]) == [0.01, 0.02, 0.03]


def test_layers_are_tables_in_the_order_of_the_network(
    make_run: Make, put_lines: Put, update: Update, tmp_path: Path
) -> None:
    first = {"stem": {"kept": 4, "total": 8, "effective": 2}, "fc": {"kept": 1, "total": 100, "effective": 0}}
    second = {"stem": {"kept": 8, "total": 8, "effective": 8}, "fc": "damaged"}
    put_lines(make_run(), "updates", [update(0, layers=first), update(1), update(2, layers=second)])
    [trace] = traced(tmp_path)
    assert trace.layers is not None and trace.layers.names == ["stem", "fc"]
    assert list(trace.layers.epochs) == [0, 2]
    np.testing.assert_array_equal(trace.layers.density, [[0.5, 1.0], [0.01, np.nan]])
    np.testing.assert_array_equal(trace.layers.effective, [[0.5, 1.0], [0.0, np.nan]])


def test_densities_are_what_the_record_says_of_its_layers(make_run: Make, tmp_path: Path) -> None:
    layers = [{"name": "stem", "kept": 4, "total": 8}, {"name": "fc", "kept": -1, "total": 9}, "damaged"]
    make_run(layers=layers)
    make_run(seed=2, layers={"stem": 1})
    first, second = traced(tmp_path)
    assert first.densities == {"stem": 0.5} and second.densities == {}


def test_metrics_are_the_last_row_of_every_epoch(make_run: Make, tmp_path: Path) -> None:
    text = "epoch,round,train_loss,validation_accuracy\n2,1,1.5,40\n1,1,2.5,30\n2,1,0.5,50\n3,1,nan,\n"
    (make_run() / "metrics.csv").write_text(text)
    [trace] = traced(tmp_path)
    assert list(trace.metrics.index) == [1, 2, 3]
    np.testing.assert_array_equal(trace.metrics["train_loss"], [2.5, 0.5, np.nan])
    np.testing.assert_array_equal(trace.metrics["validation_accuracy"], [30, 50, np.nan])


@pytest.mark.parametrize("torn", [b"2,0.5", b"x,1,2", b"\x00\xff", b"1e300,1,2", b'2,"a\nb'])
def test_damaged_metrics_never_stop_a_report(make_run: Make, tmp_path: Path, torn: bytes) -> None:
    path = make_run() / "metrics.csv"
    path.write_bytes(b"epoch,train_loss,validation_accuracy\n1,2.5,30\n" + torn)
    [trace], warnings = read_all(tmp_path)
    assert trace.metrics["validation_accuracy"][1] == 30 and len(trace.metrics) in (1, 2)
    assert all(str(path) in line for line in warnings) and len(warnings) <= 1


def test_means_by_epoch_leave_out_what_a_seed_lacks() -> None:
    tables = [pd.DataFrame({"a": [1.0, 3.0]}, index=[1, 2]), pd.DataFrame({"a": [5.0, math.nan]}, index=[2, 4])]
    line = by_epoch(tables, "a")
    np.testing.assert_array_equal(line.epochs, [1, 2, 4])
    np.testing.assert_array_equal(line.mean, [1, 4, np.nan])
    np.testing.assert_array_equal(line.low, [1, 3, np.nan])
    np.testing.assert_array_equal(line.high, [1, 5, np.nan])


def test_a_spread_agrees_with_numpys() -> None:
    values = np.random.default_rng(0).normal(size=(5, 40))
    values[values > 1] = np.nan
    with np.errstate(all="raise"):
        mean, low, high = spread(values)
    np.testing.assert_allclose(mean, np.nanmean(values, axis=0))
    np.testing.assert_array_equal(low, np.nanmin(values, axis=0))
    np.testing.assert_array_equal(high, np.nanmax(values, axis=0))


def moments(
    betas: list[float | None], make_run: Make, put_lines: Put, root: Path
) -> dict[str, tuple[float, dict[str, float]]]:
    rows = [{"epoch": i + 1, "beta": beta, "layers": {"a": (i + 1) / 100}} for i, beta in enumerate(betas)]
    put_lines(make_run(), "activations", rows)
    [trace] = traced(root)
    return {moment.phase: (moment.epoch, moment.shares) for moment in trace.moments}


def test_phasing_is_shown_before_during_and_after(make_run: Make, put_lines: Put, tmp_path: Path) -> None:
    found = moments([1.0, 1.0, 0.75, 0.45, 0.2, 0.0, None, None], make_run, put_lines, tmp_path)
    assert found == {"before": (2, {"a": 0.02}), "during": (4, {"a": 0.04}), "after": (8, {"a": 0.08})}


def test_a_network_without_its_dyrelu_is_as_good_as_beta_0(make_run: Make, put_lines: Put, tmp_path: Path) -> None:
    found = moments([1.0, 1.0, None], make_run, put_lines, tmp_path)
    assert {phase: epoch for phase, (epoch, _) in found.items()} == {"before": 2, "during": 1, "after": 3}


@pytest.mark.parametrize("beta", [None, 1.0])
def test_without_phasing_first_middle_and_last_are_shown(
    make_run: Make, put_lines: Put, tmp_path: Path, beta: float | None
) -> None:
    found = moments([beta] * 9, make_run, put_lines, tmp_path)
    assert {phase: epoch for phase, (epoch, _) in found.items()} == {"first": 1, "middle": 5, "last": 9}


@pytest.mark.parametrize(("epochs", "phases"), [(1, ["last"]), (2, ["first", "last"])])
def test_a_short_run_shows_no_epoch_twice(
    make_run: Make, put_lines: Put, tmp_path: Path, epochs: int, phases: list[str]
) -> None:
    assert list(moments([None] * epochs, make_run, put_lines, tmp_path)) == phases


def test_senseless_activations_are_nan_or_left_out(make_run: Make, put_lines: Put, tmp_path: Path) -> None:
    rows = [
        {"epoch": 1, "beta": None, "layers": {"a": 1.5, "b": None, "c": 0.5}},
        {"epoch": 2, "beta": 7, "layers": {"a": 0.5}},
        {"epoch": 3, "beta": None, "layers": []},
    ]
    put_lines(make_run(), "activations", rows)
    [trace], [warning] = read_all(tmp_path)
    [moment] = trace.moments
    assert math.isnan(moment.shares["a"]) and math.isnan(moment.shares["b"]) and moment.shares["c"] == 0.5
    assert "2 of 3" in warning


def test_gradients_are_norms_by_part_and_epoch(make_run: Make, put_lines: Put, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"epoch": 2, "parts": {"live weights": 0.5, "biases": float("inf"), "unheard of": 1.0}},
        {"epoch": 1, "parts": {"live weights": 0.25, "biases": 0}},
    ]
    put_lines(make_run(), "gradients", rows)
    [trace] = traced(tmp_path)
    assert list(trace.gradients.index) == [1, 2]
    assert list(trace.gradients["live weights"]) == [0.25, 0.5]
    assert trace.gradients["biases"][1] == 0 and math.isnan(trace.gradients["biases"][2])
    assert trace.gradients["DyReLU"].isna().all() and "unheard of" not in trace.gradients


def test_only_the_run_that_counts_is_read(make_run: Make, put_lines: Put, update: Update, tmp_path: Path) -> None:
    old = make_run(folder="a", updated="2026-01-01T00:00:00+00:00")
    put_lines(old, "updates", [update(0), update(1)], torn="{")
    put_lines(make_run(folder="b", updated="2026-01-02T00:00:00+00:00"), "updates", [update(5)])
    [trace] = traced(tmp_path)
    assert list(trace.updates["epoch"]) == [5]


def test_an_update_that_says_nothing_of_paths_is_passed_over(
    make_run: Make, put_lines: Put, update: Update, tmp_path: Path
) -> None:
    """As on a GPU, where paths are looked at now and then: the last look holds, and density has all its points."""
    rows = [update(0), {key: value for key, value in update(1).items() if key != "effective"}, update(2)]
    put_lines(make_run(), "updates", rows)
    [seeds] = cells(traced(tmp_path))
    held = course(seeds, "effective")
    assert held.epochs.tolist() == [0.0, 2.0] and np.isfinite(held.mean).all()
    assert course(seeds, "density").epochs.tolist() == [0.0, 1.0, 2.0]
