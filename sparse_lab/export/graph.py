"""A finished network as plain data: feature maps, and what makes each of them. No module, no autograd, no batch norm.

A linear layer is a convolution whose kernel covers the whole map, so that convolutions and pools are all there is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Pair = tuple[int, int]
Activation = Literal["none", "relu", "relu6"]


@dataclass(frozen=True)
class Map:
    """A feature map of one image. `channels`: int64, ascending, the numbers that its channels have in the network;
    those that are not named carry nothing that is still asked for. `full`: how many the network has there.
    """

    channels: np.ndarray
    full: int
    height: int
    width: int

    @property
    def size(self) -> Pair:
        return self.height, self.width


@dataclass(frozen=True)
class Conv:
    """activation(convolution(source) + bias + residual), each channel of the residual on the channel of its number.

    `positions` (int64, ascending) are flat positions in (out, in, *kernel), counted in the channels of the two maps,
    with one weight in `values` each; depthwise in (out, 1, *kernel), where an output reads the input of its number.
    `bias` [out]; channels `varying` have bias `maps` [len(varying), height, width] instead. All numbers are float64.
    """

    source: int
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    depthwise: bool
    positions: np.ndarray
    values: np.ndarray
    bias: np.ndarray
    varying: np.ndarray
    maps: np.ndarray
    residual: int | None = None
    activation: Activation = "none"


@dataclass(frozen=True)
class MaxPool:
    """The largest value of each window; padding never wins."""

    source: int
    kernel: Pair
    stride: Pair
    padding: Pair


@dataclass(frozen=True)
class AveragePool:
    """Adaptive: output i of n is the mean over inputs floor(i size / n) to ceil((i + 1) size / n)."""

    source: int


Node = Conv | MaxPool | AveragePool


@dataclass(frozen=True)
class Graph:
    """`maps[0]` is the image, node k makes `maps[k + 1]` of earlier ones, the last map [classes, 1, 1] the logits."""

    maps: tuple[Map, ...]
    nodes: tuple[Node, ...]

    def made(self, number: int) -> tuple[Node, Map]:
        """Node `number` and the map that it makes."""
        return self.nodes[number], self.maps[number + 1]

    def multiply_adds(self) -> int:
        """Multiplications by a weight for one image; padding counts as real."""
        made = zip(self.nodes, self.maps[1:], strict=True)
        return sum(len(node.values) * out.height * out.width for node, out in made if isinstance(node, Conv))

    def weights(self) -> int:
        return sum(len(node.values) for node in self.nodes if isinstance(node, Conv))


def shape(node: Conv, source: Map, out: Map) -> tuple[int, int, int, int]:
    """The shape in which the convolution's positions count."""
    return len(out.channels), 1 if node.depthwise else len(source.channels), *node.kernel


def dense(node: Conv, source: Map, out: Map) -> np.ndarray:
    """The convolution's weight, float64 [out, in, *kernel] with zeros, whether it is depthwise or not."""
    outputs, inputs, ky, kx = np.unravel_index(node.positions, shape(node, source, out))
    if node.depthwise:
        inputs = np.searchsorted(source.channels, out.channels[outputs])
    weight = np.zeros((len(out.channels), len(source.channels), *node.kernel))
    weight[outputs, inputs, ky, kx] = node.values
    return weight


def rows_of(source: Map, out: Map) -> np.ndarray:
    """For each channel of `out` the index in `source` of the channel with its number, -1 where there is none."""
    found = np.searchsorted(source.channels, out.channels)
    return np.where(np.isin(out.channels, source.channels), found, -1)


def whole_bias(node: Conv, out: Map) -> np.ndarray:
    """Float64 [out, height, width]."""
    bias = np.broadcast_to(node.bias[:, None, None], (len(out.channels), *out.size)).copy()
    bias[node.varying] = node.maps
    return bias


def windows(size: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair = (1, 1)) -> Pair:
    """Height and width of what a sliding window makes of a map."""
    down, across = (
        (size[side] + 2 * padding[side] - dilation[side] * (kernel[side] - 1) - 1) // stride[side] + 1
        for side in (0, 1)
    )
    return down, across


def check(graph: Graph) -> None:
    """Raises ValueError where a graph contradicts itself, so that nobody who reads it reaches beyond an array."""
    for number, (node, out) in enumerate(zip(graph.nodes, graph.maps[1:], strict=True)):
        source = graph.maps[node.source]
        fits = 0 <= node.source <= number
        if isinstance(node, MaxPool):
            fits &= windows(source.size, node.kernel, node.stride, node.padding) == out.size
            fits &= all(2 * pad <= kernel for pad, kernel in zip(node.padding, node.kernel, strict=True))
        if not isinstance(node, Conv):
            fits &= bool(np.isin(out.channels, source.channels).all())
        else:
            fits &= _fits(node, graph, number)
        if not fits:
            raise ValueError(f"layer {number} does not fit what it reads")
    if graph.maps[-1].size != (1, 1) or not isinstance(graph.nodes[-1], Conv):
        raise ValueError("the last layer makes no logits")


def _fits(node: Conv, graph: Graph, number: int) -> bool:
    source, out = graph.maps[node.source], graph.maps[number + 1]
    fits = len(node.bias) == len(out.channels) and node.maps.shape == (len(node.varying), *out.size)
    fits &= node.activation in ("none", "relu", "relu6") and len(node.values) == len(node.positions)
    fits &= bool(np.isin(node.varying, np.arange(len(out.channels))).all())
    if node.residual is not None:
        fits &= 0 <= node.residual <= number and graph.maps[node.residual].size == out.size
    if not len(node.positions):  # it reads nothing, so its window says nothing
        return fits
    fits &= min(node.stride) > 0 and min(node.kernel) > 0 and min(node.padding) >= 0 and min(node.dilation) > 0
    fits &= windows(source.size, node.kernel, node.stride, node.padding, node.dilation) == out.size
    fits &= bool((np.diff(node.positions) > 0).all()) and node.positions[0] >= 0
    fits &= int(node.positions[-1]) < math.prod(shape(node, source, out))
    if node.depthwise:
        outputs = np.unique(node.positions // (node.kernel[0] * node.kernel[1]))
        fits &= bool(np.isin(out.channels[outputs], source.channels).all())
    return fits
