"""What is measured, and what came out of it: seconds in each round, and ratios of seconds of the same round."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

TRAINING, INFERENCE = "training", "inference"
FORWARD, BACKWARD = "layer forward", "layer forward and backward"
LAYERS = "layers"  # what is asked for, of which each layer is measured in both ways
MASKS = ("erk", "global", "synflow")
SPARSITIES = (90.0, 95.0, 98.0, 99.0, 99.5, 99.9, 99.95, 99.99)  # percent
DENSE, SPARSE = "dense", "sparse"
RIVALS = {
    DENSE: "dense float32",
    "bf16": "dense bf16",
    "compile": "torch.compile",
    "onnxruntime": "onnxruntime",
}
OPPONENTS = {"sparselab": "sparselab (padded CSR)", "sparseprop": "sparseprop"}  # know single layers, and masks
SAID = {
    TRAINING: "training step",
    INFERENCE: "inference",
    FORWARD: "forward",
    BACKWARD: "forward and backward",
}
IMAGE_SIZE = 32


class Say(Protocol):
    """Tell what is going on: the piece of work, and where in it."""

    def __call__(self, work: str, detail: str = "") -> None: ...


@dataclass(frozen=True)
class Settings:
    """What was asked for; sparsities in percent, ascending. storage: of maps, in sparse training steps."""

    models: tuple[str, ...]
    what: tuple[str, ...] = (TRAINING, INFERENCE)
    masks: tuple[str, ...] = MASKS
    sparsities: tuple[float, ...] = SPARSITIES
    against: tuple[str, ...] = ("bf16", "compile", "onnxruntime")
    batch: int = 128
    width: float = 1.0
    repeats: int = 5
    minutes: float = 10.0
    storage: str = "float32"


@dataclass(frozen=True)
class Cell:
    """One line: a candidate on a batch. model: a network, or a single layer. mask and sparsity (percent) are of sparse
    arithmetic, ours and others': what dense arithmetic costs does not depend on them.
    """

    model: str
    what: str
    batch: int
    candidate: str
    mask: str = ""
    sparsity: float = 0.0

    def rival(self, candidate: str) -> Cell:
        """Another candidate at the same work, an opponent under the same masks."""
        if candidate in OPPONENTS:
            return replace(self, candidate=candidate)
        return Cell(self.model, self.what, self.batch, candidate)

    def __str__(self) -> str:
        how = RIVALS.get(self.candidate, f"{self.candidate} {self.mask} {self.sparsity:g}%")
        return f"{self.model}, {self.what}, batch {self.batch}: {how}"


@dataclass(frozen=True)
class Spread:
    """Over rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        found = list(values)
        return cls(statistics.median(found), min(found), max(found), len(found)) if found else None


@dataclass
class Facts:
    """What is known of a cell beside its seconds. macs, bytes: of one call. connected: does a path lead to a logit?
    shares: of a step's time, by kind of kernel. peak_mib: resident memory at most, start_mib: before the first step.
    """

    kept: int | None = None
    weights: int | None = None
    connected: bool | None = None
    macs: int | None = None
    bytes: int | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    peak_mib: float | None = None
    start_mib: float | None = None


@dataclass
class Measured:
    """seconds: by cell and round. notes: what there is to say once. missing: what there was no time for."""

    seconds: dict[Cell, dict[int, float]] = field(default_factory=dict)
    facts: dict[Cell, Facts] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    missing: list[Cell] = field(default_factory=list)

    def add(self, cell: Cell, turn: int, seconds: float) -> None:
        self.seconds.setdefault(cell, {})[turn] = seconds

    def about(self, cell: Cell) -> Facts:
        return self.facts.setdefault(cell, Facts())

    def note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    def time(self, cell: Cell) -> Spread | None:
        """Seconds."""
        return Spread.of(self.seconds.get(cell, {}).values())

    def ratio(self, cell: Cell, rival: str = DENSE) -> Spread | None:
        """How many times faster the cell is than another candidate, from the rounds in which both were measured."""
        own, other = self.seconds.get(cell, {}), self.seconds.get(cell.rival(rival), {})
        return Spread.of(other[turn] / own[turn] for turn in own if turn in other)

    def best_dense(self, cell: Cell) -> str:
        """The dense candidate that took the least time at this work."""
        found = {name: self.ratio(cell.rival(name)) for name in RIVALS}
        return max(found, key=lambda name: 0.0 if (ratio := found[name]) is None else ratio.median)

    def works(self) -> list[tuple[str, str, int]]:
        """(model, what, batch) of all sparse cells, in the order of measuring."""
        return list(dict.fromkeys((c.model, c.what, c.batch) for c in self.seconds if c.candidate == SPARSE))

    def line(self, model: str, what: str, batch: int, mask: str, candidate: str = SPARSE) -> list[Cell]:
        """The cells of sparse arithmetic under one kind of mask, by sparsity."""
        wanted = (model, what, batch, candidate, mask)
        cells = [c for c in self.seconds if (c.model, c.what, c.batch, c.candidate, c.mask) == wanted]
        return sorted(cells, key=lambda cell: cell.sparsity)

    def opponents(self) -> list[str]:
        """Those that any layer was measured in."""
        return [name for name in OPPONENTS if any(cell.candidate == name for cell in self.seconds)]

    def masks(self, model: str, what: str, batch: int) -> list[str]:
        return [mask for mask in MASKS if self.line(model, what, batch, mask)]

    def break_even(self, model: str, what: str, batch: int, mask: str) -> str:
        """The sparsity (percent) from which on sparse arithmetic is faster than the best dense one, in words.

        Between two measured sparsities logarithms of the ratio and of the density lie on a line.
        """
        points = []
        for cell in self.line(model, what, batch, mask):
            ratio = self.ratio(cell, self.best_dense(cell))
            if ratio is not None:
                points.append((cell.sparsity, ratio.median))
        if not points:
            return "not measured"
        if points[-1][1] < 1.0:
            return f"not up to {points[-1][0]:g}%"
        slower = [number for number, (_, ratio) in enumerate(points) if ratio < 1.0]
        if not slower:
            return f"at {points[0][0]:g}% or below"
        (low, before), (high, after) = points[slower[-1]], points[slower[-1] + 1]
        return f"at {_crossing(low, before, high, after):.4g}%"


def _crossing(low: float, before: float, high: float, after: float) -> float:
    densities = math.log(100.0 - low), math.log(100.0 - high)
    share = -math.log(before) / (math.log(after) - math.log(before))
    return 100.0 - math.exp(densities[0] + share * (densities[1] - densities[0]))


@dataclass
class Entry:
    """A candidate that takes its turns.

    ready: called before each turn, not timed; gives what is timed. Raises Unavailable where the candidate cannot run
    here. cold: `ready` leaves it cold, so that each turn needs a call that is not timed, not the first alone.
    facts: asked once, after the first turn.
    """

    cell: Cell
    ready: Callable[[], Callable[[], object]]
    cold: bool = False
    facts: Callable[[Facts], None] | None = None


class Unavailable(Exception):
    """A candidate that this machine cannot run, and why, in a line."""
