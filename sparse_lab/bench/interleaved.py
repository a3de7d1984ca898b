"""A small bench: a few candidates in turn, and each one's share of the first's time."""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sparse_lab.records.system import commit, device_name

Times = dict[str, list[float]]


def interleaved(candidates: dict[str, Callable[[], object]], repeats: int) -> Times:
    """Seconds of each candidate, one after the other in turn, after one warm-up round."""
    times: Times = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def show(name: str, times: Times, base: dict[str, str]) -> None:
    """One row a candidate: median, spread, share of its base."""
    print(f"bench {name} on {device_name(torch.device('cpu'))}; torch {torch.__version__}; commit {commit()}")
    print(f"{'':40} {'median ms':>10} {'min':>9} {'max':>9} {'share of base':>14}")
    for candidate, values in times.items():
        milli = [1000 * value for value in values]
        share = _share(times, candidate, base)
        print(f"{candidate:40} {statistics.median(milli):10.1f} {min(milli):9.1f} {max(milli):9.1f} {share:14.4f}")


def save(path: Path, times: Times, base: dict[str, str]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["candidate", "median_ms", "min_ms", "max_ms", "share_of_base"])
        for candidate, values in times.items():
            spread = (round(1000 * of(values), 2) for of in (statistics.median, min, max))
            writer.writerow([candidate, *spread, round(_share(times, candidate, base), 5)])


def _share(times: Times, candidate: str, base: dict[str, str]) -> float:
    return statistics.median(one / other for one, other in zip(times[candidate], times[base[candidate]], strict=True))
