"""Columns from outside: in the long table, on the pages, in results.csv and in LaTeX."""

from __future__ import annotations

import csv
import subprocess
import sys

import pytest

import sparse_lab
from sparse_lab.errors import SparseLabError, UserError
from sparse_lab.registering import REGISTERED, take_out
from sparse_lab.report.write import write


@pytest.fixture(autouse=True)
def _taken_out():
    yield
    take_out(REGISTERED)


def test_numbers_are_averaged_and_texts_are_told(make_run, tmp_path):
    @sparse_lab.register_column(heading="Dead <layers>")
    def dead_layers(record):
        """How many layers keep nothing | a path's."""
        return record["dead"]

    @sparse_lab.register_column(heading="Machine & seed")
    def machine(record):
        return record.get("machine")

    @sparse_lab.register_column(heading="Nothing")
    def nothing(record):
        return None

    make_run(seed=1, dead=1, machine="one_a")
    make_run(seed=2, dead=2, machine="two")
    make_run(seed=3, dead=float("nan"))
    make_run("dense", 0.0, dead=None)
    written = write([tmp_path / "runs"], tmp_path / "out")
    with open(written.results, newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert float(rows["oneshot"]["dead_layers"]) == 1.5 and rows["oneshot"]["machine"] == "one_a, two"
    assert rows["dense"]["dead_layers"] == rows["dense"]["machine"] == rows["dense"]["nothing"] == ""
    page, report, latex = written.page.read_text(), written.report.read_text(), written.latex.read_text()
    assert r"Dead \<layers\>" in report and r"- **Dead <layers>**: How many layers keep nothing \| a path's." in report
    assert "one_a, two" in report and "Nothing" not in report
    assert "Dead &lt;layers&gt;" in page and "Machine &amp; seed" in page and "<layers>" not in page
    row = next(line for line in latex.splitlines() if "oneshot" in line and "99" in line)
    assert row.strip() == r"oneshot & 99\% & 1.5 & one\_a, two \\"
    assert r"Dead \textless{}layers\textgreater{} & Machine \& seed" in latex


def test_without_any_a_report_is_what_it_was(make_run, tmp_path):
    make_run(dead=1)
    first = write([tmp_path / "runs"], tmp_path / "out").latex.read_text()
    sparse_lab.register_column(lambda_free := one, heading="One")
    assert write([tmp_path / "runs"], tmp_path / "out").latex.read_text() != first and lambda_free is one
    take_out(REGISTERED)
    assert write([tmp_path / "runs"], tmp_path / "out").latex.read_text() == first


def one(record):
    return 1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (lambda: 1 / 0, "column 'own' fails on .*: ZeroDivisionError: division by zero"),
        (lambda: [1], "column 'own' returns list for .*: text or a number"),
    ],
)
def test_one_that_fails_is_one_line(value, said, make_run, tmp_path):
    @sparse_lab.register_column(heading="Own")
    def own(record):
        return value()

    make_run()
    with pytest.raises(UserError, match=said):
        write([tmp_path / "runs"], tmp_path / "out")


def test_what_is_taken_is_refused():
    sparse_lab.register_column(one, heading="One")
    for heading, said in (
        ("", "one line of text"),
        ("a\nb", "one line of text"),
        ("One", "is taken"),
        ("kept", "is taken"),
    ):

        def other(record):
            return 1

        with pytest.raises(SparseLabError, match=said):
            sparse_lab.register_column(other, heading=heading)
    with pytest.raises(SparseLabError, match="column 'one' is taken"):
        sparse_lab.register_column(one, heading="Two")


def test_no_torch_is_imported_for_it():
    line = "import sys, sparse_lab; sparse_lab.register_column; print({'torch', 'hydra'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr
