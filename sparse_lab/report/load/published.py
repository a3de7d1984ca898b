"""The published numbers as data, and which of them stands beside one of our cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TOLERANCE = 5e-5  # published sparsities are rounded to a hundredth of a percent
WITHIN = "within one published std"
_SAME = 1e-9  # points


@dataclass(frozen=True)
class Published:
    """One published top-1 accuracy in percent, under our name of the method."""

    method: str
    model: str
    dataset: str
    sparsity: float
    top1: float
    std: float | None
    source: str


def load() -> list[Published]:
    """Every published number that has a sparsity, from `published.yaml` beside this file."""
    entries = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
    return [number for entry in entries for number in _numbers(entry)]


def _numbers(entry: dict[str, Any]) -> Iterator[Published]:
    ours = entry.get("ours", entry["method"])
    points = [(ours, *point) for point in entry.get("points", [])]
    if entry.get("sparsity") is not None:
        points.append((ours, entry["sparsity"], entry["top1"], entry.get("std")))
    if start := entry.get("start"):
        points.append((start["ours"], start["sparsity"], start["top1"], start.get("std")))
    source = entry["paper"]
    if entry.get("second_hand") and "second-hand" not in source:
        source += ", second-hand"
    for names, sparsity, top1, std in points:
        for name in [names] if isinstance(names, str) else names:
            yield Published(name, entry["model"], entry["dataset"], sparsity, top1, std, source)


def verdict(difference: float, std: float | None) -> str:
    """What a difference (ours minus the published number, in points) says beside the published standard deviation."""
    if std is None:
        side = "above" if difference > _SAME else "below" if difference < -_SAME else "equal"
        return f"{side} (no std given)"
    if abs(difference) <= std + _SAME:
        return WITHIN
    return "above" if difference > 0 else "below"


def find(
    numbers: Sequence[Published], *, method: str, model: str, dataset: str, sparsity: float, width: float
) -> Published | None:
    """The number of the same method, model and data set at the same sparsity (within 5e-5), the nearest if several are.

    A network of another width is another network: nothing is published for it.
    """
    if width != 1.0:
        return None
    same = [n for n in numbers if (n.method, n.model, n.dataset) == (method, model, dataset)]
    near = [n for n in same if abs(n.sparsity - sparsity) <= TOLERANCE + 1e-12]
    return min(near, key=lambda n: abs(n.sparsity - sparsity), default=None)
