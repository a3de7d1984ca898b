"""Which pictures of how runs went a report holds, what they show of all that there is, and how to read them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd

from sparse_lab.report.dynamics import Trace, cells
from sparse_lab.report.dynamics_plot import STROKES, Looks, draw_gradients, draw_updates
from sparse_lab.report.layers_plot import draw_activations, draw_layers
from sparse_lab.report.plot import looks

NAMES = ("updates.png", "layers.png", "activations.png", "gradients.png")
METHODS = 12  # lines that can be told apart in a panel
COLUMNS = 8
PANELS = 6
PAIRS = 3

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class Picture:
    """One picture: its file's name, what it shows, a sentence on how to read it, and what draws it into a path."""

    name: str
    title: str
    sentence: str
    draw: Callable[[Path], None]


def pictures(found: Sequence[Trace], table: pd.DataFrame) -> list[Picture]:
    """The pictures for which there is something to show, in the order of `NAMES`; `table` is the long table."""
    if not found:
        return []
    styles = looks(table)
    planned = (_updates(found, styles), _layers(found, styles), _activations(found), _gradients(found, styles))
    return [picture for picture in planned if picture is not None]


def _updates(found: Sequence[Trace], styles: Looks) -> Picture | None:
    changed = [trace for trace in found if len(trace.updates) and not trace.dense]
    if not any(len(trace.updates) > 1 for trace in changed):
        return None
    moving_first = sorted(changed, key=lambda trace: len(trace.updates) < 2)
    methods, all_methods = _first((trace.label for trace in moving_first), METHODS)
    places, all_places = _first((trace.place for trace in moving_first), COLUMNS)
    shown = [trace for trace in changed if trace.label in methods and trace.place in places]
    sentence = (
        "Lines are means over seeds, pale bands reach from the lowest to the highest seed, and open markers are what "
        "the schedule asked for: where they leave their line, a network was denser or sparser than it should be; 0% "
        "live logits is a network that is cut from its input."
    )
    sentence += _left_out(len(methods), all_methods, "methods") + _left_out(len(places), all_places, "columns")
    return Picture(NAMES[0], "The masks while training", sentence, partial(draw_updates, shown, styles))


def _layers(found: Sequence[Trace], styles: Looks) -> Picture | None:
    mapped = [trace for trace in found if trace.layers is not None]
    if not mapped:
        return None
    sentence = (
        "Each map is one seed, from the first layer down to the logits: a red line or cross marks a layer that no path "
        "from input to logits crosses, a bar the share of its kept weights that lie on one; dead channels have none."
    )
    sentence += _left_out(len(mapped), len(cells(trace for trace in found if trace.by_layer)), "cells")
    return Picture(NAMES[1], "Layer by layer", sentence, partial(draw_layers, mapped, found, styles))


def _activations(found: Sequence[Trace]) -> Picture | None:
    groups = cells(trace for trace in found if trace.moments)
    if not groups:
        return None
    # The picture is about DyReLU's phasing; the others stand beside it for comparison.
    shown = sorted(groups, key=lambda seeds: all(moment.beta is None for moment in seeds[0].moments))[:PANELS]
    sentence = (
        "Share of inputs above zero at every activation, means over seeds with bands from the lowest to the highest: "
        "at 0% ReLU silences a layer, at 100% it changes nothing; β = 1 is DyReLU, no β is ReLU."
    )
    sentence += _left_out(len(shown), len(groups), "cells")
    return Picture(NAMES[2], "Positive pre-activations", sentence, partial(draw_activations, shown))


def _gradients(found: Sequence[Trace], styles: Looks) -> Picture | None:
    known = [trace for trace in found if np.isfinite(trace.gradients.to_numpy()).any()]
    if not known:
        return None
    methods, all_methods = _first((trace.label for trace in known), METHODS)
    pairs, all_pairs = _first((trace.place[:2] for trace in known), PAIRS)
    sparse = (trace.run.sparsity for trace in known if not trace.dense)
    targets, all_targets = _first(sorted(sparse, reverse=True), len(STROKES))
    shown = [
        trace
        for trace in known
        if trace.label in methods and trace.place[:2] in pairs and (trace.dense or trace.run.sparsity in targets)
    ]
    sentence = (
        "L2 norm of each part's gradient before clipping, a mean over the steps of an epoch and over seeds: a line "
        "that falls to 0 is a part that no longer learns."
    )
    sentence += _left_out(len(methods), all_methods, "methods") + _left_out(len(targets), all_targets, "sparsities")
    sentence += _left_out(len(pairs), all_pairs, "pairs of network and data set")
    return Picture(NAMES[3], "Gradients", sentence, partial(draw_gradients, shown, styles))


def _first(things: Iterable[T], most: int) -> tuple[list[T], int]:
    """The first distinct things, at most so many, and how many there are."""
    distinct = list(dict.fromkeys(things))
    return distinct[:most], len(distinct)


def _left_out(shown: int, there: int, things: str) -> str:
    return f" Shown are {shown} of {there} {things}." if shown < there else ""
