"""A table's finished runs in one file: everything comes back, nothing twice, and damage is said by its line."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lab.records.atomic_io import CHECKSUM, checksum, damaged, write_record
from sparse_lab.records.kept import FILE, Kept, keep_run, keep_runs, read_kept

METRICS = "epoch,train_loss,learning_rate,note\n1,2.301617830991745,0.1,\n2,0.5,1e-05,nan\n3,-0.0,0.10,007\n"
UPDATES = [
    {"step": 0, "epoch": 0.0, "kept": 14, "layers": {"a": {"kept": 3, "total": 9}, "b": {"kept": 11, "total": 90}}},
    {"step": 7, "epoch": 1 / 3, "kept": None, "layers": {"a": {"kept": 2, "total": 9}, "b": {"kept": 12, "total": 90}}},
]
ACTIVATIONS = [{"epoch": 1, "layers": {"x": 0.1}}, {"epoch": 2, "layers": {"x": 0.1, "y": 1e-17}}, {"epoch": 3}]
MakeRun = Callable[..., Path]


RESULT = {
    **{"cell": "c", "model": "vgg16", "dataset": "digits", "method": "dense", "seed": 1, "test_accuracy": 90.0},
    **{"kept": 10, "total": 10, "seconds": 1.0, "config": {}},
}


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes a finished run's folder; `outputs`: where its config says that it lies."""

    def make(name: str = "run", outputs: str = "outputs", **more: Any) -> Path:
        place = tmp_path / "runs" / name
        place.mkdir(parents=True)
        config = {"seed": 1, "paths": {"data": f"{outputs}/data", "outputs": outputs}, "lr": 1e-05, "none": None}
        result = {
            "name": name,
            "accuracy": 0.1 + 0.2,
            "command": f"sparse-lab paths.outputs={outputs}",
            **RESULT,
            **more,
        }
        (place / "config.yaml").write_text(yaml.safe_dump(config))
        (place / "status.json").write_text(json.dumps({"state": "done", "error": None, "where": f"{outputs}/data/x"}))
        (place / "result.json").write_text(json.dumps({**result, CHECKSUM: checksum(result)}, indent=2))
        (place / "metrics.csv").write_text(METRICS)
        for kind, rows in (("updates", UPDATES), ("activations", ACTIVATIONS)):
            (place / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return place

    return make


def one(folder: Path) -> Kept:
    found, warnings = read_kept(folder)
    assert not warnings and len(found) == 1
    return found[0]


def csv_of(rows: list[dict[str, Any]]) -> str:
    """The rows as metrics.csv; a number as JSON writes it."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows([cell if isinstance(cell, str) else json.dumps(cell) for cell in row.values()] for row in rows)
    return file.getvalue()


def test_everything_comes_back_as_it_was(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(large=2**70, text='"\u2028\\ \n', deep=[[{}], {}])
    keep_run(run, tmp_path / "new" / "table")
    kept = one(tmp_path / "new" / "table")
    assert kept.name == "run" and kept.result == without_seal(json.loads((run / "result.json").read_text()))
    assert kept.status == json.loads((run / "status.json").read_text())
    assert kept.config == yaml.safe_load((run / "config.yaml").read_text())
    assert csv_of(kept.traces["metrics"]) == METRICS
    assert [type(row["train_loss"]) for row in kept.traces["metrics"]] == [float] * 3
    for kind in ("updates", "activations"):  # to the letter, the order of keys included
        lines = "".join(json.dumps(row) + "\n" for row in kept.traces[kind])
        assert lines == (run / f"{kind}.jsonl").read_text()
    assert kept.traces.keys() == {"metrics", "updates", "activations"}
    [line] = (tmp_path / "new" / "table" / FILE).read_text().splitlines()
    plain = json.loads(line)
    assert plain["traces"]["updates"]["layers"]["b"]["kept"] == [11, 12]  # in columns, as what it is for is said there
    assert CHECKSUM in plain and not damaged(plain)


def without_seal(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != CHECKSUM}


plain = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.none() | st.text("aé\u2028", max_size=2)
keys = st.sampled_from(["a", "b", "c"])
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=2), max_leaves=5
)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.dictionaries(keys, values, max_size=3), max_size=4),
    cells=st.lists(st.text('0.-+e1x \n,"', max_size=5), max_size=5),
)
def test_whatever_rows_and_cells_hold(
    rows: list[dict[str, Any]], cells: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("run")
    (place / "status.json").write_text('{"state": "done"}')
    write_record(place / "result.json", {"name": "run", **RESULT})
    (place / "config.yaml").write_text("{}")
    (place / "updates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(place / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerows([["epoch", "cell"], *([number, cell] for number, cell in enumerate(cells))])
    keep_run(place, place)
    traces = one(place).traces
    assert [json.dumps(row) for row in traces["updates"]] == [json.dumps(row) for row in rows]
    back = [row["cell"] if isinstance(row["cell"], str) else json.dumps(row["cell"]) for row in traces["metrics"]]
    assert back == cells


def test_folders_of_one_machine_become_neutral_and_nothing_else(make_run: MakeRun, tmp_path: Path) -> None:
    keep_run(make_run(outputs="/own place/of mine"), tmp_path)
    kept = one(tmp_path)
    assert kept.config["paths"] == {"data": "DATA", "outputs": "OUTPUTS"} and kept.status["where"] == "DATA/x"
    assert kept.result["command"] == "sparse-lab paths.outputs=OUTPUTS" and kept.result["accuracy"] == 0.1 + 0.2
    assert not damaged(kept.result) and "mine" not in (tmp_path / FILE).read_text()


def test_the_order_does_not_matter_and_nothing_is_there_twice(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run(f"run-{number}", seed=number) for number in range(6)]
    assert keep_runs(runs, tmp_path / "a") == ([run.name for run in runs], [])
    random.Random(0).shuffle(runs)
    for run in runs:
        keep_run(run, tmp_path / "b")
    before = (tmp_path / "a" / FILE).read_bytes()
    assert (tmp_path / "b" / FILE).read_bytes() == before
    result = json.loads((runs[0] / "result.json").read_text())
    write_record(runs[0] / "result.json", {**result, "other": "result"})
    assert keep_runs(runs, tmp_path / "a") == ([], [])
    assert (tmp_path / "a" / FILE).read_bytes() == before


def test_several_processes_lose_nothing(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run(f"run-{number:02d}", seed=number) for number in range(24)]
    context = multiprocessing.get_context("fork")
    shares = [context.Process(target=_keep, args=(runs[start::4], tmp_path)) for start in range(4)]
    for share in shares:
        share.start()
    for share in shares:
        share.join(60)
    found, warnings = read_kept(tmp_path)
    assert [kept.name for kept in found] == [run.name for run in runs] and not warnings


def _keep(runs: list[Path], folder: Path) -> None:
    for run in runs:
        keep_run(run, folder)


DAMAGED = {
    "result.json": [b"", b"{", b"[]", b'{"a": NaN}', b"\xff", b"[" * 10**5, b'{"a": 1, "checksum": "0"}'],
    "status.json": [
        b'{"state": "done", "a":' + b'{"a":' * 600 + b"1" + b"}" * 601,
        b'"done"',
        b'{"state": "done", "epoch": Infinity}',
    ],
    "config.yaml": [b"a: [", b"- 1", b"\x00", b"seed: .inf"],
    "metrics.csv": [b"epoch,loss\n1\n", b"epoch,loss\n1,2,3\n", b"\xff"],
    "updates.jsonl": [b'{"a": 1}\n{"a"', b"[1]\n", b'{"a": NaN}\n', b"\xff\n"],
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name, list_ in DAMAGED.items() for content in list_])
def test_what_is_damaged_is_not_kept(name: str, content: bytes, make_run: MakeRun, tmp_path: Path) -> None:
    keep_run(make_run("whole"), tmp_path)
    before = (tmp_path / FILE).read_bytes()
    run = make_run("torn")
    (run / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"torn.*(damaged|cannot be read|cannot be kept)"):
        keep_run(run, tmp_path)
    assert (tmp_path / FILE).read_bytes() == before and not list(tmp_path.glob("*.tmp"))
    added, [error] = keep_runs([make_run("another"), run], tmp_path)  # the others are kept all the same
    assert added == ["another"] and "torn" in str(error)
    assert [kept.name for kept in read_kept(tmp_path)[0]] == ["another", "whole"]


@pytest.mark.parametrize("name", ["result.json", "status.json", "config.yaml", "metrics.csv"])
def test_what_is_missing_is_an_error(name: str, make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    (run / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        keep_run(run, tmp_path)


def sealed(**changes: Any) -> bytes:
    plain = {"name": "x", "result": {}, "status": {}, "config": {}, "traces": {}} | changes
    plain = {key: value for key, value in plain.items() if value is not ...}
    return json.dumps({**plain, CHECKSUM: checksum(plain)}).encode()


HOSTILE = [
    b"nonsense",
    b"[]",
    b"{}",
    b"\xff\xfe{}",
    b"[" * 10**6,
    b'{"a":' * 10**5,
    b"9" * 10**5,
    sealed().replace(b'"x"', b'"y"'),
    sealed()[:-1],
    sealed().replace(b"checksum", b"checksun"),
    sealed(name=7),
    sealed(result=[]),
    sealed(status=None),
    sealed(config=...),
    sealed(more=1),
    sealed(traces={"updates": 7}),
    sealed(traces={"updates": [7]}),
    sealed(traces={"updates": {"a": [1], "b": [1, 2]}}),
    sealed(traces={"updates": {"a": "ab"}}),
    sealed(traces={"updates": {}}),
]


def test_each_hostile_line_is_a_warning_and_the_others_count(make_run: MakeRun, tmp_path: Path) -> None:
    keep_run(make_run("a"), tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(b"\n".join(HOSTILE) + b"\n\n" + whole)
    found, warnings = read_kept(tmp_path)
    assert [kept.name for kept in found] == ["a"] and len(warnings) == len(HOSTILE)
    for number, warning in enumerate(warnings, 1):
        assert warning.startswith(f"{tmp_path / FILE}, line {number}: ") and len(warning.splitlines()) == 1
    assert sum("checksum is wrong" in warning for warning in warnings) == 1
    # what is added does not take away what cannot be read
    keep_run(make_run("b"), tmp_path)
    again, warnings = read_kept(tmp_path)
    assert [kept.name for kept in again] == ["a", "b"] and len(warnings) == len(HOSTILE)


def test_a_changed_digit_is_damage(make_run: MakeRun, tmp_path: Path) -> None:
    keep_run(make_run(), tmp_path)
    text = (tmp_path / FILE).read_text()
    assert text.count("2.301617830991745") == 1
    (tmp_path / FILE).write_text(text.replace("2.301617830991745", "2.301617830991746"))
    found, [warning] = read_kept(tmp_path)
    assert not found and "checksum is wrong" in warning


def test_no_file_is_no_record_and_a_folder_is_a_warning(tmp_path: Path) -> None:
    assert read_kept(tmp_path) == ([], [])
    (tmp_path / FILE).mkdir()
    found, [warning] = read_kept(tmp_path)
    assert not found and warning.startswith(f"{tmp_path / FILE}: cannot be read (")
