"""Columns of a report from outside, beside those of `aggregate.COLUMNS`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from sparse_lab.errors import SparseLabError, UserError
from sparse_lab.records.record import is_number
from sparse_lab.registering import check_function, enter
from sparse_lab.report.load.records import Finished

Value = str | int | float | None


@dataclass(frozen=True)
class Column:
    """name: in results.csv; heading: on pages; meaning: one line."""

    name: str
    heading: str
    meaning: str
    function: Callable[[dict[str, Any]], Value]

    def of(self, runs: Sequence[Finished]) -> Value:
        """Return what stands in a cell's row: the mean of its runs' numbers, or their different texts in order; None
        where none of them has any. Raise UserError for a function that fails, or returns something else.
        """
        values = [self._of(run) for run in runs]
        texts = dict.fromkeys(str(value) for value in values if value is not None)
        numbers = [float(value) for value in values if isinstance(value, int | float)]
        if not numbers or len(numbers) < len([value for value in values if value is not None]):
            return ", ".join(texts) or None
        return sum(numbers) / len(numbers)

    def _of(self, run: Finished) -> Value:
        try:
            value = self.function(run.result)
        except Exception as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"column {self.name!r} fails on {run.name}: {said}") from None
        if value is None or isinstance(value, str | bool):
            return value if value is None else str(value)
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if not is_number(value):
            raise UserError(f"column {self.name!r} returns {type(value).__name__} for {run.name}: text or a number")
        return value


OWN: dict[str, Column] = {}


def register_column(function: Callable[[dict[str, Any]], Value] | None = None, *, heading: str) -> Any:
    """Give reports a column of your own, as a decorator: `@register_column(heading="Sharpness")`.

    The function takes a run's record, the mapping in its result.json, and returns a number, a text, or None where
    there is nothing to say, as of records from before. A row shows the mean of its runs' numbers, or their different
    texts. In results.csv the column has the function's name. The first line of its docstring says what it means.

    heading: of the column on pages and in LaTeX, one line.

    Raise SparseLabError for a name or a heading that is taken, for a name that is no plain word, and for what is no
    function.
    """
    from sparse_lab.report.tables.aggregate import COLUMNS

    if function is None:
        return partial(register_column, heading=heading)
    name = check_function("column", function, {*COLUMNS, *OWN})
    if not isinstance(heading, str) or not heading.isprintable() or not heading.strip():
        raise SparseLabError(f"column {name!r}: its heading is one line of text, not {heading!r}")
    if heading in {*COLUMNS, "mean ± std", "published ± std", *(one.heading for one in OWN.values())}:
        raise SparseLabError(f"column {name!r}: the heading {heading!r} is taken: choose another one")
    OWN[name] = Column(name, heading, (inspect.getdoc(function) or heading).splitlines()[0], function)
    enter("column", name, lambda: OWN.pop(name))
    return function


def known(table: pd.DataFrame) -> list[Column]:
    """Return the columns of which a table has any value."""
    return [one for name, one in OWN.items() if name in table and table[name].notna().any()]


def shown(value: object) -> str:
    """A value as text, "" where there is none."""
    if value is None or value != value:
        return ""
    return f"{value:,.6g}" if isinstance(value, float) else str(value)
