"""What a step could take at best: its multiply-adds at the machine's peak, or its bytes at the memory's pace."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from sparse_lab.export.graph import Conv, Graph
from sparse_lab.sparsity.flops import layer_costs
from sparse_lab.sparsity.masks import layers

NUMBER = 4  # bytes of a float32
STORED = {"float32": NUMBER, "bf16": 2}  # bytes of a number of a map
# How often a training step moves as many numbers as a convolution has outputs (what it reads is as large as what it
# makes, nearly): each kernel reads and writes whole maps once.
PASSES = {
    "forward convolution": 2,
    "normalisation, activation": 2,
    "gradient of normalisation": 5,
    "weight gradient": 2,
    "input gradient": 2,
}
# Bytes of a live weight in a step: value and offset forward and in the input gradient, offset and gradient in the
# weight gradient, then position, gradient, and value and momentum there and back
WEIGHT_IN_TRAINING = 2 * (4 + 8) + (8 + 4) + (8 + 4 + 8 + 8)
WEIGHT_IN_INFERENCE = 4 + 4  # value and offset
MAP_IN_INFERENCE = 2  # written and read once


@dataclass(frozen=True)
class Work:
    """Multiply-adds and bytes of one call."""

    macs: int
    bytes: int


@dataclass(frozen=True)
class Machine:
    """Measured peaks: operations a second (two a multiply-add, float32), bytes a second."""

    operations: float
    bytes: float

    def bound(self, work: Work) -> float:
        """Seconds that the work takes at least, as long as the caches hold nothing."""
        return max(2 * work.macs / self.operations, work.bytes / self.bytes)


def training_work(model: nn.Module, image_size: int, images: int, storage: str = "float32") -> Work:
    """Of a training step on live weights: three products a weight and position (forward, and both gradients)."""
    costs, found = layer_costs(model, image_size), layers(model)
    macs = 3 * images * sum(cost.sparse_macs for cost in costs if cost.total)
    outputs = sum(cost.macs // cost.total * found[cost.name].weight.shape[0] for cost in costs if cost.total)
    moved = sum(PASSES.values()) * images * outputs * STORED[storage]
    return Work(macs, moved + WEIGHT_IN_TRAINING * sum(cost.kept for cost in costs if cost.total))


def inference_work(graph: Graph, images: int) -> Work:
    """Of a forward pass of what is left of a network; maps of channels that nobody reads are not there."""
    outputs = sum(
        len(out.channels) * out.height * out.width
        for node, out in zip(graph.nodes, graph.maps[1:], strict=True)
        if isinstance(node, Conv)
    )
    moved = MAP_IN_INFERENCE * images * outputs * NUMBER
    return Work(images * graph.multiply_adds(), moved + WEIGHT_IN_INFERENCE * graph.weights())


def machine(size: int = 2048, numbers: int = 2**25, repeats: int = 5) -> Machine:
    """The best of a few products of two float32 matrices, and of a few sums of two long vectors (three are moved)."""
    left, right = torch.rand(size, size), torch.rand(size, size)
    first, second, out = torch.rand(numbers), torch.rand(numbers), torch.zeros(numbers)
    product = torch.empty(size, size)
    multiplying = _best(lambda: torch.mm(left, right, out=product), repeats)
    adding = _best(lambda: torch.add(first, second, out=out), repeats)
    return Machine(2 * size**3 / multiplying, 3 * numbers * NUMBER / adding)


def _best(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times[1:])
