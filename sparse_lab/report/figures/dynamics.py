"""How masks and gradients went while training: updates.png and gradients.png."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_lab.report.figures.style import MANY_POINTS, columns, legend, legend_height, sheet, short
from sparse_lab.report.load.traces import PARTS, Course, Trace, Values, by_epoch, cells, course
from sparse_lab.report.tables.cell import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Looks = Mapping[str, Mapping[str, Any]]

STROKES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))  # a sparsity each
LABEL_LINES = 3  # a label of three settings fills so many lines of a legend
GREY = "#555555"
ASKED = "what the schedule asked for"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MARKS = 12  # of what was asked, along a line
_BAND = 0.16
_ROWS = {
    "density": "density: share of\nweights kept",
    "effective": "effective weights,\n% of those kept",
    "live": "live logits, %\n(0: network is cut)",
    "explored": "explored: weights\never alive, %",
}


def draw_updates(found: Sequence[Trace], looks: Looks) -> Figure:
    """A column for each network, data set and target, a row for each thing that changes with the masks.

    found: runs with at least one update each.
    """
    places = list(dict.fromkeys(trace.place for trace in found))
    rows = [row for row in _ROWS if any(np.isfinite(trace.arrays[row]).any() for trace in found)]
    across, names = columns(len(places)), list(dict.fromkeys(trace.label for trace in found))
    beside = legend_height([*names, ASKED], LABEL_LINES)
    panel = (4.1, 1.95 * len(rows) + 0.9)
    page = sheet(math.ceil(len(places) / across), across, panel, (1.1, 0.55, 0.15, 0.35), len(rows), beside)
    for number, place in enumerate(places):
        here = [trace for trace in found if trace.place == place]
        known = [row for row in rows if any(np.isfinite(trace.arrays[row]).any() for trace in here)]
        for row, value in enumerate(known):
            last = row == len(known) - 1
            y, above = "" if number % across else _ROWS[value], "" if row else title(place)
            axis = page.axis(*divmod(number, across), row, x="epoch" if last else "", y=y, title=above)
            _follow(axis, here, value, looks)
            axis.tick_params(labelbottom=last)
    entries = {name: stroke(**looks[name], markersize=5) for name in names}
    entries[ASKED] = stroke(color=GREY, marker="o", markerfacecolor="white", linestyle="none")
    legend(page.figure, entries, LABEL_LINES)
    return page.figure


def draw_gradients(found: Sequence[Trace], looks: Looks) -> Figure:
    """A band for each network and data set, a panel a part; a colour a method, a stroke a sparsity.

    found: runs with gradients, at no more sparsities (besides dense) than there are `STROKES`.
    """
    pairs = list(dict.fromkeys(trace.place[:2] for trace in found))
    strokes = strokes_of(found)
    parts = {pair: _parts([trace for trace in found if trace.place[:2] == pair]) for pair in pairs}
    across = columns(max(map(len, parts.values())))
    down = {pair: math.ceil(len(parts[pair]) / across) for pair in pairs}
    names = list(dict.fromkeys(trace.label for trace in found))
    beside = legend_height([*names, *map(str, strokes)], LABEL_LINES)
    page = sheet(sum(down.values()), across, (4.1, 3.1), (0.85, 0.6, 0.15, 0.5), beside=beside)
    top = 0
    for pair in pairs:
        here = [trace for trace in found if trace.place[:2] == pair]
        where = f"\n{short(pair[0], 20)} on {short(pair[1], 20)}" if len(pairs) > 1 else ""
        for number, part in enumerate(parts[pair]):
            row, column = divmod(number, across)
            y = "" if column else "L2 norm of the gradient"
            axis = page.axis(top + row, column, x="epoch", y=y, title=f"{part}{where}")
            _norms(axis, here, part, looks, strokes)
        top += down[pair]
    legend(page.figure, {name: stroke(**looks[name]) for name in names} | stroke_entries(strokes), LABEL_LINES)
    return page.figure


def title(place: tuple[str, str, float]) -> str:
    """Network, data set and sparsity in one line."""
    return f"{short(place[0], 20)} on {short(place[1], 20)}, {percent(place[2])}"


def strokes_of(found: Sequence[Trace]) -> dict[float, Any]:
    """A line style for every sparsity, the sparsest solid. Dense networks have a style of their own."""
    targets = sorted({trace.run.sparsity for trace in found if not trace.dense}, reverse=True)
    return dict(zip(targets, STROKES, strict=False))


def stroke_entries(strokes: Mapping[float, Any]) -> dict[str, Any]:
    """Legend entries that say which line style stands for which sparsity; none where there is only one."""
    if len(strokes) < 2:
        return {}
    return {f"{percent(target)} sparse": stroke(color=GREY, linestyle=style) for target, style in strokes.items()}


def put(axis: Axes, line: Course, scale: float = 1.0, **look: Any) -> None:
    """A course as steps, with a pale band from the lowest to the highest seed."""
    pixels = len(line.epochs) > MANY_POINTS
    axis.step(line.epochs, scale * line.mean, where="post", rasterized=pixels, **look)
    if np.any(line.high > line.low):
        span = (scale * line.low, scale * line.high)
        axis.fill_between(
            line.epochs, *span, step="post", color=look["color"], alpha=_BAND, linewidth=0, rasterized=pixels
        )


def breadth(number: int, lines: int) -> float:
    """The width of a line: methods often lie on one line, and the first is the broadest, so that all of them show."""
    return 1.3 + 2.2 * (lines - 1 - number) / max(3, lines - 1)


def last_epoch(found: Sequence[Trace]) -> float:
    """Where the x axis ends: the epochs that the longest run trained, or its last update."""
    ends = [trace.end for trace in found if not math.isnan(trace.end)]
    return max([*ends, *(trace.arrays["epoch"].max() for trace in found if len(trace.updates))], default=0.0) or 1.0


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
        log(axis)
    elif value == "explored":
        axis.set_ylim(bottom=0)
    else:
        axis.set_ylim(-4, 104)
        axis.set_yticks(range(0, 101, 25))
    axis.set_xlim(-0.015 * end, 1.015 * end)


def log(axis: Axes) -> None:
    """A logarithmic axis of densities, from what is drawn already."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

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
    axis.yaxis.set_minor_locator(NullLocator())


def _asked(seeds: Sequence[Trace], aside: float) -> tuple[Values, Values]:
    """Epoch and asked density of some updates, other ones for every method, and of each that missed what was asked."""
    line = course(seeds, "asked")
    step = max(1, math.ceil(len(line.epochs) / _MARKS))
    some = slice(min(int(aside * step), len(line.epochs) - 1), None, step)
    epochs, asked, density = (
        np.concatenate([seed.arrays[name] for seed in seeds]) for name in ("epoch", "asked", "density")
    )
    missed = np.abs(asked - density) > 1e-12
    return np.append(line.epochs[some], epochs[missed]), np.append(line.mean[some], asked[missed])


def _spread(line: Course, aside: float) -> Values:
    """Epochs along a line at which a marker tells it from the others, a little beside theirs."""
    known = line.epochs[~np.isnan(line.mean)]
    if not len(known):
        return np.empty(0)
    return known[0] + (known[-1] - known[0]) * (np.arange(5) + aside) / 5


def _parts(here: Sequence[Trace]) -> list[str]:
    return [part for part in PARTS if any(trace.gradients[part].notna().any() for trace in here)]


def _norms(axis: Axes, here: Sequence[Trace], part: str, looks: Looks, strokes: Mapping[float, Any]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    lines = [(seeds[0], by_epoch([seed.gradients for seed in seeds], part)) for seeds in cells(here)]
    positive = np.concatenate([line.mean[line.mean > 0] for _, line in lines])
    floor = 10.0 ** (math.floor(math.log10(positive.min() if len(positive) else 1.0)) - 1)
    beside = Counter(trace.run.sparsity for trace, _ in lines)
    drawn: Counter[float] = Counter()
    for trace, line in lines:
        target = trace.run.sparsity
        look = {"linestyle": strokes.get(target, "-"), **looks[trace.label]}
        every = max(1, len(line.epochs) // 5)
        marks = (drawn[target] * every // beside[target], every)
        drawn[target] += 1
        axis.plot(line.epochs, np.maximum(line.mean, floor), markevery=marks, markersize=4.5, linewidth=1.4, **look)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(numticks=7))
    axis.yaxis.set_minor_locator(NullLocator())
    zero = any((line.mean == 0).any() for _, line in lines)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda norm, _: _power(norm, floor if zero else 0.0)))
    if zero:
        _zero(axis, floor)
    axis.set_xlim(0, 1.02 * max([1.0, *(trace.gradients.index.max() for trace in here)]))


def _zero(axis: Axes, floor: float) -> None:
    """A place for 0 on a logarithmic axis, a decade below all that is not."""
    axis.axhline(floor, color=GREY, linewidth=0.8, linestyle=":")
    axis.set_ylim(bottom=floor / 2)


def _power(norm: float, floor: float) -> str:
    """A power of ten as text (matplotlib's own formula is slow to set), or 0 for what stands at the floor."""
    return "0" if norm < 2 * floor else f"10{str(round(math.log10(norm))).translate(_RAISED)}"


def stroke(**look: Any) -> Any:
    """A line for a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **look)
