"""What `sparse-lab bench train` prints and writes."""

from __future__ import annotations

import csv
import datetime
import io
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch

from sparse_lab.bench.train import BARE, PLAIN, Pace, Settings
from sparse_lab.records.atomic_io import write_text_atomic
from sparse_lab.records.system import commit, device_name
from sparse_lab.training.device import device_of

HEAD = ("candidate", "images/s", "lowest", "highest", "whole epochs", "x bare", "x plain", "overhead", "peak MiB")


def title(settings: Settings) -> str:
    device = device_of("cpu" if settings.device == "cpu" else "auto")
    date = datetime.datetime.now().astimezone().isoformat(timespec="minutes")
    how = "deterministic" if settings.deterministic else "not deterministic"
    return (
        f"sparse-lab bench train, {date}, commit {commit() or 'unknown'}\n"
        f"{device_name(device)}; torch {torch.__version__}\n"
        f"{settings.model}, width {settings.width:g}, batch {settings.batch}, masks of {settings.sparsity:g}%, "
        f"compile={settings.compile}, {how}; {settings.repeats} x {settings.epochs} epochs of {settings.steps} steps, "
        f"{settings.workers} workers in the plain loop"
    )


def rows(found: dict[str, list[Pace]]) -> Iterator[list[str]]:
    """One row a candidate: medians over epochs and repeats; ratios are medians of those within a repeat, the overhead
    that over the first candidate.
    """
    first = next(iter(found))
    for name, paces in found.items():
        steps = [rate for pace in paces for rate in pace.steps]
        whole = [rate for pace in paces for rate in pace.whole]
        beside = [_ratio(paces, found.get(other)) for other in (BARE, PLAIN)]
        overhead = _ratio(found[first], paces) if name not in (first, BARE, PLAIN) else None
        yield [
            name,
            f"{statistics.median(steps):.0f}",
            f"{min(steps):.0f}",
            f"{max(steps):.0f}",
            f"{statistics.median(whole):.0f}" if whole else "",
            *("" if ratio is None else f"{ratio:.3f}" for ratio in beside),
            "" if overhead is None else f"{100 * (overhead - 1):+.1f}%",
            f"{max(pace.peak for pace in paces):.0f}",
        ]


def _ratio(paces: list[Pace], others: list[Pace] | None) -> float | None:
    if not others:
        return None
    return statistics.median(one.rate / other.rate for one, other in zip(paces, others, strict=False))


def text(found: dict[str, list[Pace]]) -> str:
    table = [list(HEAD), *rows(found)]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEAD))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    )


def save(path: Path, settings: Settings, found: dict[str, list[Pace]]) -> None:
    """The table as CSV, with where and how it was measured in every row."""
    device = device_of("cpu" if settings.device == "cpu" else "auto")
    about = {
        "commit": commit() or "",
        "device": device_name(device),
        "torch": torch.__version__,
        "model": settings.model,
        "width": f"{settings.width:g}",
        "batch": str(settings.batch),
        "sparsity": f"{settings.sparsity:g}",
        "compile": settings.compile,
        "deterministic": str(settings.deterministic),
    }
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow([*HEAD, *about])
    for row in rows(found):
        writer.writerow([*row, *about.values()])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, target.getvalue())
