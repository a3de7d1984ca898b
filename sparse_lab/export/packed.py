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
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from sparse_lab.coding import head, rice_coding
from sparse_lab.coding.rice_coding import MOST_BITS
from sparse_lab.errors import UserError
from sparse_lab.export.graph import Activation, AveragePool, Conv, Graph, Map, MaxPool, Node, check
from sparse_lab.export.streams import DTYPES, Precision, Streams, scale_of
from sparse_lab.host import regular_file
from sparse_lab.records.atomic_io import atomic_write, printable

if TYPE_CHECKING:  # a graph is read and computed without torch
    from torch import Tensor

    from sparse_lab.export.mixed import MixedNetwork
    from sparse_lab.export.runtime import SparseNetwork
    from sparse_lab.trace.trace import Trace

KEY = "sparse_lab"
FORMAT = 2  # the newest
UNKNOWN = "0" * 64  # where the checksum will stand
SUFFIX = ".sparse"
KINDS: dict[str, type[Node]] = {"conv": Conv, "max_pool": MaxPool, "average_pool": AveragePool}
WINDOW = ("kernel", "stride", "padding", "dilation")
NUMBERS = ("positions", "values", "bias", "maps")  # of a convolution, in the streams
OF_CONV = ("bits", "bytes", "weights", "scale", "classes")
HEAD = ("format", "checksum", "values", "about")
# which streams there may be, and what each of their numbers may be
STREAMS = {
    **dict.fromkeys(("positions", "channels"), ("U8",)),
    **dict.fromkeys(("biases", "maps", "numbers"), ("F32",)),
    "values": ("F32", "F16"),
    **{"integers1": ("U8",), "integers2": ("I16",), "integers4": ("I32",), "integers8": ("I64",)},
}
LARGEST = 16 * regular_file.GIB
LINE = 200  # characters of what went wrong
ACTIVATIONS = get_args(Activation)


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
    from sparse_lab.export import packed_trace

    streams = Streams(values)
    _write(2, packed_trace.put(trace, tensors, streams), streams, about, path)


def _write(number: int, structure: dict[str, Any], streams: Streams, about: Mapping[str, Any], path: Path) -> None:
    from safetensors.numpy import save as serialise

    said = {"format": number, "checksum": UNKNOWN, "values": streams.values, "about": dict(about), **structure}
    text = json.dumps(said, separators=(",", ":"), allow_nan=False)
    content = serialise(streams.tensors(), {KEY: text})
    digest = hashlib.sha256(content).hexdigest().encode()
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.replace(UNKNOWN.encode(), digest, 1))


def load(path: str | Path) -> SparseNetwork | MixedNetwork:
    """The network in a packed file, ready to be called: float32 images (N, C, H, W) to logits (N, classes), numpy
    arrays or torch tensors. torch is imported for a file of format 2 alone.

    Raises UserError, in one line, for a file that is missing, truncated, altered, of a newer version, or another kind,
    and where a package is missing that it needs.
    """
    path = Path(path)
    with _needing("numba", path):
        from sparse_lab.export.runtime import SparseNetwork
    given = _opened(path)
    if given.said["format"] == 1:
        with _contradicting(path):
            return SparseNetwork(*_graph(given))
    with _needing("torch", path):
        from sparse_lab.export import packed_trace
        from sparse_lab.export.mixed import MixedNetwork
    with _contradicting(path):
        return MixedNetwork(*packed_trace.take(given.said, given.streams(), given.allowance), given.said["about"])


@contextmanager
def _needing(package: str, path: Path) -> Iterator[None]:
    """What is imported here needs a package that a device may lack."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise UserError(f"the network in {path} needs the package {package}, which is not here: install it") from None


def read(path: Path) -> tuple[Graph, dict[str, Any]]:
    """The graph in a file of format 1 and what the file says of it. Raises UserError as `load`."""
    given = _opened(path)
    with _contradicting(path):
        return _graph(given)


@dataclass(frozen=True)
class _Given:
    """What a file that is whole holds: what its head says, its numbers, and how many it may stand for."""

    said: dict[str, Any]
    numbers: dict[str, np.ndarray]
    allowance: head.Allowance

    def streams(self) -> Streams:
        return Streams(self.said["values"], self.numbers)


def _graph(given: _Given) -> tuple[Graph, dict[str, Any]]:
    parts = _Parts(given.said["values"], given.numbers)
    head.only(given.said, (*HEAD, "maps", "nodes"))
    maps = tuple(parts.take_map(of, given.allowance) for of in head.items(given.said, "maps"))
    given.allowance.check_results(sum(len(of.channels) * of.height * of.width for of in maps))
    plain = head.items(given.said, "nodes")
    if len(maps) != len(plain) + 1:
        raise ValueError(f"{len(plain)} layers make {len(maps)} maps")
    nodes = tuple(parts.take_node(node, maps, number, given.allowance) for number, node in enumerate(plain))
    parts.end()
    graph = Graph(maps, nodes)
    check(graph)
    return graph, given.said["about"]


def _opened(path: Path) -> _Given:
    """The head and the numbers of a file that is whole, unaltered and of a format that this version reads."""
    try:
        content = regular_file.read_bytes(path, LARGEST)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    found = _checked(content, path)
    with _needing("safetensors", path):
        from safetensors.numpy import load as parse

    with _contradicting(path):
        head.choice(found, "values", tuple(DTYPES))
        head.mapping(found, "about")
        return _Given(found, parse(content), head.Allowance(len(content)))


@contextmanager
def _contradicting(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # what has the right checksum was written by something else than `save`
        line = printable(" ".join(str(error).split())[:LINE])
        raise UserError(f"{path} is not what it says it is ({type(error).__name__}: {line}): export it again") from None


def _checked(content: bytes, path: Path) -> dict[str, Any]:
    """The head of a file that is whole and unaltered and that this version reads."""
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 + size:
        raise UserError(f"{path} is truncated, or not a packed network: copy or export it again")
    try:
        frame = head.parsed(content[8 : 8 + size])
        found = head.parsed(head.text(head.field(frame, "__metadata__"), KEY))
        end, digest = _end(frame), head.text(found, "checksum")
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not a packed network, or it is damaged: export it again") from None
    if len(content) < 8 + size + end:
        raise UserError(f"{path} is truncated, or not a packed network: copy or export it again")
    if re.fullmatch(r"[0-9a-f]{64}", digest) is None:
        raise UserError(f"{path} is not a packed network, or it is damaged: export it again")
    if hashlib.sha256(content.replace(digest.encode(), UNKNOWN.encode(), 1)).hexdigest() != digest:
        raise UserError(f"{path} is damaged: its content is not what was saved; copy or export it again")
    number = found.get("format")
    if type(number) is not int or not 0 < number <= FORMAT:
        raise UserError(
            f"{path} has format {str(printable(str(number)))[:20]} and this sparse_lab reads up to {FORMAT}: "
            "pip install --upgrade sparse_lab"
        )
    return found


def _end(frame: dict[str, Any]) -> int:
    """Where the last stream ends. Raises ValueError for a frame that is not of streams: each one row of numbers."""
    end = 0
    for name, entry in frame.items():
        if name == "__metadata__":
            head.only(entry, (KEY,))
            continue
        if name not in STREAMS:
            raise ValueError(f"a stream {name[:40]!r}")
        head.only(entry, ("dtype", "shape", "data_offsets"))
        head.choice(entry, "dtype", STREAMS[name])
        head.wholes(entry, "shape", 0, LARGEST, 1)
        end = max(end, head.wholes(entry, "data_offsets", 0, LARGEST, 2)[1])
    return end


class _Parts(Streams):
    """The streams of a graph."""

    def put_map(self, of: Map) -> list[int]:
        there = np.zeros(of.full, dtype=np.uint8)
        there[of.channels] = 1
        self.put("channels", np.packbits(there))
        return [of.full, of.height, of.width]

    def take_map(self, sizes: Any, allowance: head.Allowance) -> Map:
        full, height, width = head.wholes({"map": sizes}, "map", 1, head.SIDE**2, 3)
        if max(height, width) > head.SIDE:
            raise ValueError(f"a map of {height:,} x {width:,} pixels")
        allowance.take((full,))
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

    def take_node(self, plain: Any, maps: tuple[Map, ...], number: int, allowance: head.Allowance) -> Node:
        kind = KINDS[head.choice(plain, "kind", tuple(KINDS))]
        names = [entry.name for entry in dataclasses.fields(kind) if entry.name not in NUMBERS]
        head.only(plain, ("kind", *names, *(OF_CONV if kind is Conv else ())))
        source = head.whole(plain, "source", 0, number)
        window = {key: head.wholes(plain, key, key != "padding", head.SIDE, 2) for key in WINDOW if key in names}
        if kind is not Conv:
            return kind(source, **window)  # type: ignore[arg-type]
        code = self.take("positions", head.whole(plain, "bytes", 0, LARGEST)).tobytes()
        weights, bits = head.whole(plain, "weights", 0, 8 * len(code)), head.whole(plain, "bits", 0, MOST_BITS)
        out = maps[number + 1]
        varying = np.array(head.wholes(plain, "varying", 0, len(out.channels) - 1), dtype=np.int64)
        return Conv(
            source,
            **window,  # type: ignore[arg-type]
            depthwise=head.choice(plain, "depthwise", (False, True)),
            positions=rice_coding.decode(code, bits, weights),
            values=self.take_values(weights, head.number(plain, "scale")),
            bias=self.take("biases", len(out.channels)).astype(np.float64),
            varying=varying,
            maps=self._take_maps(len(varying), out, plain, allowance),
            residual=None if head.field(plain, "residual") is None else head.whole(plain, "residual", 0, number),
            activation=head.choice(plain, "activation", ACTIVATIONS),
        )

    def _put_maps(self, maps: np.ndarray) -> list[list[int]]:
        """Bias maps differ at the borders alone, mostly: each kind of row and of column is stored once."""
        if not len(maps):
            return [[], []]
        first_row, rows = _kinds(np.moveaxis(maps, 1, 0))
        first_column, columns = _kinds(np.moveaxis(maps, 2, 0))
        self.put("maps", maps[:, first_row][:, :, first_column].ravel())
        return [rows.tolist(), columns.tolist()]

    def _take_maps(self, count: int, out: Map, plain: Any, allowance: head.Allowance) -> np.ndarray:
        classes = head.items(plain, "classes")
        if not count:
            if classes != [[], []]:
                raise ValueError("classes of bias maps that are not there")
            return np.zeros((0, *out.size))
        if len(classes) != 2:
            raise ValueError("classes are those of rows and of columns")
        rows, columns = (
            np.array(head.wholes({"classes": kinds}, "classes", 0, size - 1, size))
            for kinds, size in zip(classes, out.size, strict=True)
        )
        allowance.take((count, *out.size))
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
