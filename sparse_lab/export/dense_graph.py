"""A graph computed by torch's dense operations: what the kernels are compared with, and how constants are found."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparse_lab.export.graph import Activation, AveragePool, Conv, Graph, Map, MaxPool, dense, rows_of, whole_bias


def evaluate(graph: Graph, images: Tensor) -> Tensor:
    """Logits (N, classes) of images (N, 3, H, W) by torch's dense operations, in the images' dtype: the slow way."""
    maps = [images[:, torch.from_numpy(graph.maps[0].channels)]]
    for node, out in zip(graph.nodes, graph.maps[1:], strict=True):
        source = maps[node.source]
        if isinstance(node, Conv):
            maps.append(_convolve(graph, node, out, maps))
        else:
            rows = torch.from_numpy(rows_of(graph.maps[node.source], out))
            maps.append(pooled(node, source[:, rows], out))
    return maps[-1].flatten(1)


def pooled(node: MaxPool | AveragePool, source: Tensor, out: Map) -> Tensor:
    if isinstance(node, MaxPool):
        return functional.max_pool2d(source, node.kernel, node.stride, node.padding)
    return functional.adaptive_avg_pool2d(source, out.size)


def _convolve(graph: Graph, node: Conv, out: Map, maps: list[Tensor]) -> Tensor:
    source = maps[node.source]
    total = torch.from_numpy(whole_bias(node, out)).to(source).expand(len(source), -1, -1, -1)
    if len(node.values):
        weight = torch.from_numpy(dense(node, graph.maps[node.source], out)).to(source)
        total = total + functional.conv2d(source, weight, None, node.stride, node.padding, node.dilation)
    if node.residual is not None:
        rows = torch.from_numpy(rows_of(graph.maps[node.residual], out))
        total = total + maps[node.residual][:, rows] * (rows >= 0).to(source)[:, None, None]
    return activated(total, node.activation)


def activated(x: Tensor, activation: Activation) -> Tensor:
    if activation == "relu":
        return x.relu()
    return x.clamp(0.0, 6.0) if activation == "relu6" else x
