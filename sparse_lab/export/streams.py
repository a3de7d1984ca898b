"""Many layers' numbers as a few long streams: written one after the other, and taken back in the same order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

Precision = Literal["fp32", "fp16"]
DTYPES = {"fp32": np.float32, "fp16": np.float16}
NOTHING = np.zeros(0, dtype=np.uint8)


class Streams:
    """values: how weights are stored. given: what was read from a file."""

    def __init__(self, values: str, given: Mapping[str, np.ndarray] | None = None) -> None:
        self.values = values
        self.streams: dict[str, list[np.ndarray]] = {}
        self.given = given or {}
        self.at: dict[str, int] = {}

    def tensors(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate(parts) for name, parts in self.streams.items()}

    def put(self, name: str, part: np.ndarray) -> None:
        self.streams.setdefault(name, []).append(part)

    def take(self, name: str, count: int) -> np.ndarray:
        start = self.at.get(name, 0)
        self.at[name] = start + count
        part = self.given.get(name, NOTHING)[start : start + count] if count else NOTHING
        if len(part) != count:
            raise ValueError(f"{name} ends too early")
        return part

    def end(self) -> None:
        """Raises ValueError where a stream holds more than was taken."""
        for name, numbers in self.given.items():
            if self.at.get(name, 0) != len(numbers):
                raise ValueError(f"{name} ends too late")

    def put_values(self, numbers: np.ndarray) -> dict[str, float]:
        """Weights, and what has to be known to take them back."""
        scale = scale_of(numbers) if self.values == "fp16" else 1.0
        self.put("values", (numbers / scale).astype(DTYPES[self.values]))
        return {"scale": scale}

    def take_values(self, count: int, scale: float) -> np.ndarray:
        part = self.take("values", count)
        if count and part.dtype != DTYPES[self.values]:
            raise ValueError(f"values are {part.dtype}, not {self.values}")
        return part.astype(np.float64) * scale


def scale_of(values: np.ndarray) -> float:
    """A power of two that brings the largest value below 1: float16 ends at 65,504, and powers of two round nothing."""
    largest = float(np.abs(values).max(initial=0.0))
    return 2.0 ** math.ceil(math.log2(largest)) if largest else 1.0
