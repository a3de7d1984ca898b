"""Which pictures a report holds, what they show of all that there is, and how to read them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pandas as pd

from sparse_lab.report.figures.accuracy import draw, looks
from sparse_lab.report.figures.costs_and_curves import COSTS, draw_costs, draw_curves, draw_densities
from sparse_lab.report.figures.dynamics import STROKES, Looks, draw_gradients, draw_updates
from sparse_lab.report.figures.layers import draw_activations, draw_layers
from sparse_lab.report.load.published import Published
from sparse_lab.report.load.traces import ACTIVATIONS, GRADIENTS, METRICS, Trace, cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = ("accuracy", "costs", "density", "curves", "updates", "layers", "activations", "gradients")
ROWS = 40  # methods in the picture of accuracies
METHODS = 12  # lines that can be told apart in a panel
COLUMNS = 6
MAPS = 6
PANELS = 6
PAIRS = 3

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class Picture:
    """One picture: its files' name, what it shows, a sentence on how to read it, what draws it, and how many panels."""

    name: str
    title: str
    sentence: str
    draw: Callable[[], Figure]
    panels: int = 1


def pictures(
    table: pd.DataFrame, levels: pd.DataFrame, published: Sequence[Published], found: Sequence[Trace]
) -> list[Picture]:
    """The pictures for which there is something to show, in the order of `NAMES`; that of accuracies is always there.

    table, levels: the long table and the levels; found: the traces of their runs. What the pictures show is read here.
    """
    styles, best = looks(table), _best(table)
    planned = (
        _accuracies(table, levels, published, best),
        _costs(table, best, styles),
        _densities(found, best, styles),
        _curves(found, best, styles),
        _updates(found, styles),
        _layers(found, styles),
        _activations(found),
        _gradients(found, styles),
    )
    return [picture for picture in planned if picture is not None]


def _best(table: pd.DataFrame) -> list[str]:
    """The methods by falling mean accuracy, the dense networks first."""
    means = table.assign(_sparse=table["base"] != "dense").groupby("method", sort=False)[["_sparse", "mean"]].mean()
    return [str(name) for name in means.sort_values(["_sparse", "mean"], ascending=[True, False], kind="stable").index]


def _accuracies(
    table: pd.DataFrame, levels: pd.DataFrame, published: Sequence[Published], best: Sequence[str]
) -> Picture:
    sentence = (
        "Markers are means with their standard deviation, dashed lines dense networks, stars published numbers, dotted "
        "lines the levels that a run passed. Methods at one sparsity stand a little beside each other."
    )
    sentence += _best_of(ROWS, len(best))
    shown, passed = (rows[rows["method"].isin(best[:ROWS])] for rows in (table, levels))
    return Picture(NAMES[0], "Accuracy against sparsity", sentence, partial(draw, shown, passed, published), 8)


def _costs(table: pd.DataFrame, best: Sequence[str], styles: Looks) -> Picture | None:
    known = table[table[list(COSTS)].notna().any(axis=1)]
    pairs, all_pairs = _first(zip(known["model"], known["dataset"], strict=True), PAIRS)
    if not pairs:
        return None
    shown = known[[pair in pairs for pair in zip(known["model"], known["dataset"], strict=True)]]
    sentence = (
        "Each marker is a cell, the smaller the sparser. Time and memory are those of the run itself, without the "
        "networks that it starts from, and compare only on one machine; FLOPs are what the sparse network needs for "
        "one image if no zero is computed, 2 a multiply-add."
    )
    if len(best) > METHODS:
        sentence += f" The {METHODS} of {len(best)} methods with the highest mean accuracy have a colour."
    sentence += _left_out(len(pairs), all_pairs, "pairs of network and data set")
    return Picture(NAMES[1], "What accuracy costs", sentence, partial(draw_costs, shown, best[:METHODS], styles), 9)


def _densities(found: Sequence[Trace], best: Sequence[str], styles: Looks) -> Picture | None:
    known = [trace for trace in found if not trace.dense and trace.densities]
    shown, said, columns = _columns(known, best)
    sentence = "Which layers keep their weights: means over seeds, bands from the lowest to the highest seed." + said
    drawn = partial(draw_densities, shown, styles)
    return Picture(NAMES[2], "Density of the layers", sentence, drawn, columns) if shown else None


def _curves(found: Sequence[Trace], best: Sequence[str], styles: Looks) -> Picture | None:
    shown, said, columns = _columns([trace for trace in found if trace.has(METRICS)], best)
    shown = [trace for trace in shown if len(trace.metrics)]
    sentence = "Means over seeds, bands from the lowest to the highest seed; the epochs of all phases in a row." + said
    drawn = partial(draw_curves, shown, styles)
    return Picture(NAMES[3], "Training curves", sentence, drawn, 2 * columns) if shown else None


def _columns(known: Sequence[Trace], best: Sequence[str]) -> tuple[list[Trace], str, int]:
    """The runs of the first places and their best methods, what is left out, and the number of places."""
    methods = [name for name in best if name in {trace.label for trace in known}]
    places, all_places = _first((trace.place for trace in known), COLUMNS)
    shown = [trace for trace in known if trace.label in methods[:METHODS] and trace.place in places]
    return shown, _best_of(METHODS, len(methods)) + _left_out(len(places), all_places, "columns"), len(places)


def _updates(found: Sequence[Trace], styles: Looks) -> Picture | None:
    changed = [trace for trace in found if trace.changes and not trace.dense]
    moving_first = sorted(changed, key=lambda trace: trace.changes < 2)
    methods, all_methods = _first((trace.label for trace in moving_first), METHODS)
    places, all_places = _first((trace.place for trace in moving_first), COLUMNS)
    wanted = [trace for trace in changed if trace.label in methods and trace.place in places]
    shown = [trace for trace in wanted if len(trace.updates)]
    if not any(len(trace.updates) > 1 for trace in shown):
        return None
    sentence = (
        "Lines are means over seeds, pale bands reach from the lowest to the highest seed, and open markers are what "
        "the schedule asked for: where they leave their line, a network was denser or sparser than it should be; 0% "
        "live logits is a network that is cut from its input."
    )
    sentence += _left_out(len(methods), all_methods, "methods") + _left_out(len(places), all_places, "columns")
    return Picture(
        NAMES[4], "The masks while training", sentence, partial(draw_updates, shown, styles), 4 * len(places)
    )


def _layers(found: Sequence[Trace], styles: Looks) -> Picture | None:
    groups = cells(trace for trace in found if trace.by_layer)
    mapped = [seeds[0] for seeds in groups[:MAPS] if seeds[0].layers is not None]
    if not mapped:
        return None
    beside = [trace for trace in found if trace.run.cell in {one.run.cell for one in mapped} and len(trace.updates)]
    sentence = (
        "Each map is one seed, from the first layer down to the logits: a red line or cross marks a layer that no path "
        "from input to logits crosses, a bar the share of its kept weights that lie on one; dead channels have none."
    )
    sentence += _left_out(len(mapped), len(groups), "cells")
    drawn = partial(draw_layers, mapped, beside, styles)
    return Picture(NAMES[5], "Layer by layer", sentence, drawn, 2 * len(mapped))


def _activations(found: Sequence[Trace]) -> Picture | None:
    groups = cells(trace for trace in found if trace.has(ACTIVATIONS))
    # The picture is about DyReLU's phasing; the others stand beside it for comparison.
    first = sorted(groups, key=lambda seeds: not seeds[0].phased)[:PANELS]
    shown = [known for seeds in first if (known := [trace for trace in seeds if trace.moments])]
    if not shown:
        return None
    sentence = (
        "Share of inputs above zero at every activation, means over seeds with bands from the lowest to the highest: "
        "at 0% ReLU silences a layer, at 100% it changes nothing; β = 1 is DyReLU, no β is ReLU."
    )
    sentence += _left_out(len(shown), len(groups), "cells")
    return Picture(NAMES[6], "Positive pre-activations", sentence, partial(draw_activations, shown), 2 * len(shown))


def _gradients(found: Sequence[Trace], styles: Looks) -> Picture | None:
    known = [trace for trace in found if trace.has(GRADIENTS)]
    methods, all_methods = _first((trace.label for trace in known), METHODS)
    pairs, all_pairs = _first((trace.place[:2] for trace in known), PAIRS)
    sparse = (trace.run.sparsity for trace in known if not trace.dense)
    targets, all_targets = _first(sorted(sparse, reverse=True), len(STROKES))
    wanted = (trace for trace in known if trace.dense or trace.run.sparsity in targets)
    wanted = (trace for trace in wanted if trace.label in methods and trace.place[:2] in pairs)
    shown = [trace for trace in wanted if np.isfinite(trace.gradients.to_numpy()).any()]
    if not shown:
        return None
    sentence = (
        "L2 norm of each part's gradient before clipping, a mean over the steps of an epoch and over seeds: a line "
        "that falls to 0 is a part that no longer learns."
    )
    sentence += _left_out(len(methods), all_methods, "methods") + _left_out(len(targets), all_targets, "sparsities")
    sentence += _left_out(len(pairs), all_pairs, "pairs of network and data set")
    return Picture(NAMES[7], "Gradients", sentence, partial(draw_gradients, shown, styles), 5 * len(pairs))


def _first(things: Iterable[T], most: int) -> tuple[list[T], int]:
    """The first distinct things, at most so many, and how many there are."""
    distinct = list(dict.fromkeys(things))
    return distinct[:most], len(distinct)


def _best_of(most: int, there: int) -> str:
    return f" Shown are the {most} of {there} methods with the highest mean accuracy." if there > most else ""


def _left_out(shown: int, there: int, things: str) -> str:
    return f" Shown are {shown} of {there} {things}." if shown < there else ""
