"""How masks and gradients went while training: updates.png and gradients.png."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sparse_lab.report.dynamics import PARTS, Course, Trace, Values, cells, course
from sparse_lab.report.plot import LEGEND_WIDTH, canvas, legend, legend_height, plain, short
from sparse_lab.report.table import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Looks = Mapping[str, Mapping[str, Any]]

ACROSS = 4  # columns of panels; more go on below
STROKES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))  # a sparsity each
LABEL_LINES = 3  # a label of three settings fills so many lines of a legend
GREY = "#555555"
ASKED = "what the schedule asked for"
_PANEL = (3.5, 2.15)  # inches
_MARKS = 12  # of what was asked, along a line
_BAND = 0.16
_ROWS = {
    "density": "density: share of\nweights kept",
    "effective": "effective weights,\n% of those kept",
    "live": "live logits, %\n(0: network is cut)",
    "explored": "explored: weights\never alive, %",
}


def draw_updates(found: Sequence[Trace], looks: Looks, path: Path) -> None:
    """Writes a PNG: a column for each network, data set and target, a row for each thing that changes with the masks.

    found: runs with at least one update each.
    """
    places = sorted({trace.place for trace in found})
    rows = [row for row in _ROWS if any(trace.updates[row].notna().any() for trace in found)]
    across, names = min(ACROSS, len(places)), list(dict.fromkeys(trace.label for trace in found))
    down = math.ceil(len(places) / across)
    beside = legend_height([*names, ASKED], LABEL_LINES)
    figure = canvas(_PANEL[0] * across + LEGEND_WIDTH, max((_PANEL[1] * len(rows) + 0.7) * down, beside))
    axes = figure.subplots(down * len(rows), across, squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)
    for number, place in enumerate(places):
        band, column = divmod(number, across)
        here = [trace for trace in found if trace.place == place]
        for row, value in enumerate(rows):
            axis = axes[band * len(rows) + row, column]
            axis.set_visible(True)
            _follow(axis, here, value, looks)
            axis.set_ylabel(_ROWS[value] if column == 0 else "")
            axis.tick_params(labelbottom=row == len(rows) - 1)
        axes[band * len(rows), column].set_title(title(place), fontsize=10.5)
        axes[band * len(rows) + len(rows) - 1, column].set_xlabel("epoch")
    figure.align_ylabels(axes[:, 0])
    entries = {name: _line(**looks[name], markersize=5) for name in names}
    entries[ASKED] = _line(color=GREY, marker="o", markerfacecolor="white", linestyle="none")
    legend(figure, entries, LABEL_LINES)
    figure.savefig(path, format="png")


def draw_gradients(found: Sequence[Trace], looks: Looks, path: Path) -> None:
    """Writes a PNG: a band for each network and data set, a panel a part; a colour a method, a stroke a sparsity.

    found: runs with gradients, at no more sparsities (besides dense) than there are `STROKES`.
    """
    pairs = list(dict.fromkeys(trace.place[:2] for trace in found))
    strokes = strokes_of(found)
    parts = {pair: _parts([trace for trace in found if trace.place[:2] == pair]) for pair in pairs}
    across = min(3, max(map(len, parts.values())))
    down = {pair: math.ceil(len(parts[pair]) / across) for pair in pairs}
    names = list(dict.fromkeys(trace.label for trace in found))
    beside = legend_height([*names, *map(str, strokes)], LABEL_LINES)
    figure = canvas(4.2 * across + LEGEND_WIDTH, max(3.0 * sum(down.values()) + 0.3, beside))
    axes = figure.subplots(sum(down.values()), across, squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)
    top = 0
    for pair in pairs:
        here = [trace for trace in found if trace.place[:2] == pair]
        for axis, part in zip(axes[top : top + down[pair]].flat, parts[pair], strict=False):
            axis.set_visible(True)
            _norms(axis, here, part, looks, strokes)
            where = f"{short(pair[0], 20)} on {short(pair[1], 20)}"
            axis.set_title(f"{part}\n{where}" if len(pairs) > 1 else part, fontsize=10.5)
        for axis in axes[top : top + down[pair], 0]:
            axis.set_ylabel("L2 norm of the gradient")
        top += down[pair]
    legend(figure, {name: _line(**looks[name]) for name in names} | _stroke_entries(strokes), LABEL_LINES)
    figure.savefig(path, format="png")


def title(place: tuple[str, str, float]) -> str:
    """Network, data set and sparsity in one line."""
    return f"{short(place[0], 20)} on {short(place[1], 20)}, {percent(place[2])}"


def strokes_of(found: Sequence[Trace]) -> dict[float, Any]:
    """A line style for every sparsity, the sparsest solid. Dense networks have a style of their own."""
    targets = sorted({trace.run.sparsity for trace in found if not trace.dense}, reverse=True)
    return dict(zip(targets, STROKES, strict=False))


def _stroke_entries(strokes: Mapping[float, Any]) -> dict[str, Any]:
    """Legend entries that say which line style stands for which sparsity; none where there is only one."""
    if len(strokes) < 2:
        return {}
    return {f"{percent(target)} sparse": _line(color=GREY, linestyle=stroke) for target, stroke in strokes.items()}


def put(axis: Axes, line: Course, scale: float = 1.0, **look: Any) -> None:
    """A course as steps, with a pale band from the lowest to the highest seed."""
    axis.step(line.epochs, scale * line.mean, where="post", **look)
    if np.any(line.high > line.low):
        span = (scale * line.low, scale * line.high)
        axis.fill_between(line.epochs, *span, step="post", color=look["color"], alpha=_BAND, linewidth=0)


def breadth(number: int, lines: int) -> float:
    """The width of a line: methods often lie on one line, and the first is the broadest, so that all of them show."""
    return 1.3 + 2.2 * (lines - 1 - number) / max(3, lines - 1)


def last_epoch(found: Sequence[Trace]) -> float:
    """Where the x axis ends: the epochs that the longest run trained, or its last update."""
    ends = [trace.end for trace in found if not math.isnan(trace.end)]
    return max([*ends, *(trace.updates["epoch"].max() for trace in found if len(trace.updates))], default=0.0) or 1.0


def _follow(axis: Axes, here: Sequence[Trace], value: str, looks: Looks) -> None:
    # The calmest methods come first, so that the broadest lines are straight.
    end, groups = last_epoch(here), sorted(cells(here), key=lambda seeds: max(len(seed.updates) for seed in seeds))
    scale = 1.0 if value == "density" else 100.0
    for number, seeds in enumerate(groups):
        look = looks[seeds[0].label]
        line = course(seeds, value, end)
        put(axis, line, scale, color=look["color"], linewidth=breadth(number, len(groups)), solid_joinstyle="miter")
        marker = {"color": look["color"], "marker": look["marker"], "linestyle": "none", "zorder": 3}
        if value == "density":
            axis.plot(*_asked(seeds, number / len(groups)), markersize=5.5, markerfacecolor="white", **marker)
        else:
            places = _spread(line, (number + 0.5) / len(groups))
            seen = line.mean[np.searchsorted(line.epochs, places, side="right") - 1]
            axis.plot(places, scale * seen, markersize=5.5, markeredgecolor="white", markeredgewidth=0.6, **marker)
    _limits(axis, value, end)


def _limits(axis: Axes, value: str, end: float) -> None:
    if value == "density":
        _log(axis)
    elif value == "explored":
        axis.set_ylim(bottom=0)
    else:
        axis.set_ylim(-4, 104)
        axis.set_yticks(range(0, 101, 25))
    axis.set_xlim(-0.015 * end, 1.015 * end)
    plain(axis)


def _log(axis: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    # No network has so many weights that a share of them lies below; a senseless count may.
    low, high = (min(max(density, 1e-15), 1.5) for density in axis.get_ylim())
    middle = math.sqrt(low * high)
    # Where nothing changes, matplotlib would magnify the rounding.
    low, high = min(low, middle / 2), max(high, middle * 2)
    axis.set_ylim(low, high)
    decades = math.log10(high / low)
    subs = (1.0,) if decades > 2.5 else (1.0, 2.0, 5.0) if decades > 0.9 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axis.yaxis.set_major_locator(LogLocator(subs=subs))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda density, _: percent(density)))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _asked(seeds: Sequence[Trace], aside: float) -> tuple[Values, Values]:
    """Epoch and asked density of some updates, other ones for every method, and of each that missed what was asked."""
    line = course(seeds, "asked")
    step = max(1, math.ceil(len(line.epochs) / _MARKS))
    some = slice(min(int(aside * step), len(line.epochs) - 1), None, step)
    updates = pd.concat([seed.updates for seed in seeds])
    missed = updates[(updates["asked"] - updates["density"]).abs() > 1e-12]
    return np.append(line.epochs[some], missed["epoch"]), np.append(line.mean[some], missed["asked"])


def _spread(line: Course, aside: float) -> Values:
    """Epochs along a line at which a marker tells it from the others, a little beside theirs."""
    known = line.epochs[~np.isnan(line.mean)]
    if not len(known):
        return np.empty(0)
    return known[0] + (known[-1] - known[0]) * (np.arange(5) + aside) / 5


def _parts(here: Sequence[Trace]) -> list[str]:
    return [part for part in PARTS if any(trace.gradients[part].notna().any() for trace in here)]


def _norms(axis: Axes, here: Sequence[Trace], part: str, looks: Looks, strokes: Mapping[float, Any]) -> None:
    lines = [(seeds[0], pd.concat([s.gradients[part] for s in seeds]).groupby(level=0).mean()) for seeds in cells(here)]
    positive = [value for _, norms in lines for value in norms[norms > 0]]
    floor = 10.0 ** (math.floor(math.log10(min(positive, default=1.0))) - 1)
    beside = Counter(trace.run.sparsity for trace, _ in lines)
    drawn: Counter[float] = Counter()
    for trace, norms in lines:
        target = trace.run.sparsity
        look = {"linestyle": strokes.get(target, "-"), **looks[trace.label]}
        every = max(1, len(norms) // 5)
        marks = (drawn[target] * every // beside[target], every)
        drawn[target] += 1
        axis.plot(norms.index, norms.clip(lower=floor), markevery=marks, markersize=4.5, linewidth=1.4, **look)
    axis.set_yscale("log")
    if any((norms == 0).any() for _, norms in lines):
        _zero(axis, floor)
    axis.set_xlim(0, 1.02 * max(1.0, *(trace.gradients.index.max() for trace in here)))
    axis.set_xlabel("epoch")
    plain(axis)


def _zero(axis: Axes, floor: float) -> None:
    """A place for 0 on a logarithmic axis, a decade below all that is not."""
    from matplotlib.ticker import FuncFormatter, LogFormatterMathtext

    usual = LogFormatterMathtext()
    usual.set_axis(axis.yaxis)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda norm, at: "0" if norm < 2 * floor else usual(norm, at)))
    axis.axhline(floor, color=GREY, linewidth=0.8, linestyle=":")
    axis.set_ylim(bottom=floor / 2)


def _line(**look: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **look)
