"""The packed file: a graph in a safetensors container, positions as gaps, checked as a whole before anything is read.

Tensors: `positions` and `channels` (coded bytes), `values` (float32 or float16), `biases` and `maps` (float32), each
the layers' parts one after the other. The metadata's one key holds JSON: format, checksum, structure, and what is
said of the network. The checksum is the SHA-256 of the whole file with zeros in the checksum's place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sparse_lab.errors import UserError
from sparse_lab.export import rice_coding
from sparse_lab.export.graph import AveragePool, Conv, Graph, Map, MaxPool, Node, check
from sparse_lab.export.runtime import SparseNetwork
from sparse_lab.records.atomic_io import atomic_write

KEY = "sparse_lab"
FORMAT = 1
UNKNOWN = "0" * 64  # where the checksum will stand
SUFFIX = ".sparse"
Precision = Literal["fp32", "fp16"]
DTYPES = {"fp32": np.float32, "fp16": np.float16}
KINDS: dict[str, type[Node]] = {"conv": Conv, "max_pool": MaxPool, "average_pool": AveragePool}
WINDOW = ("kernel", "stride", "padding", "dilation")


def save(graph: Graph, about: Mapping[str, Any], path: Path, values: Precision = "fp32") -> None:
    """Write the file, whole. `about`: plain facts, among them `normalise`, `num_classes` and `image_size`."""
    from safetensors.numpy import save as serialise

    parts = _Parts(values)
    maps = [parts.put_map(of) for of in graph.maps]
    nodes = [parts.put(node, out) for node, out in zip(graph.nodes, graph.maps[1:], strict=True)]
    head = {"format": FORMAT, "checksum": UNKNOWN, "values": values, "about": dict(about), "maps": maps, "nodes": nodes}
    text = json.dumps(head, separators=(",", ":"), allow_nan=False)
    content = serialise(parts.tensors(), {KEY: text})
    digest = hashlib.sha256(content).hexdigest().encode()
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.replace(UNKNOWN.encode(), digest, 1))


def load(path: str | Path) -> SparseNetwork:
    """The network in a packed file, ready to be called: float32 images (N, 3, H, W) to logits (N, classes).

    Raises UserError, in one line, for a file that is missing, truncated, altered, of a newer version, or another kind.
    """
    return SparseNetwork(*read(Path(path)))


def read(path: Path) -> tuple[Graph, dict[str, Any]]:
    """The graph and what the file says of it. Raises UserError as `load`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    head = _checked(content, path)
    from safetensors.numpy import load as parse

    try:
        parts = _Parts(head["values"], parse(content))
        maps = tuple(parts.take_map(of) for of in head["maps"])
        nodes = tuple(parts.take(node, maps, number) for number, node in enumerate(head["nodes"]))
        graph = Graph(maps, nodes)
        check(graph)
        return graph, head["about"]
    except Exception as error:  # what has the right checksum was written by something else than `save`
        raise UserError(
            f"{path} is not what it says it is ({type(error).__name__}: {error}): export it again"
        ) from None


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


class _Parts:
    """The layers' numbers as a few long streams: written one after the other, and taken back in the same order."""

    def __init__(self, values: str, tensors: Mapping[str, np.ndarray] | None = None) -> None:
        self.values = values
        self.streams: dict[str, list[np.ndarray]] = {}
        self.given = tensors or {}
        self.at: dict[str, int] = {}

    def tensors(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate(parts) for name, parts in self.streams.items()}

    def put_map(self, of: Map) -> list[int]:
        there = np.zeros(of.full, dtype=np.uint8)
        there[of.channels] = 1
        self._put("channels", np.packbits(there))
        return [of.full, of.height, of.width]

    def take_map(self, sizes: list[int]) -> Map:
        full, height, width = sizes
        there = np.unpackbits(self._take("channels", -(-full // 8)), count=full)
        return Map(np.flatnonzero(there), full, height, width)

    def put(self, node: Node, out: Map) -> dict[str, Any]:
        kind = next(name for name, of in KINDS.items() if isinstance(node, of))
        plain = {"kind": kind, "source": node.source}
        plain |= {key: getattr(node, key) for key in WINDOW if hasattr(node, key)}
        if isinstance(node, Conv):
            bits, code = rice_coding.encode(node.positions)
            self._put("positions", np.frombuffer(code, dtype=np.uint8))
            plain |= {"bits": bits, "bytes": len(code), "weights": len(node.values)}
            plain |= {"depthwise": node.depthwise, "residual": node.residual, "activation": node.activation}
            plain["scale"] = _scale(node.values) if self.values == "fp16" else 1.0
            self._put("values", (node.values / plain["scale"]).astype(DTYPES[self.values]))
            self._put("biases", node.bias.astype(np.float32))
            plain["varying"] = node.varying.tolist()
            plain["classes"] = self._put_maps(node.maps.astype(np.float32))
        return plain

    def take(self, plain: dict[str, Any], maps: tuple[Map, ...], number: int) -> Node:
        kind, source = KINDS[plain["kind"]], plain["source"]
        if not 0 <= source <= number:
            raise ValueError(f"layer {number} reads what is not yet there")
        window = {key: tuple(plain[key]) for key in WINDOW if key in plain}
        if kind is not Conv:
            return kind(source, **window)  # type: ignore[arg-type]
        code = self._take("positions", plain["bytes"]).tobytes()
        values = self._take("values", plain["weights"]).astype(np.float64) * plain["scale"]
        out = maps[number + 1]
        return Conv(
            source,
            **window,  # type: ignore[arg-type]
            depthwise=plain["depthwise"],
            positions=rice_coding.decode(code, plain["bits"], plain["weights"]),
            values=values,
            bias=self._take("biases", len(out.channels)).astype(np.float64),
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
        self._put("maps", maps[:, first_row][:, :, first_column].ravel())
        return [rows.tolist(), columns.tolist()]

    def _take_maps(self, count: int, out: Map, classes: list[list[int]]) -> np.ndarray:
        if not count:
            return np.zeros((0, *out.size))
        rows, columns = (np.array(kinds) for kinds in classes)
        size = count, rows.max() + 1, columns.max() + 1
        kinds = self._take("maps", math.prod(size)).reshape(size).astype(np.float64)
        return kinds[:, rows][:, :, columns]

    def _put(self, name: str, part: np.ndarray) -> None:
        self.streams.setdefault(name, []).append(part)

    def _take(self, name: str, count: int) -> np.ndarray:
        start = self.at.get(name, 0)
        self.at[name] = start + count
        part = self.given[name][start : start + count] if count else np.zeros(0, dtype=np.uint8)
        if len(part) != count:
            raise ValueError(f"{name} ends too early")
        return part


def _kinds(slices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each different slice stands first, and of which kind each one is."""
    _, first, kinds = np.unique(slices.reshape(len(slices), -1), axis=0, return_index=True, return_inverse=True)
    return first, kinds.ravel()


def _scale(values: np.ndarray) -> float:
    """A power of two that brings the largest value below 1: float16 ends at 65,504, and powers of two round nothing."""
    largest = float(np.abs(values).max(initial=0.0))
    return 2.0 ** math.ceil(math.log2(largest)) if largest else 1.0


def rounded(graph: Graph, values: Precision) -> Graph:
    """The graph with the numbers that a packed file of it holds."""
    return Graph(graph.maps, tuple(_rounded(node, values) for node in graph.nodes))


def _rounded(node: Node, values: Precision) -> Node:
    if not isinstance(node, Conv):
        return node
    scale = _scale(node.values) if values == "fp16" else 1.0
    kept = (node.values / scale).astype(DTYPES[values]).astype(np.float64) * scale
    bias, maps = (numbers.astype(np.float32).astype(np.float64) for numbers in (node.bias, node.maps))
    return dataclasses.replace(node, values=kept, bias=bias, maps=maps)
