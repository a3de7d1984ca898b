"""What happens layer by layer: layers.png and activations.png."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_lab.report.figures.dynamics import GREY, LABEL_LINES, Looks, breadth, last_epoch, put, strokes_of, title
from sparse_lab.report.figures.style import (
    LEGEND_WIDTH,
    Sheet,
    canvas,
    columns,
    legend,
    legend_height,
    plain,
    sheet,
    short,
)
from sparse_lab.report.load.traces import Layers, Trace, cells, course, spread
from sparse_lab.report.tables.cell import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

COLOURS = "cividis"  # even in lightness, and the same to colour-blind readers
DEAD = "#CC3311"
PHASES: dict[str, dict[str, Any]] = {
    "before": {"color": "#56B4E9", "marker": "o", "linestyle": ":"},
    "during": {"color": "#DDAA33", "marker": "s", "linestyle": "--"},
    "after": {"color": "#332288", "marker": "^", "linestyle": "-"},
}
_SAME = {"first": "before", "middle": "during", "last": "after"}
_NAMES = 18  # layer names along an axis; of more layers every second or third is named
_CHARS = 20


def draw_layers(mapped: Sequence[Trace], found: Sequence[Trace], looks: Looks) -> Figure:
    """A heat map of every layer's density for each of the `mapped` runs, the share of its weights that has an effect
    beside it, and below all of them the dead channels of the runs of these cells in `found`.
    """
    across = min(2, len(mapped))
    down = math.ceil(len(mapped) / across)
    layers = [trace.layers for trace in mapped if trace.layers is not None]
    tall = min(4.8, max(2.8, 0.14 * max(len(one.names) for one in layers) + 1.1))
    low = max(3.2, legend_height(_named(mapped), LABEL_LINES))
    figure = canvas(6.0 * across + LEGEND_WIDTH, tall * down + low)
    maps = Sheet(figure, (6.0, tall), (1.45, 0.6, 0.2, 0.5))
    norm = _scale(layers)
    for number, (trace, one) in enumerate(zip(mapped, layers, strict=True)):
        heat = maps.axis(*divmod(number, across), x="epoch")
        left, bottom, width, height = heat.get_position().bounds
        heat.set_position((left, bottom, 0.76 * width, height))
        _heat(heat, trace, one, norm)
        _effective(figure.add_axes((left + 0.8 * width, bottom, 0.2 * width, height)), one)
    _colour_bar(figure, 6.0 * across, min(tall * down, 5.0), norm)
    below = Sheet(figure, (6.0 * across, low), (0.75, 0.55, 0.2, 0.35), top=tall * down)
    beside = [trace for trace in found if trace.run.cell in {one.run.cell for one in mapped}]
    _dead_channels(below.axis(0, 0, x="epoch", y="dead channels, %"), beside, looks)
    return figure


def draw_activations(groups: Sequence[Sequence[Trace]]) -> Figure:
    """A panel a cell, the share of positive pre-activations of every activation at three epochs.

    groups: the seeds of each cell, all with moments. Mean over seeds, a band from the lowest to the highest.
    """
    across = columns(len(groups))
    page = sheet(math.ceil(len(groups) / across), across, (5.4, 4.3), (0.75, 1.4, 0.2, 0.75))
    for number, seeds in enumerate(groups):
        y = "" if number % across else "positive pre-activations, %"
        _moments(page.axis(*divmod(number, across), y=y), seeds)
    return page.figure


def _scale(layers: Sequence[Layers]) -> LogNorm:
    from matplotlib.colors import LogNorm

    alive = np.concatenate([one.density[one.density > 0] for one in layers])
    low, high = (float(alive.min()), float(alive.max())) if len(alive) else (0.1, 1.0)
    return LogNorm(vmin=min(low, high / 2), vmax=high)


def _heat(axis: Axes, trace: Trace, one: Layers, norm: LogNorm) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.grid(False)
    end = max(last_epoch([trace]), one.epochs[-1])
    # What the last update leaves holds to the end; a static mask at epoch 0 of 0 still needs a width.
    edges = np.append(one.epochs, end if end > one.epochs[0] else one.epochs[0] + 1)
    rows = np.arange(len(one.names) + 1) - 0.5
    density = np.ma.masked_invalid(np.where(one.density > 0, one.density, np.nan))
    axis.set_facecolor("#dddddd")
    axis.pcolormesh(edges, rows, density, norm=norm, cmap=COLOURS, rasterized=True)
    dead, at = np.nonzero(one.effective == 0)
    axis.hlines(dead, edges[at], edges[at + 1], color=DEAD, linewidth=1.2)
    axis.set_ylim(len(one.names) - 0.5, -0.5)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    every = math.ceil(len(one.names) / (3 * _NAMES))
    axis.set_yticks(range(0, len(one.names), every), [short(name, _CHARS) for name in one.names[::every]], fontsize=6.5)
    said = f"{short(trace.label, 48)}\n{title(trace.place)}, seed {trace.run.seed}"
    axis.set_title(said, y=1.0, fontsize=9.5, loc="left")


def _effective(axis: Axes, one: Layers) -> None:
    last = 100 * one.effective[:, -1]
    rows = np.arange(len(one.names))
    axis.barh(rows, np.nan_to_num(last), color="#44AA99", height=0.75)
    axis.plot(np.full((last == 0).sum(), 3.0), rows[last == 0], "x", color=DEAD, markersize=4)
    axis.set_xlim(0, 100)
    axis.set_ylim(len(one.names) - 0.5, -0.5)
    axis.set_yticks([])
    axis.set_xticks([0, 50, 100])
    axis.set_xlabel("effective at the\nend, % of kept", fontsize=8)
    plain(axis)


def _colour_bar(figure: Figure, left: float, tall: float, norm: LogNorm) -> None:
    """To the right of the maps, `left` inches from the figure's left side."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import FuncFormatter, NullLocator

    width, height = figure.get_size_inches()
    axis = figure.add_axes(((left + 0.1) / width, 1 - (tall - 0.5) / height, 0.16 / width, (tall - 1.0) / height))
    form = FuncFormatter(lambda density, _: percent(density))
    bar = figure.colorbar(ScalarMappable(norm, COLOURS), cax=axis, format=form)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_label("density of a layer: share of its weights kept\n(red line: dead, no path crosses it)")


def _dead_channels(axis: Axes, found: Sequence[Trace], looks: Looks) -> None:
    end, strokes, groups = last_epoch(found), strokes_of(found), cells(found)
    for number, seeds in enumerate(groups):
        trace = seeds[0]
        look = {"color": looks[trace.label]["color"], "linestyle": strokes.get(trace.run.sparsity, "-")}
        put(axis, course(seeds, "dead", end), 100.0, linewidth=breadth(number, len(groups)), **look)
    axis.margins(x=0.01)
    axis.set_ylim(bottom=0)
    entries = dict(zip(_named([seeds[0] for seeds in groups]), axis.get_lines(), strict=True))
    figure = axis.get_figure(root=True)
    assert figure is not None
    legend(figure, entries, LABEL_LINES, top=(1 - axis.get_position().y1) * figure.get_size_inches()[1])


def _named(found: Sequence[Trace]) -> list[str]:
    """A name for each cell: its method and sparsity, with network and data set where there are several."""
    if len({trace.place[:2] for trace in found}) == 1:
        return [f"{trace.label}, {percent(trace.run.sparsity)}" for trace in found]
    return [f"{trace.label}: {title(trace.place)}" for trace in found]


def _moments(axis: Axes, seeds: Sequence[Trace]) -> None:
    first = seeds[0]
    names = list(first.moments[-1].shares)
    for moment in first.moments:
        same = [m.shares for seed in seeds for m in seed.moments if m.phase == moment.phase]
        mean, low, high = spread(np.array([[100 * one.get(name, math.nan) for name in names] for one in same]))
        beta = "" if moment.beta is None else f", β = {moment.beta:.2g}"
        look = PHASES[_SAME.get(moment.phase, moment.phase)]
        label = f"{moment.phase}: epoch {moment.epoch:g}{beta}"
        axis.plot(range(len(names)), mean, label=label, markersize=4, linewidth=1.4, **look)
        axis.fill_between(range(len(names)), low, high, color=look["color"], alpha=0.16, linewidth=0)
    axis.axhline(50, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    axis.set_ylim(-3, 103)
    every = math.ceil(len(names) / _NAMES)
    ticks = [short(name, _CHARS) for name in names[::every]]
    axis.set_xticks(range(0, len(names), every), ticks, rotation=90, fontsize=7)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=7, frameon=False, columnspacing=1.0)
    axis.set_title(f"{short(first.label, 44)}\n{title(first.place)}", y=1.0, fontsize=10, pad=20)
