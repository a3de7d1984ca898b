"""The wide tables in LaTeX (booktabs), for a paper: ours, the published number beside it, and the verdict."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from itertools import groupby

import pandas as pd

from sparse_lab.report.render.sections import widths
from sparse_lab.report.tables.aggregate import Grid, grid, panels
from sparse_lab.report.tables.cell import MARKS, Cell, percent
from sparse_lab.report.tables.columns import known, shown

COLUMNS, COLUMNS_PUBLISHED = 5, 3  # of sparsities, side by side on a page, without and with published numbers
_SIGNS = {
    "≈": r"\approx",
    "↑": r"\uparrow",
    "↓": r"\downarrow",
    "†": r"\dagger",
    "‡": r"\ddagger",
    "¶": r"\P",
    "≠": r"\neq",
    "§": r"\S",
    "±": r"\pm",
}
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "`": r"\textasciigrave{}",
    # A bracket or a star behind the end of a row would be read as its argument, and dashes would grow together.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    "-": "{-}",
    **{sign: f"\\{sign}" for sign in "$&#_%"},
    **{sign: f"${command}$" for sign, command in _SIGNS.items()},
    "β": r"$\beta$",
    "×": r"$\times$",
    "…": r"\ldots{}",
    "–": "{-}",
}
# other scripts: XeLaTeX and LuaLaTeX set them, where a font has them; pdfLaTeX has no fonts that a table could rely on
_SCRIPT = "otherscript"
_SCRIPT_HEAD = (
    f"% Signs that LaTeX's standard fonts lack stand in \\{_SCRIPT}{{signs}}{{their code points}}.\n"
    "% XeLaTeX and LuaLaTeX set the signs, in a font of yours that has them (fontspec, xeCJK, luatexja);\n"
    "% pdfLaTeX sets the code points.\n"
    f"\\providecommand{{\\{_SCRIPT}}}[2]{{\\ifdefined\\Umathcode#1\\else#2\\fi}}\n"
)
_HEAD = (
    "% Made by sparse-lab report. Needs \\usepackage{booktabs}.\n"
    "% Cells: mean and sample standard deviation of top-1 test accuracy over seeds, in percent;\n"
    "% in brackets the published number at the same sparsity, and the verdict.\n"
)


def latex(table: pd.DataFrame) -> str:
    """A floating table for each network and data set, with no more sparsities beside each other than a page holds.

    Everything that comes from records is escaped. What LaTeX's standard fonts lack is set by XeLaTeX and LuaLaTeX
    alone; pdfLaTeX sets its code points, and the file's head says so.
    """
    text = "\n".join(_panel(table, model, dataset) for model, dataset in panels(table))
    return "\n".join([_HEAD + (_SCRIPT_HEAD if f"\\{_SCRIPT}{{" in text else ""), text])


def escape(text: object) -> str:
    """Text that stays text in LaTeX, on one line."""
    line = " ".join(unicodedata.normalize("NFC", str(text)).split())
    return "".join(
        _of_other_script("".join(signs)) if other else "".join(_SPECIAL.get(sign, sign) for sign in signs)
        for other, signs in groupby(line, lambda sign: not (sign in _SPECIAL or _plain(sign)))
    )


def _plain(sign: str) -> bool:
    return " " <= sign <= "~" or (sign.isalpha() and sign <= "ÿ")


def _of_other_script(signs: str) -> str:
    signs = "".join(sign for sign in signs if sign.isprintable())
    return f"\\{_SCRIPT}{{{signs}}}{{{' '.join(f'U+{ord(sign):04X}' for sign in signs)}}}" if signs else "?"


def _panel(table: pd.DataFrame, model: str, dataset: str) -> str:
    found = grid(table, model, dataset)
    lines = [r"\begin{table}", r"  \centering"]
    lines.append(f"  \\caption{{{_caption(found, table, model, dataset)}}}")
    most = COLUMNS_PUBLISHED if any(cell.published for cell in _cells(found)) else COLUMNS
    for start in range(0, len(found.heads), most):
        lines += [r"  \par\medskip"] if start else []
        lines += _tabular(found, slice(start, start + most))
    lines += _of_plugins(table[(table["model"] == model) & (table["dataset"] == dataset)])
    return "\n".join([*lines, r"\end{table}", ""])


def _cells(found: Grid) -> list[Cell]:
    return [cell for row in found.rows.values() for cell in row if cell is not None]


def _caption(found: Grid, table: pd.DataFrame, model: str, dataset: str) -> str:
    cells = _cells(found)
    said = [f"{escape(model)} on {escape(dataset)}: top{{-}}1 test accuracy, \\%."]
    said.append(escape(widths(table, model, dataset)))
    if any(cell.published for cell in cells):
        said.append("In brackets: published.")
    used = "".join(cell.sign + cell.marks for cell in cells)
    said += [f"${_SIGNS[mark]}$: {escape(meaning)}." for mark, meaning in MARKS.items() if mark in used]
    return " ".join(said)


def _tabular(found: Grid, columns: slice) -> Iterator[str]:
    heads = found.heads[columns]
    yield f"  \\begin{{tabular}}{{l{'r' * len(heads)}}}"
    yield r"    \toprule"
    yield _row("", [escape(sparsity) for sparsity, _ in heads])
    yield _row("method", [f"\\scriptsize {escape(kept)}" for _, kept in heads])
    yield r"    \midrule"
    for method, cells in found.rows.items():
        # Rows that are empty in this part of a split table would only repeat names.
        if any(cells[columns]):
            yield _row(escape(method), ["" if cell is None else _cell(cell) for cell in cells[columns]])
    yield r"    \bottomrule"
    yield r"  \end{tabular}"


def _of_plugins(panel: pd.DataFrame) -> Iterator[str]:
    """The columns that plugins bring, a row a cell."""
    columns = known(panel)
    if not columns:
        return
    yield r"  \par\medskip"
    yield f"  \\begin{{tabular}}{{ll{'r' * len(columns)}}}"
    yield r"    \toprule"
    yield _row("method", ["sparsity", *(escape(column.heading) for column in columns)])
    yield r"    \midrule"
    for row in panel.to_dict("records"):
        values = [escape(shown(row[column.name])) for column in columns]
        yield _row(escape(row["method"]), [escape(percent(row["sparsity"])), *values])
    yield r"    \bottomrule"
    yield r"  \end{tabular}"


def _row(name: str, cells: list[str]) -> str:
    return f"    {' & '.join([name, *cells])} \\\\"


def _cell(cell: Cell) -> str:
    parts = [_number(cell.ours)]
    if cell.published:
        parts.append(f"{{\\scriptsize [{_number(cell.published)}] ${_SIGNS[cell.sign]}$}}")
    if cell.marks:
        parts.append(f"$^{{{' '.join(_SIGNS[mark] for mark in cell.marks)}}}$")
    return " ".join(parts)


def _number(text: str) -> str:
    # Our own digits, a point and a plus-minus sign: nothing here comes from a record as text.
    return f"${re.sub('±', lambda _: _SIGNS['±'], text)}$"
