"""Several runs on one device at once, each in a process of its own, as a launcher with fractional GPUs starts them.

One process is this file: `python -m sparse_lab.bench.together SETTINGS METHOD` (JSON). It says `ready` when its step is
compiled, waits for a line, and says at the end when each of its epochs began and ended.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_lab.bench.train import Settings, Stopwatch, request, run
from sparse_lab.sweep.launchers import THREADS, WAITING, threads_of


@dataclass(frozen=True)
class Together:
    """Images a second of `runs` processes at once with so many threads each, and of a single one with one thread, each
    as often as it was measured, in turn.
    """

    runs: int
    threads: int
    rates: list[float]
    alone: list[float]

    def __str__(self) -> str:
        ratio = statistics.median(one / other for one, other in zip(self.rates, self.alone, strict=True))
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''} each"
        return (
            f"{self.runs} runs at once, {threads}: {statistics.median(self.rates):.0f} images/s in all, {ratio:.2f} "
            f"times one run with 1 thread ({statistics.median(self.alone):.0f}), {ratio / self.runs:.2f} a run"
        )


def measure(settings: Settings, method: str, say: Callable[[str], None]) -> Together | None:
    """`settings.together` runs against one, each `settings.repeats` times, in turn; None where a process fails. They
    share the processors out as jobs of a launcher do, unless OMP_NUM_THREADS says otherwise.
    """
    threads = int(threads_of(settings.together).get(THREADS[0]) or os.environ[THREADS[0]])
    found = Together(settings.together, threads, [], [])
    for repeat in range(settings.repeats):
        for runs, each, rates in ((1, 1, found.alone), (settings.together, threads, found.rates)):
            say(f"{runs} of {method} at once, {repeat + 1} of {settings.repeats}")
            rate = throughput(settings, method, runs, each)
            if rate is None:
                return None
            rates.append(rate)
    return found


def throughput(settings: Settings, method: str, runs: int, threads: int) -> float | None:
    """Images a second of all processes, while all of them train; None where one fails."""
    words = [sys.executable, "-m", "sparse_lab.bench.together", json.dumps(dataclasses.asdict(settings)), method]
    environment = {**WAITING, **os.environ, **dict.fromkeys(THREADS, str(threads))}
    jobs = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(runs)
    ]
    try:
        if not all(_line(job) == "ready" for job in jobs):
            return None
        for job in jobs:
            assert job.stdin is not None
            job.stdin.write("go\n")
            job.stdin.flush()
        spans = [json.loads(_line(job) or "[]") for job in jobs]
    finally:
        for job in jobs:
            job.kill()
            job.communicate()
    return None if not all(spans) else overlapped(spans, settings.steps * settings.batch)


def _line(job: subprocess.Popen[str]) -> str:
    """The next line of its own; a library may print others."""
    assert job.stdout is not None
    for line in job.stdout:
        if line.startswith("bench: "):
            return line.removeprefix("bench: ").strip()
    return ""


def overlapped(spans: list[list[list[float]]], images: int) -> float:
    """Images a second, from (begin, end) of every epoch of every process, in the time in which all of them trained; an
    epoch counts by the share of it that lies there.
    """
    begin, end = max(job[0][0] for job in spans), min(job[-1][1] for job in spans)
    inside = [max(0.0, min(stop, end) - max(start, begin)) / (stop - start) for job in spans for start, stop in job]
    return images * sum(inside) / (end - begin)


def main(argv: list[str]) -> int:
    """One of the processes."""
    plain = json.loads(argv[0])
    lists: dict[str, Any] = {name: tuple(value) for name, value in plain.items() if isinstance(value, list)}
    settings = Settings(**(plain | lists))

    def wait() -> None:
        print("bench: ready", flush=True)
        sys.stdin.readline()

    offset = time.time() - time.perf_counter()  # one clock for all processes
    with tempfile.TemporaryDirectory() as folder:
        watch = Stopwatch(settings.steps * settings.batch, settings.epochs, before=wait)
        run(request(settings, argv[1], Path(folder)), watch, lambda line: None)
    print("bench: " + json.dumps([[start + offset, end + offset] for start, end in watch.spans]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
