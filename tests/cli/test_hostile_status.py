"""`sparse-lab status` on outputs in which somebody else has left or changed files: no traceback, no waiting, a line for
each file that does not count, and the rest of the table.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_lab.cli.main import main
from tests.records import hostile

SECONDS = 5
NIGHT = "NIGHT" in os.environ
# files that `status` reads, and what a table may be: a file without a line
CASES = [
    (file, what)
    for file in (*hostile.RECORDS, "table")
    for what in (*hostile.contents(), *hostile.PLACES)
    if (file, what) not in {("table", "empty"), ("table", "blank")}
]


@contextmanager
def quick() -> Iterator[None]:
    """Fails a test that waits, for a pipe or in a loop."""

    def ring(*_: object) -> None:
        raise AssertionError(f"it takes more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def status(root: Path) -> tuple[int, str, str]:
        with quick():
            code = main(["status", str(root), "--once"])
        return code, *capsys.readouterr()

    return status


@pytest.mark.every(4)
@pytest.mark.parametrize(("file", "what"), CASES)
def test_what_is_no_record_is_named_once_and_the_rest_is_shown(file, what, tmp_path, say):
    hostile.lay(tmp_path)
    hostile.put(tmp_path / hostile.FILES[file], what)
    code, out, err = say(tmp_path)
    assert code == 0
    [line] = [line for line in err.splitlines() if str(tmp_path / hostile.FILES[file]) in line]
    assert line.endswith(("not counted", "is left out")) and len(line) < 400
    assert len(err.splitlines()) == 1, err
    others = [name for name in hostile.NAMES[:3] if name not in hostile.FILES[file]]
    assert all(name in out for name in others)
    assert ("sweep abcdef01" in out) is (file != "plan")


def records(root: Path) -> dict[str, Any]:
    return {name: json.loads((root / path).read_text()) for name, path in hostile.RECORDS.items()}


@pytest.mark.every(24)
@pytest.mark.parametrize("part", range(24))
@pytest.mark.parametrize("name", hostile.RECORDS)
def test_a_record_of_which_one_value_is_another(name, part, tmp_path, say):
    """Every value of every kind, with a checksum that is its own; a twenty-fourth of them at a time."""
    hostile.lay(tmp_path)
    plain, path = records(tmp_path)[name], tmp_path / hostile.RECORDS[name]
    for number, node in enumerate(hostile.nodes(plain)):
        for value in hostile.VALUES[(number + part) % 24 :: 24]:
            hostile.write(path, hostile.replaced(plain, node, value), sealed=name in hostile.SEALED)
            code, out, err = say(tmp_path)
            lines = err.splitlines()
            about = f"{name}{list(node)} = {repr(value)[:50]}: {out}{err}"
            assert (
                code == 0 and len(lines) <= 1 and all(str(path) in line or path.parent.name in line for line in lines)
            ), about
            assert hostile.NAMES[2] in out and max(map(len, out.splitlines())) < 1000, about
            counted = not any(str(path) in line for line in lines)
            if name == "plan":
                assert ("sweep abcdef01" in out) is counted, about


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200 if NIGHT else 12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere(data, tmp_path_factory, capsys):
    root = hostile.lay(tmp_path_factory.mktemp("any"))
    found = records(root)
    name = data.draw(st.sampled_from(sorted(found)))
    node = data.draw(st.sampled_from(list(hostile.nodes(found[name]))))
    path = root / hostile.RECORDS[name]
    try:
        hostile.write(path, hostile.replaced(found[name], node, data.draw(plain)), sealed=name in hostile.SEALED)
    except ValueError:  # NaN has no place in a record with a checksum
        return
    with quick():
        assert main(["status", str(root), "--once"]) == 0
    out, err = capsys.readouterr()
    assert hostile.NAMES[2] in out and len(err.splitlines()) <= 1
