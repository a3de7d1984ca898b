"""Several runs on one device at once, each in a process of its own, as a launcher with fractional GPUs starts them.

One process is this file: `python -m sparse_lab.bench.together SETTINGS METHOD` (JSON). It says `ready` when its step is
compiled, waits for a line, and says at the end when each of its epochs began and ended.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sparse_lab.bench.train import Settings, Stopwatch, request, run


def throughput(settings: Settings, method: str) -> float | None:
    """Images a second of all `settings.together` processes, while all of them train; None where one fails."""
    words = [sys.executable, "-m", "sparse_lab.bench.together", json.dumps(dataclasses.asdict(settings)), method]
    jobs = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(settings.together)
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
