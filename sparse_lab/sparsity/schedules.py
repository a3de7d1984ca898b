"""When the mask changes, and how sparse the network is then. Frozen, stateless: two questions, asked by step.

Steps are optimizer steps since the start of the run's phase. `due(step)`: change the mask before this step?
`sparsity(step)`: the sparsity that holds from this step on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    def due(self, step: int) -> bool: ...

    def sparsity(self, step: int) -> float: ...


@dataclass(frozen=True)
class OneShot:
    """Straight to the target before step `at`."""

    target: float
    at: int = 0

    def due(self, step: int) -> bool:
        return step == self.at

    def sparsity(self, step: int) -> float:
        return self.target if step >= self.at else 0.0


@dataclass(frozen=True)
class Constant:
    """The target from the first step to the last: static sparse training, or drop-and-grow at a fixed budget."""

    target: float

    def due(self, step: int) -> bool:
        return step == 0

    def sparsity(self, step: int) -> float:
        return self.target


@dataclass(frozen=True)
class Iterative:
    """Every `every` steps a `share` of what remains goes, until the target (the last round takes what is left)."""

    target: float
    share: float
    every: int
    initial: float = 0.0

    def rounds(self) -> int:
        """Number of mask changes. A target up to a twentieth of a round beyond a round's end needs no round more:
        98.85% is how papers write 1 - 0.8^20 = 98.847%, and that is 20 rounds.
        """
        remaining = (1.0 - self.target) / (1.0 - self.initial)
        return max(1, math.ceil(math.log(remaining) / math.log(1.0 - self.share) - 0.05)) if remaining < 1.0 else 1

    def due(self, step: int) -> bool:
        return step % self.every == 0 and step // self.every < self.rounds()

    def sparsity(self, step: int) -> float:
        done = step // self.every + 1
        if done >= self.rounds():
            return self.target
        return 1.0 - (1.0 - self.initial) * (1.0 - self.share) ** done


@dataclass(frozen=True)
class Cubic:
    """Gradual magnitude pruning: s_t = s_f + (s_i - s_f)(1 - progress)^3 (Zhu & Gupta 2017)."""

    target: float
    begin: int
    end: int
    every: int
    initial: float = 0.0

    def due(self, step: int) -> bool:
        return self.begin <= step <= self.end and ((step - self.begin) % self.every == 0 or step == self.end)

    def sparsity(self, step: int) -> float:
        if step < self.begin:
            return 0.0
        if step >= self.end:
            return self.target
        progress = (step - self.begin) / (self.end - self.begin)
        return self.target + (self.initial - self.target) * (1.0 - progress) ** 3


@dataclass(frozen=True)
class Alternating:
    """Dense and sparse by turns (AC/DC, arXiv 2106.12379): dense up to `begin`, then turns of `turn` steps, sparse
    first; dense once more from `dense_from` to `end`, then sparse to the last step. What does not fill a turn before
    `dense_from` makes the turn before it longer.
    """

    target: float
    begin: int
    turn: int
    dense_from: int
    end: int

    def _sparse(self, step: int) -> bool:
        if step < self.begin or self.dense_from <= step < self.end:
            return False
        last = max(0, (self.dense_from - self.begin) // self.turn - 1)
        return step >= self.end or min((step - self.begin) // self.turn, last) % 2 == 0

    def due(self, step: int) -> bool:
        before = self._sparse(step - 1) if step else False
        return self._sparse(step) != before

    def sparsity(self, step: int) -> float:
        return self.target if self._sparse(step) else 0.0


@dataclass(frozen=True)
class EpochEnds:
    """Never before a step: after the last step of an epoch, when nothing but a validation follows.

    soft: after each epoch, and before the next one everything may live again (soft filter pruning, arXiv 1808.06866);
    otherwise after the last of `epochs` only (pruning that needs no training afterwards).
    """

    target: float
    epochs: int
    soft: bool

    def due(self, step: int) -> bool:
        return False

    def sparsity(self, step: int) -> float:
        return self.target

    def due_after(self, epoch: int) -> bool:
        """Change the mask after epoch number `epoch`, counted from 0?"""
        return self.soft or self.final(epoch)

    def final(self, epoch: int) -> bool:
        return epoch == self.epochs - 1


@dataclass(frozen=True)
class Regrowth:
    """From `start` down to `target` in equal steps of sparsity, one every `every` optimizer steps from `begin` on."""

    start: float
    target: float
    steps: int
    every: int
    begin: int = 0

    def due(self, step: int) -> bool:
        since = step - self.begin
        return since >= 0 and since % self.every == 0 and since // self.every < self.steps

    def sparsity(self, step: int) -> float:
        done = min(max((step - self.begin) // self.every + 1, 0), self.steps)
        return self.target if done == self.steps else self.start + (self.target - self.start) * done / self.steps


@dataclass(frozen=True)
class Cyclic:
    """Density rises and falls in cycles, then stays (EAST, arXiv 2411.13545). `lengths`: steps of each cycle.

    In a cycle density moves from 1 - target up to `multiplier` times that and back: along a cosine,
    d_min + (d_max - d_min) (1 - cos 2 pi p) / 2 at position p, or straight up and straight down ('triangular'). The
    mask changes every `every` steps of a cycle, and at the end of each cycle to exactly the target.
    """

    target: float
    lengths: tuple[int, ...]
    multiplier: float
    every: int
    shape: str = "cosine"

    @property
    def end(self) -> int:
        """The step at which the last cycle is over."""
        return sum(self.lengths)

    def _position(self, step: int) -> tuple[int, int]:
        """(steps since the current cycle began, its length); both 0 after the last one."""
        since = step
        for length in self.lengths:
            if since < length:
                return since, length
            since -= length
        return 0, 0

    def due(self, step: int) -> bool:
        return 0 < step <= self.end and self._position(step)[0] % self.every == 0

    def sparsity(self, step: int) -> float:
        since, length = self._position(step)
        if since == 0:
            return self.target
        p = since / length
        rise = 0.5 * (1.0 - math.cos(2.0 * math.pi * p)) if self.shape == "cosine" else 1.0 - abs(2.0 * p - 1.0)
        return 1.0 - (1.0 - self.target) * (1.0 + (self.multiplier - 1.0) * rise)


@dataclass(frozen=True)
class DropFraction:
    """When connections are dropped and grown, and which share of each layer's (RigL, arXiv 1911.11134; ITOP,
    2102.02887).

    Every `every` steps after step `begin` and before step `end`. The share falls from `first` to `last` along a
    cosine or a line from step 0 to step `end`, or is constant.
    """

    every: int
    begin: int
    end: int
    first: float
    last: float = 0.0
    shape: str = "cosine"

    def due(self, step: int) -> bool:
        return self.begin < step < self.end and step % self.every == 0

    def fraction(self, step: int) -> float:
        p = min(step / self.end, 1.0)
        left = {"cosine": 0.5 * (1.0 + math.cos(math.pi * p)), "linear": 1.0 - p, "constant": 1.0}[self.shape]
        return self.last + (self.first - self.last) * left


@dataclass(frozen=True)
class Bounds:
    """Drop to a lower and grow to an upper density, in stages (elastic mutation, MEST, arXiv 2110.14032).

    low, high: densities of each stage, in densities of the target; milestones: the steps at which a stage ends, one
    fewer. Every `every` steps, and at each milestone; a stage whose bounds are both 1 only brings the mask there once.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    milestones: tuple[int, ...]
    every: int

    def _stage(self, step: int) -> int:
        return sum(step >= milestone for milestone in self.milestones)

    def due(self, step: int) -> bool:
        stage = self._stage(step)
        moves = self.low[stage] != 1.0 or self.high[stage] != 1.0
        return step > 0 and (step in self.milestones or (moves and step % self.every == 0))

    def densities(self, step: int) -> tuple[float, float]:
        """(lower, upper) bound that hold at `step`, in densities of the target."""
        return self.low[self._stage(step)], self.high[self._stage(step)]
