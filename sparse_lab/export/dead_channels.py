"""What a graph can do without, exactly: channels that do not depend on the image, and channels that reach no logit.

A channel that nothing feeds is a constant, and a constant that goes through a zero-padded convolution is no constant at
the border: so the part of the network that no image changes runs once, in float64, and what it adds to a convolution
becomes that convolution's bias, a map where it varies.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch.nn import functional

from sparse_lab.export.dense_graph import activated, pooled
from sparse_lab.export.graph import Conv, Graph, Map, Node, dense, rows_of, shape, whole_bias

SAME = 1e-13  # a bias map whose values differ by less than this share of their size is one number: float64 rounds


def reduced(graph: Graph) -> Graph:
    """The same logits for every image from the live channels alone. All classes stay, and the image's own channels.

    A graph that no image changes becomes one convolution without weights.
    """
    moving = _moving(graph)
    biases = _biases(graph, moving)
    read = _read(graph)
    last = len(graph.maps) - 1
    live = [both & wanted for both, wanted in zip(moving, read, strict=True)]
    live[0], live[last] = np.ones_like(live[0]), np.ones_like(live[last])
    maps = [dataclasses.replace(of, channels=of.channels[stays]) for of, stays in zip(graph.maps, live, strict=True)]
    nodes = [
        _cut(graph, number, maps, biases[number]) if isinstance(node, Conv) else node
        for number, node in enumerate(graph.nodes)
    ]
    return _without_empty(maps, nodes)


def _moving(graph: Graph) -> list[np.ndarray]:
    """Bool [channels] a map: does it depend on the image?"""
    found = [np.ones(len(graph.maps[0].channels), dtype=bool)]
    for number, node in enumerate(graph.nodes):
        if not isinstance(node, Conv):
            found.append(found[node.source])
            continue
        outputs, inputs = _ends(graph, number, node)
        moves = np.zeros(len(graph.maps[number + 1].channels), dtype=bool)
        moves[outputs[found[node.source][inputs]]] = True
        if node.residual is not None:
            rows = rows_of(graph.maps[node.residual], graph.maps[number + 1])
            moves |= (rows >= 0) & found[node.residual][rows]
        found.append(moves)
    return found


def _read(graph: Graph) -> list[np.ndarray]:
    """Bool [channels] a map: does a logit depend on it?"""
    found = [np.zeros(len(of.channels), dtype=bool) for of in graph.maps]
    found[-1][:] = True
    for number, node in reversed(list(enumerate(graph.nodes))):
        wanted = found[number + 1]
        if not isinstance(node, Conv):
            found[node.source] |= wanted
            continue
        outputs, inputs = _ends(graph, number, node)
        found[node.source][inputs[wanted[outputs]]] = True
        if node.residual is not None:
            rows = rows_of(graph.maps[node.residual], graph.maps[number + 1])
            found[node.residual][rows[wanted & (rows >= 0)]] = True
    return found


def _ends(graph: Graph, number: int, node: Conv) -> tuple[np.ndarray, np.ndarray]:
    """For each weight the channel that it writes and the one that it reads."""
    source, out = graph.maps[node.source], graph.maps[number + 1]
    outputs, inputs, _, _ = np.unravel_index(node.positions, shape(node, source, out))
    return outputs, np.searchsorted(source.channels, out.channels[outputs]) if node.depthwise else inputs


def _biases(graph: Graph, moving: list[np.ndarray]) -> list[np.ndarray]:
    """For each node, float64 [out, height, width]: what it makes before its activation of all that does not move.

    Channels that move count as zero wherever they are read.
    """
    still = [torch.zeros(1, len(moving[0]), *graph.maps[0].size, dtype=torch.float64)]
    biases = []
    for number, (node, out) in enumerate(zip(graph.nodes, graph.maps[1:], strict=True)):
        source = still[node.source]
        if isinstance(node, Conv):
            total = torch.from_numpy(whole_bias(node, out))[None]
            if bool(source.any()):
                weight = torch.from_numpy(dense(node, graph.maps[node.source], out))
                total = total + functional.conv2d(source, weight, None, node.stride, node.padding, node.dilation)
            if node.residual is not None:
                rows = rows_of(graph.maps[node.residual], out)
                total = total + still[node.residual][:, rows] * torch.from_numpy(rows >= 0)[:, None, None]
            made = activated(total, node.activation)
        else:
            total = made = pooled(node, source[:, torch.from_numpy(rows_of(graph.maps[node.source], out))], out)
        biases.append(total[0].numpy())
        still.append(made * torch.from_numpy(~moving[number + 1])[:, None, None])
    return biases


def _cut(graph: Graph, number: int, maps: list[Map], bias: np.ndarray) -> Conv:
    """Convolution `number` between what is left of its maps; `bias` float64 [out, height, width] of all channels."""
    node, out = graph.made(number)
    assert isinstance(node, Conv)
    left_in, left_out = maps[node.source], maps[number + 1]
    outputs, inputs = _ends(graph, number, node)
    source = graph.maps[node.source]
    stays = np.isin(out.channels[outputs], left_out.channels) & np.isin(source.channels[inputs], left_in.channels)
    outputs = np.searchsorted(left_out.channels, out.channels[outputs[stays]])
    inputs = np.searchsorted(left_in.channels, source.channels[inputs[stays]])
    if node.depthwise:
        inputs[:] = 0
    taps = node.positions[stays] % (node.kernel[0] * node.kernel[1])
    _, wide, *kernel = shape(node, left_in, left_out)
    positions = (outputs * wide + inputs) * (kernel[0] * kernel[1]) + taps
    bias = bias[np.searchsorted(out.channels, left_out.channels)]
    low, high = bias.min((1, 2)), bias.max((1, 2))
    varying = np.flatnonzero(high - low > SAME * np.maximum(np.abs(low), np.abs(high)))
    flat = (low + high) / 2
    flat[varying] = 0.0
    values = node.values[stays]
    return dataclasses.replace(node, positions=positions, values=values, bias=flat, varying=varying, maps=bias[varying])


def _without_empty(maps: list[Map], nodes: list[Node]) -> Graph:
    """Without the maps that have no channel left, and without what would read them: it reads nothing there."""
    keeps = [number for number, of in enumerate(maps) if len(of.channels)]
    new = {number: place for place, number in enumerate(keeps)}
    left: list[Node] = []
    for number in keeps[1:]:
        node = nodes[number - 1]
        if isinstance(node, Conv):
            residual = new.get(-1 if node.residual is None else node.residual)
            left.append(dataclasses.replace(node, source=new.get(node.source, 0), residual=residual))
        else:
            left.append(dataclasses.replace(node, source=new[node.source]))
    return Graph(tuple(maps[number] for number in keeps), tuple(left))
