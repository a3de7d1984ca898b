"""The ONNX file of a graph: dense layers between the live channels, any batch size, for any ONNX runtime.

Maps that are added to each other, and both sides of a pool and of a depthwise convolution, form a family: they share
their channels' slots, so that an addition needs no gather. A slot whose channel is not live in one of the maps holds
zeros there, or something that no weight reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_lab.errors import UserError
from sparse_lab.export import latency
from sparse_lab.export.graph import Conv, Graph, MaxPool, dense
from sparse_lab.host.machine import version
from sparse_lab.records.atomic_io import atomic_write

OPSET = 18
IR_VERSION = 9
BEST_MULTIPLE = 16  # onnxruntime's kernels work on so many channels at a time
MISSING = "{} is needed for this: pip install 'sparse_lab[onnx]'"


def library() -> ModuleType:
    """The package onnx. Raises UserError where it is not installed."""
    try:
        import onnx
    except ImportError:
        raise UserError(MISSING.format("onnx")) from None
    return onnx


def save(graph: Graph, about: Mapping[str, Any], path: Path, multiple: int = 1) -> None:
    """Write the file, whole: input `images` float32 (N, 3, H, W), output `logits` float32 (N, classes).

    multiple: hidden maps get channels of zeros up to a multiple of it. Raises UserError without the package onnx.
    """
    onnx = library()
    content = _Writer(onnx, graph, multiple).model(about).SerializeToString()
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def runner(path: Path) -> Callable[[Tensor], Tensor]:
    """The file in onnxruntime on the CPU: images to logits. Raises UserError without the package onnxruntime."""
    return opened(path)[0]


def opened(path: Path) -> tuple[Callable[[Tensor], Tensor], dict[str, str]]:
    """`runner`, and what the file says of its network, each value as Python writes it. Raises UserError as well for
    what onnxruntime does not take.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError(MISSING.format("onnxruntime")) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes, derived from Exception
        raise UserError(f"onnxruntime cannot load {path} ({' '.join(str(error).split())[:200]})") from None

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return run, dict(session.get_modelmeta().custom_metadata_map)


def slots(graph: Graph, multiple: int) -> list[tuple[np.ndarray, int]]:
    """For every map the slots of its channels (int64), and how many slots its family has."""
    family = list(range(len(graph.maps)))

    def head(number: int) -> int:
        while family[number] != number:
            number = family[number]
        return number

    for number, node in enumerate(graph.nodes, start=1):
        if isinstance(node, Conv):
            relatives = [node.source] if node.depthwise and len(node.values) else []
            relatives += [] if node.residual is None else [node.residual]
        else:
            relatives = [node.source]
        for relative in relatives:
            family[head(relative)] = head(number)
    members: dict[int, list[int]] = {}
    for number in range(len(graph.maps)):
        members.setdefault(head(number), []).append(number)
    ends = {0, len(graph.maps) - 1}
    found: dict[int, tuple[np.ndarray, int]] = {}
    for group in members.values():
        together = np.unique(np.concatenate([graph.maps[number].channels for number in group]))
        step = 1 if ends & set(group) else multiple
        size = -(-len(together) // step) * step
        found |= {number: (np.searchsorted(together, graph.maps[number].channels), size) for number in group}
    return [found[number] for number in range(len(graph.maps))]


class _Writer:
    """Nodes and initialisers of one model, in order. Map k is the tensor `map{k}`."""

    def __init__(self, onnx: ModuleType, graph: Graph, multiple: int) -> None:
        self.onnx, self.graph = onnx, graph
        self.slots = slots(graph, multiple)
        self.nodes: list[Any] = []
        self.numbers: list[Any] = []

    def model(self, about: Mapping[str, Any]) -> Any:
        helper, real = self.onnx.helper, self.onnx.TensorProto.FLOAT
        image, logits = self.graph.maps[0], self.graph.maps[-1]
        self._add("Identity", ["images"], "map0")
        for number, node in enumerate(self.graph.nodes):
            self._conv(number, node) if isinstance(node, Conv) else self._pool(number, node)
        flat = self._constant("flat", np.array([-1, len(logits.channels)], dtype=np.int64))
        self._add("Reshape", [f"map{len(self.graph.nodes)}", flat], "logits")
        graph = helper.make_graph(
            self.nodes,
            "sparse_lab",
            [helper.make_tensor_value_info("images", real, ["N", len(image.channels), *image.size])],
            [helper.make_tensor_value_info("logits", real, ["N", len(logits.channels)])],
            self.numbers,
        )
        versions = [helper.make_opsetid("", OPSET)]
        made = helper.make_model(
            graph, producer_name="sparse_lab", producer_version=version("sparse_lab") or "", opset_imports=versions
        )
        made.ir_version = IR_VERSION
        helper.set_model_props(made, {key: str(value) for key, value in about.items()})
        self.onnx.checker.check_model(made)
        return made

    def _conv(self, number: int, node: Conv) -> None:
        out, (places, size) = self.graph.maps[number + 1], self.slots[number + 1]
        bias = np.zeros(size)
        bias[places] = node.bias
        terms = [self._weights(number, node, bias)] if len(node.values) else [self._repeated(number, bias)]
        if len(node.varying):
            maps = np.zeros((1, size, *out.size))
            maps[0, places[node.varying]] = node.maps
            terms.append(self._constant(f"maps{number}", maps.astype(np.float32)))
        if node.residual is not None:
            terms.append(f"map{node.residual}")
        total = terms[0]
        for place, term in enumerate(terms[1:]):
            total = self._add("Add", [total, term], f"sum{number}.{place}")
        if node.activation == "relu":
            self._add("Relu", [total], f"map{number + 1}")
        elif node.activation == "relu6":
            bounds = [self._constant(f"{name}{number}", np.float32(at)) for name, at in (("low", 0.0), ("high", 6.0))]
            self._add("Clip", [total, *bounds], f"map{number + 1}")
        else:
            self._add("Identity", [total], f"map{number + 1}")

    def _weights(self, number: int, node: Conv, bias: np.ndarray) -> str:
        source, out = self.graph.maps[node.source], self.graph.maps[number + 1]
        (inputs, wide), (outputs, size) = self.slots[node.source], self.slots[number + 1]
        narrow = dense(node, source, out)
        if node.depthwise:
            weight = np.zeros((size, 1, *node.kernel))
            rows = np.isin(out.channels, source.channels)
            columns = np.searchsorted(source.channels, out.channels[rows])
            weight[outputs[rows], 0] = narrow[np.flatnonzero(rows), columns]
        else:
            weight = np.zeros((size, wide, *node.kernel))
            weight[outputs[:, None], inputs] = narrow
        names = [
            self._constant(f"weight{number}", weight.astype(np.float32)),
            self._constant(f"bias{number}", bias.astype(np.float32)),
        ]
        return self._add(
            "Conv",
            [f"map{node.source}", *names],
            f"conv{number}",
            kernel_shape=node.kernel,
            strides=node.stride,
            pads=[*node.padding, *node.padding],
            dilations=node.dilation,
            group=size if node.depthwise else 1,
        )

    def _repeated(self, number: int, bias: np.ndarray) -> str:
        """A bias that nothing is added to, once for each image."""
        shape = self._add("Shape", ["images"], f"count{number}", start=0, end=1)
        rest = self._constant(f"rest{number}", np.array([len(bias), *self.graph.maps[number + 1].size], dtype=np.int64))
        whole_shape = self._add("Concat", [shape, rest], f"shape{number}", axis=0)
        numbers = self._constant(f"bias{number}", bias.astype(np.float32)[None, :, None, None])
        return self._add("Expand", [numbers, whole_shape], f"conv{number}")

    def _pool(self, number: int, node: Any) -> None:
        source, made = f"map{node.source}", f"map{number + 1}"
        before, after = self.graph.maps[node.source].size, self.graph.maps[number + 1].size
        if isinstance(node, MaxPool):
            pads = [*node.padding, *node.padding]
            self._add("MaxPool", [source], made, kernel_shape=node.kernel, strides=node.stride, pads=pads)
        elif after == (1, 1):
            self._add("GlobalAveragePool", [source], made)
        else:
            # adaptive windows overlap, which no pool of ONNX does: a mean down, then one across
            down = self._constant(f"down{number}", _means(before[0], after[0]).astype(np.float32))
            across = self._constant(f"across{number}", _means(before[1], after[1]).T.astype(np.float32))
            rows = self._add("MatMul", [down, source], f"rows{number}")
            self._add("MatMul", [rows, across], made)

    def _add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [output], name=f"{kind}:{output}", **attributes))
        return output

    def _constant(self, name: str, numbers: Any) -> str:
        self.numbers.append(self.onnx.numpy_helper.from_array(np.asarray(numbers), name))
        return name


def _means(before: int, after: int) -> np.ndarray:
    """[after, before]: row i has the mean over floor(i before / after) to ceil((i + 1) before / after)."""
    matrix = np.zeros((after, before))
    for row in range(after):
        first, last = row * before // after, -(-(row + 1) * before // after)
        matrix[row, first:last] = 1.0 / (last - first)
    return matrix


def save_fastest(graph: Graph, about: Mapping[str, Any], path: Path, images: Tensor) -> Callable[[Tensor], Tensor]:
    """Write the file with or without padding to onnxruntime's favourite multiple of channels, whichever is faster here
    on copies of `images`; returns what runs it.
    """
    library()
    if [size for _, size in slots(graph, 1)] == [size for _, size in slots(graph, BEST_MULTIPLE)]:
        save(graph, about, path)
        return runner(path)
    padded = path.with_name(f".{path.name}.padded")
    try:
        save(graph, about, path)
        save(graph, about, padded, BEST_MULTIPLE)
        times = latency.by_batch({"thin": runner(path), "padded": runner(padded)}, images)
        gains = [times["padded"][size] / times["thin"][size] for size in times["thin"]]
        if math.prod(gains) < 1.0:
            padded.replace(path)
    finally:
        padded.unlink(missing_ok=True)
    return runner(path)
