"""Accuracy against sparsity as one picture, a panel for each network and data set, and the look of every method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from sparse_lab.report.figures.style import legend, legend_height, sheet, short
from sparse_lab.report.load.published import Published
from sparse_lab.report.tables.aggregate import panels
from sparse_lab.report.tables.cell import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Paul Tol's "muted" scheme and a grey, safe for colour-blind readers. Ten colours and eleven markers have no common
# factor, so that the pairs repeat only after 110 methods.
COLOURS = ("#332288", "#CC6677", "#117733", "#56B4E9", "#DDAA33", "#882255", "#44AA99", "#AA4499", "#999933", "#888888")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "p", ">", "d")
DENSE = "#222222"
STAR: dict[str, Any] = {"linestyle": "none", "marker": "*", "markersize": 10, "markerfacecolor": "white"}
DASHES = ("--", "-.", (0, (6, 2, 1, 2, 1, 2)), (0, (2, 1)))
PANEL = (6.4, 4.4)  # inches
_X = "sparsity (logarithmic in the share of weights kept)"


def draw(table: pd.DataFrame, levels: pd.DataFrame, published: Sequence[Published]) -> Figure:
    """The long table, the levels that runs passed, and the methods' published numbers."""
    found = panels(table)
    across = min(2, max(1, len(found)))
    beside = legend_height([*table["method"].astype(str).unique(), "", ""])
    page = sheet(max(1, math.ceil(len(found) / across)), across, PANEL, (0.75, 0.6, 0.2, 0.4), beside=beside)
    styles, axes = looks(table), []
    for number, (model, dataset) in enumerate(found):
        here = table[(table["model"] == model) & (table["dataset"] == dataset)]
        passed = levels[(levels["model"] == model) & (levels["dataset"] == dataset)]
        numbers = [number for number in published if (number.model, number.dataset) == (model, dataset)]
        title = f"{short(model, 28)} on {short(dataset, 28)}"
        axes.append(page.axis(*divmod(number, across), x=_X, y="top-1 test accuracy, %", title=title))
        _panel(axes[-1], here, passed, numbers, styles)
    if not found:
        page.figure.text(0.5, 0.5, "no finished run yet", ha="center", va="center")
    _legend(page.figure, axes)
    return page.figure


def looks(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """The look of every method, the same in all panels; within a panel no colour comes twice before all are used."""
    dense = table["base"] == "dense"
    styles: dict[str, dict[str, Any]] = {
        name: {"color": DENSE, "linestyle": DASHES[i % len(DASHES)]}
        for i, name in enumerate(dict.fromkeys(table.loc[dense, "method"].astype(str)))
    }
    groups = table[~dense].groupby(["model", "dataset"])["method"]
    crowded_first = sorted((list(dict.fromkeys(names.astype(str))) for _, names in groups), key=len, reverse=True)
    taken: set[int] = set()
    for names in crowded_first:
        colours = {styles[name]["color"] for name in names if name in styles}
        for name in (name for name in names if name not in styles):
            free = [i for i in range(len(taken) + len(COLOURS)) if i not in taken]
            look = next((i for i in free if COLOURS[i % len(COLOURS)] not in colours), free[0])
            styles[name] = {"color": COLOURS[look % len(COLOURS)], "marker": MARKERS[look % len(MARKERS)]}
            taken.add(look)
            colours.add(styles[name]["color"])
    return styles


def _panel(
    axis: Axes,
    here: pd.DataFrame,
    passed: pd.DataFrame,
    beside: Sequence[Published],
    styles: dict[str, dict[str, Any]],
) -> None:
    sparse = here[here["base"] != "dense"]
    for name, rows in here[here["base"] == "dense"].groupby("method"):
        for row in rows.to_dict("records"):
            axis.axhline(row["mean"], linewidth=1.3, label=str(name), **styles[str(name)])
            if not math.isnan(row["std"]):
                low, high = row["mean"] - row["std"], row["mean"] + row["std"]
                axis.axhspan(low, high, color=DENSE, alpha=0.08, linewidth=0)
    sparser = passed[passed["target"] > 0]
    _levels(axis, sparser, styles)
    _sparsity_axis(axis, pd.concat([sparse["sparsity"], sparser["sparsity"]]).astype(float))
    names = list(dict.fromkeys(sparse["method"].astype(str)))
    for place, name in enumerate(names):
        rows = sparse[sparse["method"] == name].sort_values("sparsity")
        aside = 10 ** (_step(axis, sparse, len(names)) * (place - (len(names) - 1) / 2))
        axis.errorbar(
            (1 - rows["sparsity"]) * aside,
            rows["mean"],
            yerr=rows["std"],
            label=name,
            linewidth=1.4,
            markersize=5.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            elinewidth=1.0,
            capsize=2.5,
            zorder=3,
            **styles[name],
        )
    _published(axis, here, beside, styles)


def _levels(axis: Axes, passed: pd.DataFrame, styles: dict[str, dict[str, Any]]) -> None:
    """The curve through every level of the runs that went step by step, a mean over seeds."""
    stepwise = passed[passed.groupby("run")["level"].transform("count") > 1]
    if stepwise.empty:
        return
    # The test set may have been read at the last level only; then the way there is known on validation images alone.
    tested = bool(pd.to_numeric(stepwise["test_accuracy"], errors="coerce").notna().all())
    kind = "test" if tested else "validation"
    for (name, _), rows in stepwise.groupby(["method", "cell"]):
        numbers = rows[["level", "sparsity", f"{kind}_accuracy"]].apply(pd.to_numeric, errors="coerce")
        curve = numbers.groupby("level").mean().dropna()
        axis.plot(
            1 - curve["sparsity"],
            curve[f"{kind}_accuracy"],
            label=f"levels on the way ({kind})",
            linestyle=":",
            linewidth=1.1,
            color=styles[str(name)]["color"],
            zorder=2,
        )


def _published(axis: Axes, here: pd.DataFrame, beside: Sequence[Published], styles: dict[str, dict[str, Any]]) -> None:
    full = here[here["width"] == 1.0]
    first = full.drop_duplicates("base").set_index("base")["method"].to_dict()
    shown = [number for number in beside if number.method in first]
    seen = full.loc[full["base"] != "dense", "sparsity"]
    low, high = seen.min(), seen.max()
    for number in shown:
        colour = styles[first[number.method]]["color"]
        spread = number.std if number.std is not None else math.nan
        if number.method == "dense":
            edge = axis.get_yaxis_transform()
            axis.plot(
                [0], [number.top1], color=colour, transform=edge, clip_on=False, zorder=5, label="published", **STAR
            )
        elif low - 5e-5 <= number.sparsity <= high + 5e-5:
            axis.errorbar(
                1 - number.sparsity,
                number.top1,
                yerr=spread,
                color=colour,
                capsize=2,
                elinewidth=1.0,
                zorder=4,
                label="published",
                **STAR,
            )


def _step(axis: Axes, sparse: pd.DataFrame, methods: int) -> float:
    """Decades between neighbours: methods share their sparsities, and their bars would hide each other."""
    right, left = axis.get_xlim()
    share = 0.03 if sparse["sparsity"].nunique() > 1 else 0.15
    return share * abs(math.log10(right / left)) / methods


def _sparsity_axis(axis: Axes, sparsities: pd.Series[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axis.set_xscale("log")
    kept = 1 - sparsities
    kept = kept[kept > 0]
    most, least = (kept.max(), kept.min()) if len(kept) else (0.1, 0.01)
    margin = max(1.15, (most / least) ** 0.06) if most / least > 1.5 else 2.0
    axis.set_xlim(most * margin, least / margin)
    decades = math.log10(most / least)
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2.5 else (1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda share, _: percent(1 - share)))
    axis.xaxis.set_minor_locator(LogLocator(subs=tuple(range(2, 10))) if decades > 2.5 else NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    from matplotlib.lines import Line2D

    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    general = {
        label: entries.pop(label) for label in list(entries) if label == "published" or label.startswith("levels on")
    }
    for label in general:
        look = STAR if label == "published" else {"linestyle": ":", "linewidth": 1.1}
        entries[label] = Line2D([], [], color="#555555", **look)
    if entries:
        last = len(entries) - len(general)
        # Dense first, then the methods by name, then what is common to all of them.
        order = sorted(list(entries)[:last], key=lambda label: (not label.startswith("dense"), label))
        legend(figure, {label: entries[label] for label in [*order, *general]})
