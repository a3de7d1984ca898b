"""The packed file: a graph, or a trace, in a safetensors container, positions as gaps, checked as a whole before
anything is read.

Format 1 is a graph's. Tensors: `positions` and `channels` (coded bytes), `values` (float32 or float16), `biases` and
`maps` (float32), each the layers' parts one after the other. Format 2 is a trace's, see `packed_trace`. The metadata's
one key holds JSON: format, checksum, structure, and what is said of the network. The checksum is the SHA-256 of the
whole file with zeros in the checksum's place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sparse_lab.errors import UserError
from sparse_lab.export import packed_trace, rice_coding
from sparse_lab.export.graph import AveragePool, Conv, Graph, Map, MaxPool, Node, check
from sparse_lab.export.mixed import MixedNetwork
from sparse_lab.export.runtime import SparseNetwork
from sparse_lab.export.streams import DTYPES, Precision, Streams, scale_of
from sparse_lab.records.atomic_io import atomic_write
from sparse_lab.trace.trace import Trace

KEY = "sparse_lab"
FORMAT = 2  # the newest
UNKNOWN = "0" * 64  # where the checksum will stand
SUFFIX = ".sparse"
KINDS: dict[str, type[Node]] = {"conv": Conv, "max_pool": MaxPool, "average_pool": AveragePool}
WINDOW = ("kernel", "stride", "padding", "dilation")


def save(graph: Graph, about: Mapping[str, Any], path: Path, values: Precision = "fp32") -> None:
    """Write the file, whole. `about`: plain facts, among them `normalise`, `num_classes` and `image_size`."""
    parts = _Parts(values)
    maps = [parts.put_map(of) for of in graph.maps]
    nodes = [parts.put_node(node) for node in graph.nodes]
    _write(1, {"maps": maps, "nodes": nodes}, parts, about, path)


def save_trace(
    trace: Trace, tensors: Mapping[str, Tensor], about: Mapping[str, Any], path: Path, values: Precision = "fp32"
) -> None:
    """The same of a network that is no graph, with its tensors."""
    streams = Streams(values)
    _write(2, packed_trace.put(trace, tensors, streams), streams, about, path)


def _write(number: int, structure: dict[str, Any], streams: Streams, about: Mapping[str, Any], path: Path) -> None:
    from safetensors.numpy import save as serialise

    head = {"format": number, "checksum": UNKNOWN, "values": streams.values, "about": dict(about), **structure}
    text = json.dumps(head, separators=(",", ":"), allow_nan=False)
    content = serialise(streams.tensors(), {KEY: text})
    digest = hashlib.sha256(content).hexdigest().encode()
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.replace(UNKNOWN.encode(), digest, 1))


def load(path: str | Path) -> SparseNetwork | MixedNetwork:
    """The network in a packed file, ready to be called: float32 images (N, C, H, W) to logits (N, classes).

    Raises UserError, in one line, for a file that is missing, truncated, altered, of a newer version, or another kind.
    """
    path = Path(path)
    head, streams = _opened(path)
    if head["format"] == 1:
        return SparseNetwork(*_graph(head, streams, path))
    with _contradicting(path):
        return MixedNetwork(*packed_trace.take(head, Streams(head["values"], streams)), head["about"])


def read(path: Path) -> tuple[Graph, dict[str, Any]]:
    """The graph in a file of format 1 and what the file says of it. Raises UserError as `load`."""
    head, streams = _opened(path)
    return _graph(head, streams, path)


def _graph(head: dict[str, Any], streams: Mapping[str, np.ndarray], path: Path) -> tuple[Graph, dict[str, Any]]:
    with _contradicting(path):
        parts = _Parts(head["values"], streams)
        maps = tuple(parts.take_map(of) for of in head["maps"])
        nodes = tuple(parts.take_node(node, maps, number) for number, node in enumerate(head["nodes"]))
        graph = Graph(maps, nodes)
        check(graph)
        return graph, head["about"]


def _opened(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The head and the streams of a file that is whole."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    head = _checked(content, path)
    from safetensors.numpy import load as parse

    with _contradicting(path):
        return head, parse(content)


@contextmanager
def _contradicting(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # what has the right checksum was written by something else than `save`
        line = " ".join(str(error).split())
        raise UserError(f"{path} is not what it says it is ({type(error).__name__}: {line}): export it again") from None


def _checked(content: bytes, path: Path) -> dict[str, Any]:
    """The head of a file that is whole and unaltered and that this version reads."""
    head_size = int.from_bytes(content[:8], "little")
    try:
        frame = json.loads(content[8 : 8 + head_size]) if len(content) >= 8 + head_size else None
        head = None if frame is None else json.loads(frame["__metadata__"][KEY])
        size = 0 if frame is None else _end(frame)
    except (ValueError, KeyError, TypeError, IndexError):
        raise UserError(f"{path} is not a packed network, or it is damaged: export it again") from None
    if head is None or len(content) < 8 + head_size + size:
        raise UserError(f"{path} is truncated, or not a packed network: copy or export it again")
    digest = head.get("checksum") if isinstance(head, dict) else None
    if not isinstance(digest, str) or len(digest) != len(UNKNOWN):
        raise UserError(f"{path} is not a packed network, or it is damaged: export it again")
    if hashlib.sha256(content.replace(digest.encode(), UNKNOWN.encode(), 1)).hexdigest() != digest:
        raise UserError(f"{path} is damaged: its content is not what was saved; copy or export it again")
    if not isinstance(head.get("format"), int) or head["format"] > FORMAT:
        raise UserError(
            f"{path} has format {head.get('format')} and this sparse_lab reads up to {FORMAT}: "
            "pip install --upgrade sparse_lab"
        )
    return head


def _end(frame: dict[str, Any]) -> int:
    return max((entry["data_offsets"][1] for name, entry in frame.items() if name != "__metadata__"), default=0)


class _Parts(Streams):
    """The streams of a graph."""

    def put_map(self, of: Map) -> list[int]:
        there = np.zeros(of.full, dtype=np.uint8)
        there[of.channels] = 1
        self.put("channels", np.packbits(there))
        return [of.full, of.height, of.width]

    def take_map(self, sizes: list[int]) -> Map:
        full, height, width = sizes
        there = np.unpackbits(self.take("channels", -(-full // 8)), count=full)
        return Map(np.flatnonzero(there), full, height, width)

    def put_node(self, node: Node) -> dict[str, Any]:
        kind = next(name for name, of in KINDS.items() if isinstance(node, of))
        plain = {"kind": kind, "source": node.source}
        plain |= {key: getattr(node, key) for key in WINDOW if hasattr(node, key)}
        if isinstance(node, Conv):
            bits, code = rice_coding.encode(node.positions)
            self.put("positions", np.frombuffer(code, dtype=np.uint8))
            plain |= {"bits": bits, "bytes": len(code), "weights": len(node.values)}
            plain |= {"depthwise": node.depthwise, "residual": node.residual, "activation": node.activation}
            plain |= self.put_values(node.values)
            self.put("biases", node.bias.astype(np.float32))
            plain["varying"] = node.varying.tolist()
            plain["classes"] = self._put_maps(node.maps.astype(np.float32))
        return plain

    def take_node(self, plain: dict[str, Any], maps: tuple[Map, ...], number: int) -> Node:
        kind, source = KINDS[plain["kind"]], plain["source"]
        if not 0 <= source <= number:
            raise ValueError(f"layer {number} reads what is not yet there")
        window = {key: tuple(plain[key]) for key in WINDOW if key in plain}
        if kind is not Conv:
            return kind(source, **window)  # type: ignore[arg-type]
        code = self.take("positions", plain["bytes"]).tobytes()
        values = self.take_values(plain["weights"], plain["scale"])
        out = maps[number + 1]
        return Conv(
            source,
            **window,  # type: ignore[arg-type]
            depthwise=plain["depthwise"],
            positions=rice_coding.decode(code, plain["bits"], plain["weights"]),
            values=values,
            bias=self.take("biases", len(out.channels)).astype(np.float64),
            varying=np.array(plain["varying"], dtype=np.int64),
            maps=self._take_maps(len(plain["varying"]), out, plain["classes"]),
            residual=plain["residual"],
            activation=plain["activation"],
        )

    def _put_maps(self, maps: np.ndarray) -> list[list[int]]:
        """Bias maps differ at the borders alone, mostly: each kind of row and of column is stored once."""
        if not len(maps):
            return [[], []]
        first_row, rows = _kinds(np.moveaxis(maps, 1, 0))
        first_column, columns = _kinds(np.moveaxis(maps, 2, 0))
        self.put("maps", maps[:, first_row][:, :, first_column].ravel())
        return [rows.tolist(), columns.tolist()]

    def _take_maps(self, count: int, out: Map, classes: list[list[int]]) -> np.ndarray:
        if not count:
            return np.zeros((0, *out.size))
        rows, columns = (np.array(kinds) for kinds in classes)
        size = count, rows.max() + 1, columns.max() + 1
        kinds = self.take("maps", math.prod(size)).reshape(size).astype(np.float64)
        return kinds[:, rows][:, :, columns]


def _kinds(slices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each different slice stands first, and of which kind each one is."""
    _, first, kinds = np.unique(slices.reshape(len(slices), -1), axis=0, return_index=True, return_inverse=True)
    return first, kinds.ravel()


def rounded(graph: Graph, values: Precision) -> Graph:
    """The graph with the numbers that a packed file of it holds."""
    return Graph(graph.maps, tuple(_rounded(node, values) for node in graph.nodes))


def _rounded(node: Node, values: Precision) -> Node:
    if not isinstance(node, Conv):
        return node
    scale = scale_of(node.values) if values == "fp16" else 1.0
    kept = (node.values / scale).astype(DTYPES[values]).astype(np.float64) * scale
    bias, maps = (numbers.astype(np.float32).astype(np.float64) for numbers in (node.bias, node.maps))
    return dataclasses.replace(node, values=kept, bias=bias, maps=maps)
