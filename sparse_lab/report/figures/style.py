"""What all pictures are drawn on: panels of one size, a legend beside them, names that fit.

matplotlib is imported when a picture is drawn, without pyplot: no window, no display, no state left behind.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparse_lab.report.tables.labels import foldable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MANY_POINTS = 500  # of a line, from which on a PDF holds it as pixels
_TICKS = 5  # along an axis; they take more time than all that they measure
LEGEND_CHARS = 33
LEGEND_LINE = 0.2  # inches
LEGEND_WIDTH = 2.85  # inches


@dataclass(frozen=True)
class Sheet:
    """A figure of panels of one size (inches), each of `rows` axes one above the other; axes are made when asked for.

    Everything has a place of its own from the start: matplotlib's layout engines draw a figure twice to find one.
    """

    figure: Figure
    panel: tuple[float, float]
    inset: tuple[float, float, float, float]  # left, bottom, right, top of a panel, for ticks, labels and the title
    rows: int = 1
    gap: float = 0.18
    top: float = 0.0  # inches above the first row

    def axis(self, down: int, across: int, row: int = 0, *, x: str = "", y: str = "", title: str = "") -> Axes:
        """The axes in this panel, with its labels."""
        left, bottom, right, top = self.inset
        width, height = self.panel
        wide, tall = width - left - right, (height - bottom - top - self.gap * (self.rows - 1)) / self.rows
        above = self.top + down * height + top + row * (tall + self.gap)
        figure_width, figure_height = self.figure.get_size_inches()
        corner = (across * width + left) / figure_width, 1 - (above + tall) / figure_height
        axis = self.figure.add_axes((*corner, wide / figure_width, tall / figure_height))
        # A label that looks for its place costs as much as drawing the ticks.
        axis.xaxis.set_label_coords(0.5, -0.34 / tall)
        axis.yaxis.set_label_coords(-(left - 0.13) / wide, 0.5)
        axis.set_xlabel(x)
        axis.set_ylabel(y, va="top")
        axis.set_title(title, y=1.0, fontsize=10.5)
        axis.locator_params(nbins=_TICKS)
        plain(axis)
        return axis


def sheet(
    down: int,
    across: int,
    panel: tuple[float, float],
    inset: tuple[float, float, float, float],
    rows: int = 1,
    beside: float = 0.0,
) -> Sheet:
    """An empty sheet. `beside`: the height in inches of a legend to the right of the panels, if there is one."""
    height = max(panel[1] * down, beside)
    figure = canvas(panel[0] * across + (LEGEND_WIDTH if beside else 0.0), height)
    return Sheet(figure, (panel[0], height / down), inset, rows)


def columns(panels: int, most: int = 3) -> int:
    """How many of so many panels stand side by side, at most `most`, so that the last row is as full as can be."""
    return math.ceil(panels / math.ceil(panels / most))


def canvas(width: float, height: float) -> Figure:
    """An empty figure of a size in inches that draws without a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)
    return figure


def plain(axis: Axes) -> None:
    """A pale grid behind the lines, and no frame."""
    axis.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def legend(figure: Figure, entries: Mapping[str, Any], lines: int | None = None, top: float = 0.1) -> None:
    """One legend to the right of the panels, `top` inches from above; labels are wrapped, to at most `lines` lines."""
    if entries:
        labels = [_wrapped(label, lines) for label in entries]
        width, height = figure.get_size_inches()
        corner = (1 - LEGEND_WIDTH / width, 1 - top / height)
        figure.legend(entries.values(), labels, loc="upper left", bbox_to_anchor=corner, fontsize=9, frameon=False)


def legend_height(labels: Sequence[str], lines: int | None = None) -> float:
    """Inches that a legend of these labels needs."""
    return LEGEND_LINE * (1 + sum(_wrapped(label, lines).count("\n") + 1 for label in labels))


def short(name: str, chars: int) -> str:
    """A name as text for a picture, its middle left out where it is long: layers, say, differ at their ends."""
    cut = name if len(name) <= chars else f"{name[: chars // 2 - 1]}…{name[-(chars - chars // 2) :]}"
    return _no_formula(cut)


def _wrapped(label: str, lines: int | None = None) -> str:
    cut = textwrap.fill(
        foldable(label, LEGEND_CHARS - 2), LEGEND_CHARS, subsequent_indent="  ", max_lines=lines, placeholder=" ..."
    )
    return _no_formula(cut)


def _no_formula(text: str) -> str:
    # matplotlib would read what stands between two dollar signs as TeX.
    return re.sub(r"(?<!\\)\$", r"\$", text)
