"""What a spreadsheet would run is text in it, and comes back as it was."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pandas as pd
import pytest

from sparse_lab.report.render.spreadsheet import write_csv

HOSTILE = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "'=1", "＝1", '="a,b"\n=2']


@pytest.mark.parametrize("text", HOSTILE)
def test_no_cell_begins_as_a_formula_does(text: str, tmp_path: Path) -> None:
    write_csv(pd.DataFrame({"method": [text], "=head": ["x"]}), tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="") as file:
        head, row = csv.reader(file)
    assert head == ["method", "'=head"] and row[0] == f"'{text}"


def test_numbers_and_other_texts_stay_and_everything_comes_back(tmp_path: Path) -> None:
    texts = [*HOSTILE, "rigl", "a-b", "'quoted'", "-1.5", "+2e3", "", " =1"]
    table = pd.DataFrame({"text": texts, "number": [-1.5 * i for i in range(len(texts))]})
    write_csv(table, tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["number"]) for row in rows] == list(table["number"])
    assert [re.sub(r"^'(?='*[=+\-@\t\r＝＋－＠])", "", row["text"]) for row in rows] == texts
    assert not any(re.match(r"[=+@\t\r]", row["text"]) for row in rows if row["text"] != "+2e3")
