"""Who is measured when: all candidates in turn, round after round, until the rounds or the time are over."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from sparse_lab.bench.cells import DENSE, RIVALS, Cell, Entry, Measured, Say, Unavailable

TURN = 0.2  # seconds: a fast call is repeated for so long in each turn
MOST_CALLS = 50
TOO_SLOW = 3.0  # times slower than float32: not measured further
TRIAL = 8  # part of the batch on which bf16 is tried first, for without instructions of its own it can take minutes

Clock = Callable[[], float]


class Budget:
    """A number of seconds from now on. Parts of it go to pieces of work by their weights: what one leaves is the
    others'.
    """

    def __init__(self, seconds: float, weights: Sequence[float], clock: Clock = time.monotonic) -> None:
        self.clock = clock
        self._end = clock() + seconds
        self._weights = list(weights)

    def part(self) -> Callable[[], bool]:
        """For the next piece of work: is its time over?"""
        now, weight, all_weights = self.clock(), self._weights[0], sum(self._weights)
        del self._weights[0]
        end = now + max(0.0, self._end - now) * weight / all_weights
        return lambda: self.clock() >= end


def turn_of(entry: Entry, first: bool) -> float:
    """Seconds of one call in one turn: the median over the calls that fit in it."""
    call = entry.ready()
    if first or entry.cold:
        call()
    times: list[float] = []
    begin = time.perf_counter()
    while not times or (time.perf_counter() - begin < TURN and len(times) < MOST_CALLS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(
    entries: Sequence[Entry],
    rounds: int,
    over: Callable[[], bool],
    measured: Measured,
    say: Say,
    turn: Callable[..., float] = turn_of,
) -> None:
    """Fill `measured`; entries that there was no time for are its `missing` ones."""
    left = list(entries)
    for number in range(1, rounds + 1):
        for entry in list(left):
            if over():
                measured.missing += [one.cell for one in left if one.cell not in measured.seconds]
                return
            say(f"{entry.cell.model}, {entry.cell.what}, round {number} of {rounds}", str(entry.cell))
            try:
                seconds = turn(entry, number == 1)
            except Unavailable as why:
                measured.note(str(why))
                left.remove(entry)
                continue
            measured.add(entry.cell, number, seconds)
            if number == 1 and entry.facts is not None:
                entry.facts(measured.about(entry.cell))
            if _hopeless(entry.cell, measured):
                left.remove(entry)


def _hopeless(cell: Cell, measured: Measured) -> bool:
    """Is this dense rival so slow that one round is enough?"""
    ratio = measured.ratio(cell)
    if cell.candidate == DENSE or cell.candidate not in RIVALS or ratio is None or ratio.median * TOO_SLOW >= 1.0:
        return False
    measured.note(f"{cell} took {1.0 / ratio.median:.3g} times as long as dense float32: measured once")
    return True


def trial_batch(images: int) -> int:
    return max(1, images // TRIAL)


def too_slow(float32: Entry, bfloat16: Entry, measured: Measured, turn: Callable[..., float] = turn_of) -> bool:
    """bf16 once on a part of the batch: is it hopeless? Then that stays its only measurement, on so many images."""
    seconds = [turn(entry, True) for entry in (float32, bfloat16)]
    if seconds[1] <= TOO_SLOW * seconds[0]:
        return False
    for entry, one in zip((float32, bfloat16), seconds, strict=True):
        measured.add(entry.cell, 0, one)
    cell = bfloat16.cell
    measured.note(
        f"dense bf16 took {seconds[1] / seconds[0]:.3g} times as long as dense float32 in a trial ({cell.model}, "
        f"{cell.what}, batch {cell.batch}): not measured further"
    )
    return True
