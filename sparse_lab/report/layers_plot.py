"""What happens layer by layer: layers.png and activations.png."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparse_lab.report.dynamics import Layers, Trace, cells, course
from sparse_lab.report.dynamics_plot import GREY, LABEL_LINES, Looks, breadth, last_epoch, put, strokes_of, title
from sparse_lab.report.plot import LEGEND_WIDTH, canvas, legend, legend_height, plain, short
from sparse_lab.report.table import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm

COLOURS = "cividis"  # even in lightness, and the same to colour-blind readers
DEAD = "#CC3311"
PHASES: dict[str, dict[str, Any]] = {
    "before": {"color": "#56B4E9", "marker": "o", "linestyle": ":"},
    "during": {"color": "#DDAA33", "marker": "s", "linestyle": "--"},
    "after": {"color": "#332288", "marker": "^", "linestyle": "-"},
}
_SAME = {"first": "before", "middle": "during", "last": "after"}
_NAMES = 24  # layer names along an axis; of more layers every second or third is named
_CHARS = 20


def draw_layers(mapped: Sequence[Trace], found: Sequence[Trace], looks: Looks, path: Path) -> None:
    """Writes a PNG: a heat map of every layer's density for each of the `mapped` runs, the share of its weights that
    has an effect beside it, and below all of them the dead channels of the runs of these cells in `found`.
    """
    across = min(2, len(mapped))
    down = math.ceil(len(mapped) / across)
    layers = [trace.layers for trace in mapped if trace.layers is not None]
    tall = min(4.6, max(2.6, 0.14 * max(len(one.names) for one in layers) + 0.9))
    low = max(3.2, legend_height(_named(mapped), LABEL_LINES))
    figure = canvas(6.0 * across + LEGEND_WIDTH, tall * down + low)
    parts: Any = figure.subfigures(2, 1, height_ratios=[tall * down, low])
    above, below = parts
    axes = above.subplots(down, 2 * across, squeeze=False, width_ratios=[3.6, 1.0] * across)
    for axis in axes.flat:
        axis.set_visible(False)
    norm = _scale(layers)
    for number, (trace, one) in enumerate(zip(mapped, layers, strict=True)):
        row, column = divmod(number, across)
        heat, bars = axes[row, 2 * column : 2 * column + 2]
        _heat(heat, trace, one, norm)
        _effective(bars, one)
    _colour_bar(above, axes, norm)
    _dead_channels(below, [trace for trace in found if trace.run.cell in {one.run.cell for one in mapped}], looks)
    figure.savefig(path, format="png")


def draw_activations(groups: Sequence[Sequence[Trace]], path: Path) -> None:
    """Writes a PNG: a panel a cell, the share of positive pre-activations of every activation at three epochs.

    groups: the seeds of each cell, all with moments. Mean over seeds, a band from the lowest to the highest.
    """
    across = min(3, len(groups))
    down = math.ceil(len(groups) / across)
    figure = canvas(5.0 * across, 3.9 * down)
    axes = figure.subplots(down, across, squeeze=False)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, seeds in zip(axes.flat, groups, strict=False):
        _moments(axis, seeds)
    for axis in axes[:, 0]:
        axis.set_ylabel("positive pre-activations, %")
    figure.savefig(path, format="png")


def _scale(layers: Sequence[Layers]) -> LogNorm:
    from matplotlib.colors import LogNorm

    alive = np.concatenate([one.density[one.density > 0] for one in layers])
    low, high = (float(alive.min()), float(alive.max())) if len(alive) else (0.1, 1.0)
    return LogNorm(vmin=min(low, high / 2), vmax=high)


def _heat(axis: Axes, trace: Trace, one: Layers, norm: LogNorm) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_visible(True)
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
    every = math.ceil(len(one.names) / (2 * _NAMES))
    axis.set_yticks(range(0, len(one.names), every), [short(name, _CHARS) for name in one.names[::every]], fontsize=6.5)
    axis.set_xlabel("epoch")
    axis.set_title(f"{short(trace.label, 48)}\n{title(trace.place)}, seed {trace.run.seed}", fontsize=9.5, loc="left")


def _effective(axis: Axes, one: Layers) -> None:
    axis.set_visible(True)
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


def _colour_bar(figure: Any, axes: NDArray[np.object_], norm: LogNorm) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import FuncFormatter

    bar = figure.colorbar(
        ScalarMappable(norm, COLOURS),
        ax=axes.ravel().tolist(),
        location="right",
        shrink=0.8,
        aspect=40,
        format=FuncFormatter(lambda density, _: percent(density)),
    )
    bar.set_label("density of a layer: share of its weights kept (red line: dead, no path crosses it)")


def _dead_channels(figure: Any, found: Sequence[Trace], looks: Looks) -> None:
    axis = figure.subplots()
    end, strokes, groups = last_epoch(found), strokes_of(found), cells(found)
    for number, seeds in enumerate(groups):
        trace = seeds[0]
        look = {"color": looks[trace.label]["color"], "linestyle": strokes.get(trace.run.sparsity, "-")}
        put(axis, course(seeds, "dead", end), 100.0, linewidth=breadth(number, len(groups)), **look)
    axis.margins(x=0.01)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("epoch")
    axis.set_ylabel("dead channels, %")
    plain(axis)
    legend(figure, dict(zip(_named([seeds[0] for seeds in groups]), axis.get_lines(), strict=True)), LABEL_LINES)


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
        shares = np.ma.masked_invalid([[100 * one.get(name, math.nan) for name in names] for one in same])
        mean, low, high = (np.ma.filled(part, np.nan) for part in (shares.mean(0), shares.min(0), shares.max(0)))
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
    axis.set_title(f"{short(first.label, 44)}\n{title(first.place)}", fontsize=10, pad=20)
    plain(axis)
