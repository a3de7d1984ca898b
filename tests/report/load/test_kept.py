"""Runs that a table keeps in records.jsonl are reported on as if they lay in folders of their own."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparse_lab.cli.main import main
from sparse_lab.records.atomic_io import CHECKSUM, checksum, write_record
from sparse_lab.records.kept import FILE, keep_runs
from sparse_lab.report import distinct, read
from sparse_lab.report.load.traces import traces

Make = Callable[..., Path]
STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture
def trees(make_many: Callable[..., int], tmp_path: Path) -> tuple[Path, Path]:
    """The same finished runs twice: in folders, and in a records.jsonl; each tree with a table.yaml."""
    folders, kept = tmp_path / "folders", tmp_path / "kept"
    count = make_many(folders / "runs", methods=1, shares=1, seeds=2)
    for run in (folders / "runs").iterdir():
        (run / "config.yaml").write_text("seed: 1\n")
    added, refused = keep_runs((folders / "runs").iterdir(), kept)
    assert len(added) == count and not refused
    for tree in (folders, kept):
        (tree / "table.yaml").write_text("title: Twice\n")
    return folders, kept


def test_the_report_is_the_same_and_names_its_plots(
    trees: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for tree in trees:
        assert main(["report", str(tree)]) == 0
        said.append(capsys.readouterr())
    assert said[0].out.replace(str(trees[0]), "") == said[1].out.replace(str(trees[1]), "")
    assert not said[0].err and not said[1].err
    made = sorted(path.name for path in trees[0].iterdir() if path.is_file())
    assert {"updates.png", "layers.png", "activations.png", "gradients.png", "curves.png"} <= set(made)
    for name in made:
        if not name.endswith(".pdf"):
            assert (trees[0] / name).read_bytes() == (trees[1] / name).read_bytes(), name
    # plots are made again from the records, and a checkout may lack them: a table's page shows none that is not there
    page = (trees[1] / "report.md").read_text()
    assert "![" not in page and "- `updates.png`: The masks while training. Lines are means" in page
    assert (trees[1] / "report.html").read_text().count('src="data:image/png;base64,') >= 5


def test_what_lies_in_both_counts_once(trees: tuple[Path, Path], tmp_path: Path) -> None:
    records = read(*trees)
    counted, notes = distinct(records.results)
    assert len(records.results) == 4 and len(counted) == 2 and not records.warnings
    assert notes == ["2 copies of runs were left out (same config, seed and accuracy)"]
    # one that differs is said by its place, as between folders
    place = next(path for path in (trees[0] / "runs").iterdir() if "seed0" in path.name)
    plain = json.loads((place / "result.json").read_text())
    write_record(place / "result.json", {**plain, "test_accuracy": 1.0})
    _, notes = distinct(read(*trees).results)
    assert len(notes) == 2 and str(place) in notes[0] and str(trees[1] / FILE / place.name) in notes[0]


def test_status_lists_them(trees: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(trees[0] / "runs")
    assert main(["status", str(trees[1])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "2 runs: 2 done" and all(" done  22/22 " in line for line in lines[:-1])


def sealed(**parts: Any) -> str:
    plain = {"name": "x", "result": {}, "status": {}, "config": {}, "traces": {}, **parts}
    return json.dumps({**plain, CHECKSUM: checksum(plain)})


def deep(levels: int) -> Any:
    plain: Any = 0
    for _ in range(levels):
        plain = {"a": [plain]}
    return plain


def hostile(record: dict[str, Any]) -> list[str]:
    """Lines that are sound JSON with a sound checksum, and say what no run says."""
    names = ["", "/", "..", "a\0b", "\x1b[31mred", "a\nb", "x" * 10**5, "\ud800", "\u202eevil", "<script>"]
    odd = [None, [], "text", float("nan"), 10**400, -1, True, deep(40)]
    results = [{**record, key: value} for key in ("test_accuracy", "seed", "cell", "layers", "config") for value in odd]
    results += [{}, {**record, CHECKSUM: "0"}, {**record, "cell": "deep", "config": deep(150)}]
    steps = [{"epoch": value, "step": value, "kept": value, "total": value, "layers": {"a": value}} for value in odd]
    rows = [{"updates": steps}, {"metrics": steps}, {"gradients": [{"epoch": 1, "parts": step} for step in steps]}]
    rows += [{"activations": steps}, {"activations": [{"epoch": 1, "beta": "x", "layers": {}}]}, {"other": steps}]
    lines = [sealed(name=name, result={**record, "cell": f"name{number}"}) for number, name in enumerate(names)]
    lines += [sealed(name=f"result{number}", result=result) for number, result in enumerate(results)]
    lines += [sealed(result={**record, "cell": f"t{number}"}, traces=one) for number, one in enumerate(rows)]
    lines += [sealed(result=record, status={"state": value, "updated": value, "epoch": value}) for value in odd]
    return [*lines, lines[0], lines[0], "{", "\x1b[31m", '{"name": "\x07"}', "9" * 5000, "[" * 10**5, "null"]


@pytest.mark.full
def test_no_line_breaks_a_report(trees: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = trees[1] / FILE
    record = json.loads(path.read_text().split("\n")[0])["result"]
    lines = hostile(record)
    path.write_text("\n".join(lines) + "\n" + path.read_text())
    assert main(["report", str(trees[1])]) == 0
    assert main(["status", str(trees[1])]) == 0
    said = capsys.readouterr()
    assert not STEERING.search(said.out) and not STEERING.search(said.err)
    assert f"warning: {path}, line {len(lines)}: cannot be read" in said.err and "Traceback" not in said.err
    for name in ("report.md", "report.html", "table.tex", "results.csv", "levels.csv"):
        assert not STEERING.search((trees[1] / name).read_text(encoding="utf-8")), name


def test_rows_that_say_nothing_are_left_out_with_a_warning_a_file(make_run: Make, tmp_path: Path) -> None:
    record = json.loads((make_run() / "result.json").read_text())
    updates = [{"epoch": 1.0, "step": 3, "kept": 5, "total": 50}, {"epoch": "x"}]
    metrics = [{"epoch": 1, "train_loss": 2.5, "validation_accuracy": ""}, {"epoch": "", "train_loss": 1.5}]
    (tmp_path / "kept").mkdir()
    line = sealed(name="run", result=record, traces={"updates": updates, "metrics": metrics})
    (tmp_path / "kept" / FILE).write_text(line)
    [trace], warnings = traces(read(tmp_path / "kept").results)
    assert trace.changes == 2 and not trace.by_layer and not trace.phased and not warnings
    assert trace.has("updates.jsonl") and trace.has("metrics.csv") and not trace.has("gradients.jsonl")
    assert list(trace.updates["density"]) == [0.1] and list(trace.metrics["train_loss"]) == [2.5]
    assert trace.metrics["validation_accuracy"].isna().all() and not trace.moments and trace.gradients.empty
    place = tmp_path / "kept" / FILE / "run"
    assert warnings == [
        f"{place / name}: 1 of 2 lines cannot be read and are left out" for name in ("updates.jsonl", "metrics.csv")
    ]
