"""What stands in a cell of a table: mean and deviation, the published number beside them, and marks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

MARKS = {
    "†": "the epoch was selected on the test set: the number is optimistic",
    "‡": "the data files are not the official ones",
    "¶": "at least one run trained, selected or tested on part of the images",
    "≠": "its runs did not read the same data, or their records do not agree on which",
    "§": "in at least one run no path of kept weights leads from the input to the logits",
    "≈": "within one published standard deviation of the published number",
    "↑": "above the published number by more than its standard deviation, or where none is given",
    "↓": "below the published number by more than its standard deviation, or where none is given",
}
_VERDICTS = {"within": "≈", "equal": "≈", "above": "↑", "below": "↓"}


@dataclass(frozen=True)
class Cell:
    """One cell of a wide table as text: ours, what is published and what that says, and the marks of `MARKS`.

    `difference` in points, `verdict` in words and its mark `sign` are "" where nothing is published, as `published` is.
    """

    ours: str
    published: str
    difference: str
    verdict: str
    sign: str
    marks: str

    @property
    def text(self) -> str:
        """`91.20 ± 0.31 [91.03 ± 0.17] ≈ †`."""
        beside = f"[{self.published}]" if self.published else ""
        return " ".join(part for part in (self.ours, beside, self.sign, self.marks) if part)


def cell(row: dict[Any, Any]) -> Cell:
    """Return the cell of a row of `aggregate.long`."""
    known = not math.isnan(row["published"])
    return Cell(
        ours=accuracy(row["mean"], row["std"]),
        published=accuracy(row["published"], row["published_std"]) if known else "",
        difference=f"{row['difference']:+.2f}" if known else "",
        verdict=row["verdict"] if known else "",
        sign=_sign(row),
        marks=_marks(row),
    )


def marks(table: pd.DataFrame) -> list[str]:
    """What the marks in the wide tables mean, those that occur."""
    used = "".join(_marks(row) + _sign(row) for row in table.to_dict("records"))
    return [f"{mark} {meaning}" for mark, meaning in MARKS.items() if mark in used]


def percent(share: float) -> str:
    """A share as a percentage with as many digits as it needs, up to four: 0.9685 is `96.85%`."""
    return f"{100 * share:.4f}".rstrip("0").rstrip(".") + "%"


def accuracy(mean: float, std: float | None) -> str:
    """`91.20 ± 0.31`, or the mean alone where there is no standard deviation."""
    return f"{mean:.2f}" if std is None or math.isnan(std) else f"{mean:.2f} ± {std:.2f}"


def _sign(row: dict[Any, Any]) -> str:
    return _VERDICTS[row["verdict"].split()[0]] if isinstance(row["verdict"], str) else ""


def _marks(row: dict[Any, Any]) -> str:
    shown = {
        "†": "test" in row["selected_on"].split(", "),
        "‡": not row["official_data"],
        "¶": isinstance(row["partial"], str),
        "≠": not row["same_data"],
        "§": row["connected"] is False,
    }
    return "".join(mark for mark, here in shown.items() if here)
