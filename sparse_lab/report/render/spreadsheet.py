"""Tables as CSV, of which no cell is a formula to a spreadsheet."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd

BEGINS = re.compile(r"'*[=+\-@\t\r＝＋－＠]")  # a program that reads the file back takes the first apostrophe off again


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write the table, without its index. A text that a spreadsheet would take for a formula begins with an apostrophe
    there; numbers, and texts that are numbers, stay as they are.
    """
    table.rename(columns=_harmless).map(_harmless).to_csv(path, index=False)


def _harmless(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and BEGINS.match(cell) and not _is_number(cell) else cell


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
