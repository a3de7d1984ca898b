"""A graph that can be called: numpy arrays or torch tensors in and out, the sparse kernels between. Imports no torch:
who has a tensor has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sparse_lab.export.graph import Conv, Graph, Map, MaxPool, rows_of, shape
from sparse_lab.sparse_cpu.program import Program, Window

if TYPE_CHECKING:
    from torch import Tensor

Images = TypeVar("Images", np.ndarray, "Tensor")


class SparseNetwork:
    """Logits (N, classes) of normalised images (N, 3, H, W), N from 0 up: float32 on the CPU, without gradients; an
    array of an array, a tensor of a tensor.

    `about`: what the file says of the network (`normalise`, `image_size`, `num_classes`, ...). One network answers one
    caller at a time: its memory is kept between calls.
    """

    def __init__(self, graph: Graph, about: Mapping[str, Any]) -> None:
        self.graph = graph
        self.about = dict(about)
        self._execute = compiled(graph).finish()

    def __call__(self, images: Images) -> Images:
        made = self._execute(fitting(images, self._execute.shape))
        logits = made.reshape(len(made), math.prod(made.shape[1:]))
        return logits if isinstance(images, np.ndarray) else _as_tensor(logits)

    def weights(self) -> int:
        """Weights that lie on a path from the image to a logit."""
        return self.graph.weights()

    def __repr__(self) -> str:
        return f"SparseNetwork({self.about.get('name', '')}, {self.graph.weights():,} weights)"


def fitting(images: np.ndarray | Tensor, wanted: tuple[int, ...]) -> np.ndarray:
    """The images as the kernels take them. Raises ValueError where they have another shape than (N, *wanted)."""
    if len(images.shape) != 1 + len(wanted) or tuple(images.shape[1:]) != tuple(wanted):
        raise ValueError(f"images must have shape (N, {', '.join(map(str, wanted))}), not {tuple(images.shape)}")
    if not isinstance(images, np.ndarray):
        images = images.detach().cpu().float().numpy()
    return np.require(images, np.float32, ["C", "A", "W", "E"])  # of one type: kernels are compiled for each


def _as_tensor(numbers: np.ndarray) -> Tensor:
    import torch

    return torch.from_numpy(numbers)


def compiled(graph: Graph) -> Program:
    """The graph as a program; a 2x2 max pool behind a convolution becomes a part of it."""
    image = graph.maps[0]
    program = Program(len(image.channels), *image.size)
    place = {0: 0}
    number = 0
    while number < len(graph.nodes):
        node, out = graph.made(number)
        if isinstance(node, Conv):
            pool = _pooled(graph, number)
            place[number + 1 + pool] = _put(program, graph, node, out, place, pool)
            number += pool
        elif isinstance(node, MaxPool):
            window = Window(node.kernel, node.stride, node.padding)
            rows = rows_of(graph.maps[node.source], out)
            place[number + 1] = program.max_pool(place[node.source], out.size, window, rows)
        else:
            place[number + 1] = program.average_pool(
                place[node.source], out.size, rows_of(graph.maps[node.source], out)
            )
        number += 1
    return program


def _put(program: Program, graph: Graph, node: Conv, out: Map, place: dict[int, int], pool: bool) -> int:
    source = graph.maps[node.source]
    outputs, inputs, down, across = np.unravel_index(node.positions, shape(node, source, out))
    if node.depthwise:
        inputs = np.searchsorted(source.channels, out.channels[outputs])
    residual = None
    if node.residual is not None:
        residual = place[node.residual], rows_of(graph.maps[node.residual], out)
    return program.conv(
        place[node.source],
        out.size,
        Window(node.kernel, node.stride, node.padding, node.dilation),
        (outputs, inputs, down, across, node.values),
        node.bias,
        (node.varying, node.maps),
        residual,
        node.activation,
        pool,
    )


def _pooled(graph: Graph, number: int) -> bool:
    """Is the only reader of what convolution `number` makes a 2x2 max pool right behind it?"""
    node = graph.nodes[number]
    if number + 1 == len(graph.nodes) or not isinstance(node, Conv):
        return False
    pool, out = graph.made(number + 1)
    readers = [
        reader
        for reader in graph.nodes
        if number + 1 in (reader.source, reader.residual if isinstance(reader, Conv) else None)
    ]
    return (
        readers == [pool]
        and isinstance(pool, MaxPool)
        and (pool.kernel, pool.stride, pool.padding) == ((2, 2), (2, 2), (0, 0))
        and node.residual is None
        and (not len(node.varying) or not any(size % 2 for size in graph.maps[number + 1].size))
        and len(out.channels) == len(graph.maps[number + 1].channels)
    )
