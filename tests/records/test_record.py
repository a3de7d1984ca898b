"""A result that says what no run can have measured is named and not counted, wherever records are read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sparse_lab.cli.main import main
from sparse_lab.records.atomic_io import CHECKSUM, checksum, write_record
from sparse_lab.records.kept import FILE, read_kept
from sparse_lab.records.record import BadRecord, check_result, is_name
from sparse_lab.sweep.done import State
from tests.records import hostile

SOUND = hostile.result("a", 0)
LEVEL = SOUND["levels"][0]
NONSENSE: list[tuple[str, dict[str, Any]]] = [
    ("sparsity", {"sparsity": 2.5}),
    ("sparsity", {"sparsity": -0.1}),
    ("sparsity", {"sparsity": 0.8}),  # not what 1 of 10 weights make
    ("sparsity", {"sparsity": math.nan}),
    ("sparsity", {"sparsity": 10**400}),
    ("sparsity", {"sparsity": "0.9"}),
    ("sparsity", {"kept": 2}),
    ("sparsity", {"total": 11}),
    ("sparsity_target", {"sparsity_target": 2.5}),
    ("sparsity_target", {"sparsity_target": True}),
    ("kept", {"kept": 11, "sparsity": None}),
    ("kept", {"kept": -1, "sparsity": None}),
    ("kept", {"kept": 1.0}),
    ("test_accuracy", {"test_accuracy": 7e9}),
    ("test_accuracy", {"test_accuracy": math.nan}),
    ("test_accuracy", {"test_accuracy": None}),
    ("validation_accuracy", {"validation_accuracy": 100.1}),
    ("validation_accuracy", {"validation_accuracy": math.inf}),
    ("seconds", {"seconds": -1.0}),
    ("sparsity' of level 2", {"levels": [LEVEL, {**LEVEL, "sparsity": 2.5}]}),
    ("test_accuracy' of level 1", {"levels": [{**LEVEL, "test_accuracy": 7e9}]}),
    ("validation_accuracy' of level 1", {"levels": [{**LEVEL, "validation_accuracy": math.nan}]}),
]


@pytest.mark.parametrize(("named", "changes"), NONSENSE)
def test_nonsense_is_named(named: str, changes: dict[str, Any]) -> None:
    check_result(SOUND)
    with pytest.raises(BadRecord, match=f"'{named}"):
        check_result({**SOUND, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"sparsity": None},
        {"sparsity": 0.9000004},  # as some wrote it, to six digits
        {"kept": 0, "total": 0},
        {"kept": 0, "sparsity": 1.0},
        {"kept": 10, "sparsity": 0.0},
        {"nonzero": None},
        {"nonzero": -1},  # shown as not known
        {"validation_accuracy": None, "levels": None},
        {"levels": [{"test_accuracy": None}]},
        {"method": "dense", "sparsity_target": None},
    ],
)
def test_what_is_missing_or_at_an_end_of_its_range_is_none(changes: dict[str, Any]) -> None:
    check_result({**SOUND, **changes})


def test_every_kept_record_of_this_repository_counts() -> None:
    tables = [path for path in Path("results").glob(f"*/{FILE}")]
    counted = 0
    for path in tables:
        kept, warnings = read_kept(path.parent)
        assert not warnings
        for one in kept:
            check_result(one.result)
            counted += 1
    assert counted >= 200


@pytest.mark.parametrize("changes", [{"sparsity": 2.5}, {"test_accuracy": 7e9}], ids=str)
@pytest.mark.parametrize("verb", ["status", "report", "collect", "table"])
def test_it_is_not_counted_anywhere(verb, changes, tmp_path, capsys):
    hostile.lay(tmp_path)
    place = tmp_path / hostile.RECORDS["result"]
    if verb == "table":
        place = tmp_path / hostile.TABLE / FILE
        line = json.loads(place.read_text())
        line["result"] |= changes
        line["result"].pop(CHECKSUM, None)
        place.write_text(json.dumps({**line, CHECKSUM: checksum(line)}))
        [warning] = State(place.parent).warnings
        assert hostile.NAMES[0] in warning and warning.endswith("it is not counted")
        assert not State(place.parent)._kept
        verb = "status"
    else:
        write_record(place, {**hostile.result(hostile.NAMES[0], 0), **changes})
        other = tmp_path / "runs" / "b"
        (tmp_path / "runs" / hostile.NAMES[2]).rename(other)
        write_record(other / "result.json", hostile.result("b", 1))
        (tmp_path / hostile.TABLE / FILE).unlink()
    words = {"report": ["--out", str(tmp_path / "out")], "collect": [str(tmp_path / "new")], "status": ["--once"]}
    assert main([verb, str(tmp_path), *words[verb]]) == 0
    out, err = capsys.readouterr()
    assert [hostile.NAMES[0] in line and "not counted" in line for line in err.splitlines()].count(True) == 1, err
    assert "Traceback" not in err
    if verb == "collect":
        assert [one.name for one in read_kept(tmp_path / "new")[0]] == ["b"] and "1 added" in out
    elif verb == "report":
        rows = (tmp_path / "out" / "results.csv").read_text()
        assert "2.5" not in rows and "7000000000" not in rows


def test_names_of_folders():
    assert all(is_name(one) for one in ("a", "vgg16-digits-dense-seed1-0123456789", "ü", "x" * 255))
    assert not any(is_name(one) for one in ("", ".", "..", "a/b", "/", "a\0", "x" * 256, "ü" * 128, None, 7, ["a"]))
