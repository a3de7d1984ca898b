"""Speed against sparsity as one picture: a panel for training and for each batch of inference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_lab.bench.cells import (
    DENSE,
    INFERENCE,
    MASKS,
    OPPONENTS,
    RIVALS,
    SAID,
    SPARSE,
    TRAINING,
    Cell,
    Measured,
)
from sparse_lab.records.atomic_io import atomic_write
from sparse_lab.report.figures.accuracy import COLOURS
from sparse_lab.report.figures.style import legend, legend_height, sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = (4.6, 4.0)  # inches
INSET = (0.75, 0.65, 0.2, 0.4)
LOOKS: dict[str, dict[str, Any]] = {
    "erk": {"marker": "o", "linestyle": "-"},
    "global": {"marker": "s", "linestyle": "--"},
    "synflow": {"marker": "^", "linestyle": "-."},
}
OTHERS: dict[str, dict[str, Any]] = {
    "sparselab": {"marker": "x", "linestyle": (0, (1, 1))},
    "sparseprop": {"marker": "+", "linestyle": (0, (3, 1, 1, 1))},
}
TICKS = (90.0, 95.0, 98.0, 99.0, 99.5, 99.9, 99.95, 99.99)  # percent, if they lie within what was measured


def save(path: Path, measured: Measured, head: dict[str, str]) -> None:
    """Write the picture as PNG."""
    figure = draw(measured, f"{head['machine']}; torch {head['torch']}; {head['date']}")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def draw(measured: Measured, below: str) -> Figure:
    """A colour a network or layer, a line a kind of masks with a band from the lowest to the highest ratio; hollow:
    nothing leads from the image to a logit. The dotted line is the fastest dense candidate of the network. Other
    libraries have lines of their own.
    """
    works = measured.works()
    panels = list(dict.fromkeys((what, batch) for _, what, batch in works))
    colours = {
        model: COLOURS[i % len(COLOURS)] for i, model in enumerate(dict.fromkeys(model for model, _, _ in works))
    }
    entries = {
        f"{model}, {mask}": _stroke(colours[model], **LOOKS[mask])
        for model in colours
        for mask in MASKS
        if any(measured.line(*work, mask) for work in works if work[0] == model)
    }
    networks = {model for model, what, _ in works if what in (TRAINING, INFERENCE)}
    entries |= {
        f"{model}, best dense": _stroke(colours[model], linestyle=":") for model in colours if model in networks
    }
    entries |= {OPPONENTS[name]: _stroke("#888888", **OTHERS[name]) for name in measured.opponents()}
    entries["no path to a logit"] = _stroke("#888888", linestyle="none", marker="o", markerfacecolor="white")
    page = sheet(1, len(panels), PANEL, INSET, beside=legend_height([*entries]))
    for number, (what, batch) in enumerate(panels):
        y = "" if number else "times faster than dense float32"
        named = f"{SAID[what]}, batch {batch}"
        axis = page.axis(0, number, x="zeros, % (logarithmic in what is kept)", y=y, title=named)
        for place, (model, colour) in enumerate(colours.items()):
            if (model, what, batch) in works:
                _lines(axis, measured, (model, what, batch), colour)
                _others(axis, measured, (model, what, batch), colour)
                if model in networks:
                    _best_dense(axis, measured, Cell(model, what, batch, DENSE), colour, place)
        _scales(axis, [c.sparsity for c in measured.seconds if (c.candidate, c.what, c.batch) == (SPARSE, what, batch)])
    page.figure.text(0.995, 0.005, below, ha="right", va="bottom", fontsize=6.5, color="#777777")
    legend(page.figure, entries)
    return page.figure


def _lines(axis: Axes, measured: Measured, work: tuple[str, str, int], colour: str) -> None:
    for mask in measured.masks(*work):
        found = [(cell, measured.ratio(cell)) for cell in measured.line(*work, mask)]
        points = [(cell, ratio) for cell, ratio in found if ratio is not None]
        kept = [100.0 - cell.sparsity for cell, _ in points]
        axis.fill_between(kept, [r.low for _, r in points], [r.high for _, r in points], color=colour, alpha=0.15, lw=0)
        axis.plot(kept, [r.median for _, r in points], color=colour, markersize=4.5, linewidth=1.3, **LOOKS[mask])
        cut = [(100.0 - c.sparsity, r.median) for c, r in points if measured.about(c).connected is False]
        axis.plot(*zip(*cut, strict=True) if cut else ([], []), **_hollow(colour, mask))


def _others(axis: Axes, measured: Measured, work: tuple[str, str, int], colour: str) -> None:
    for name, look in OTHERS.items():
        for mask in measured.masks(*work):
            found = [(cell, measured.ratio(cell)) for cell in measured.line(*work, mask, name)]
            points = [(100.0 - cell.sparsity, ratio.median) for cell, ratio in found if ratio is not None]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, markersize=5, linewidth=1.0, **look)


def _best_dense(axis: Axes, measured: Measured, dense: Cell, colour: str, place: int) -> None:
    best = measured.best_dense(dense)
    ratio = measured.ratio(dense.rival(best))
    if ratio is not None:
        axis.axhline(ratio.median, color=colour, linestyle=":", linewidth=1.1)
        # side by side, for the lines of two networks may lie one upon the other
        at = (0.99 - 0.25 * place, ratio.median)
        look: dict[str, Any] = {"fontsize": 7, "color": colour, "ha": "right", "va": "bottom"}
        axis.annotate(RIVALS[best], at, xycoords=("axes fraction", "data"), **look)


def _scales(axis: Axes, sparsities: list[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = min(sparsities), max(sparsities)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim((100.0 - low) * 1.25, (100.0 - high) / 1.25)
    axis.xaxis.set_major_locator(FixedLocator([100.0 - tick for tick in TICKS if low <= tick <= high]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda kept, _: f"{100.0 - kept:.6g}"))
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(labelsize=8)


def _hollow(colour: str, mask: str) -> dict[str, Any]:
    marker = LOOKS[mask]["marker"]
    return {"linestyle": "none", "marker": marker, "color": colour, "markerfacecolor": "white", "markersize": 5}


def _stroke(colour: str, **look: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, markersize=5, **look)
