"""What came out, cell by cell: the density of every layer, what accuracy cost, and the training curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sparse_lab.report.figures.dynamics import LABEL_LINES, Looks, breadth, log, stroke, title
from sparse_lab.report.figures.style import MANY_POINTS, columns, legend, legend_height, sheet, short
from sparse_lab.report.load.traces import Trace, Values, by_epoch, cells, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COSTS = {
    "seconds": ("wall time, minutes", 1 / 60),
    "inference_flops": ("FLOPs of one image", 1.0),
    "peak_memory_mb": ("peak memory while training, MB", 1.0),
}
OTHERS = "other methods"
PALE = "#c4c4c4"
_BAND = 0.14
_MARKS = 6  # along a curve
_LOG_FROM = 4.0  # the largest cost over the smallest
_TICKS = 8  # layers named by their number along an axis
_CURVES = {"train_loss": "loss while training", "validation_accuracy": "validation accuracy, %"}


def draw_densities(found: Sequence[Trace], looks: Looks) -> Figure:
    """A panel for each network, data set and target: the share of its weights that every layer keeps at the end.

    found: runs whose record says so. Mean over seeds, a band from the lowest to the highest.
    """
    places = list(dict.fromkeys(trace.place for trace in found))
    across, names = columns(len(places)), list(dict.fromkeys(trace.label for trace in found))
    down = math.ceil(len(places) / across)
    beside = legend_height(names, LABEL_LINES)
    page = sheet(down, across, (4.1, 3.0), (1.1, 0.6, 0.15, 0.4), beside=beside)
    for number, place in enumerate(places):
        y = "" if number % across else "density: share of\na layer's weights kept"
        said = "layer, from the input to the logits"
        axis = page.axis(*divmod(number, across), x=said, y=y, title=title(place))
        _densities(axis, cells(trace for trace in found if trace.place == place), looks)
    legend(page.figure, {name: stroke(**looks[name], markersize=5) for name in names}, LABEL_LINES)
    return page.figure


def draw_costs(table: pd.DataFrame, coloured: Sequence[str], looks: Looks) -> Figure:
    """A band for each network and data set, a panel a cost: every cell as a marker, smaller where it is sparser.

    table: rows of the long table; methods that are not `coloured` are grey points.
    """
    pairs = list(dict.fromkeys(zip(table["model"], table["dataset"], strict=True)))
    known = {name: said for name, said in COSTS.items() if table[name].notna().any()}
    here = [name for name in coloured if name in set(table["method"])]
    others = set(table["method"]) - set(here)
    page = sheet(len(pairs), len(known), (4.1, 3.3), (0.75, 0.6, 0.15, 0.4), beside=legend_height([*here, OTHERS], 3))
    for band, (model, dataset) in enumerate(pairs):
        rows = table[(table["model"] == model) & (table["dataset"] == dataset)]
        for column, (name, (said, scale)) in enumerate(known.items()):
            y = "" if column else "top-1 test accuracy, %"
            where = "" if column else f"{short(model, 18)} on {short(dataset, 18)}"
            axis = page.axis(band, column, x=said, y=y, title=where)
            _costs(axis, rows, scale * rows[name], here, looks)
    entries = {name: stroke(**_marker(looks[name]), markersize=6) for name in here}
    if others:
        entries[OTHERS] = stroke(linestyle="none", marker=".", color=PALE, markersize=7)
    legend(page.figure, entries, LABEL_LINES)
    return page.figure


def draw_curves(found: Sequence[Trace], looks: Looks) -> Figure:
    """A column for each network, data set and target: the loss while training and the accuracy on validation images.

    found: runs with metrics. Mean over seeds, a band from the lowest to the highest.
    """
    places = list(dict.fromkeys(trace.place for trace in found))
    across, names = columns(len(places)), list(dict.fromkeys(trace.label for trace in found))
    beside = legend_height(names, LABEL_LINES)
    page = sheet(math.ceil(len(places) / across), across, (3.9, 4.8), (0.75, 0.55, 0.2, 0.35), 2, beside)
    for number, place in enumerate(places):
        groups = cells(trace for trace in found if trace.place == place)
        for row, (measure, said) in enumerate(_CURVES.items()):
            y, above = "" if number % across else said, "" if row else title(place)
            axis = page.axis(*divmod(number, across), row, x="epoch" if row else "", y=y, title=above)
            _curves(axis, groups, measure, looks)
            axis.tick_params(labelbottom=bool(row))
    legend(page.figure, {name: stroke(**looks[name], markersize=5) for name in names}, LABEL_LINES)
    return page.figure


def _densities(axis: Axes, groups: Sequence[Sequence[Trace]], looks: Looks) -> None:
    layers = list(dict.fromkeys(name for seeds in groups for seed in seeds for name in seed.densities))
    at = np.arange(1.0, len(layers) + 1)
    for number, seeds in enumerate(groups):
        held = np.array([[seed.densities.get(name, math.nan) for name in layers] for seed in seeds])
        # A layer without a weight has no place on a logarithmic axis.
        lines = spread(np.where(held > 0, held, np.nan))
        _line(axis, at, lines, breadth(number, len(groups)), looks[seeds[0].label], number / len(groups))
    log(axis)
    axis.set_xticks(at[:: max(1, math.ceil(len(at) / _TICKS))])


def _curves(axis: Axes, groups: Sequence[Sequence[Trace]], measure: str, looks: Looks) -> None:
    for number, seeds in enumerate(groups):
        line = by_epoch([seed.metrics for seed in seeds], measure)
        look = looks[seeds[0].label]
        _line(axis, line.epochs, (line.mean, line.low, line.high), 1.3, look, number / len(groups))


def _line(
    axis: Axes, at: Values, lines: tuple[Values, Values, Values], width: float, look: Mapping[str, Any], aside: float
) -> None:
    mean, low, high = lines
    every = max(1, math.ceil(len(at) / _MARKS))
    marks = (min(int(aside * every), max(0, len(at) - 1)), every)
    edge: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.5, "rasterized": len(at) > MANY_POINTS}
    axis.plot(at, mean, linewidth=width, markevery=marks, markersize=4.5, **edge, **look)
    if np.any(high > low):
        axis.fill_between(
            at, low, high, color=look["color"], alpha=_BAND, linewidth=0, rasterized=len(at) > MANY_POINTS
        )


def _costs(axis: Axes, rows: pd.DataFrame, cost: pd.Series[Any], coloured: Sequence[str], looks: Looks) -> None:
    order = sorted(rows["sparsity"].unique(), reverse=True)
    sizes = rows["sparsity"].map({target: 26.0 + 54.0 * i / max(1, len(order) - 1) for i, target in enumerate(order)})
    grey = ~rows["method"].isin(coloured)
    axis.scatter(cost[grey], rows.loc[grey, "mean"], s=sizes[grey] / 3, c=PALE, marker=".", zorder=1)
    for name in coloured:
        mine, look = rows["method"] == name, _marker(looks[name])
        edge: dict[str, Any] = {"edgecolors": "white", "linewidths": 0.5, "zorder": 3}
        axis.scatter(cost[mine], rows.loc[mine, "mean"], s=sizes[mine], c=look["color"], marker=look["marker"], **edge)
    _cost_axis(axis, cost.dropna())


def _cost_axis(axis: Axes, cost: pd.Series[Any]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    ratio = cost.max() / cost.min() if len(cost) else 1.0
    if ratio > _LOG_FROM:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0,) if ratio > 300 else (1.0, 2.0, 5.0)))
        axis.xaxis.set_minor_locator(NullLocator())
    else:
        axis.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _amount(value)))


def _marker(look: Mapping[str, Any]) -> dict[str, Any]:
    """The look of a method as a marker alone; a dense network, which is a line elsewhere, is a star."""
    return {"color": look["color"], "marker": look.get("marker", "*"), "linestyle": "none"}


def _amount(value: float) -> str:
    for name, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if value >= size:
            return f"{value / (1e3 if name == 'k' else size):.4g}{name}"
    return f"{value:.4g}"
