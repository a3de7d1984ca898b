"""Packed files by somebody who knows the format: whatever the head says, the answer is a network or one line."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as parse
from safetensors.numpy import save as serialise

import sparse_lab
from sparse_lab.errors import UserError
from sparse_lab.export.dead_channels import reduced
from sparse_lab.export.lowering import traced
from sparse_lab.export.packed import KEY, UNKNOWN, save, save_trace
from sparse_lab.trace.capture import captured, state_of
from sparse_lab.trace.trace import Named, Step, Trace, Value

ABOUT = {"name": "a run", "num_classes": 5, "image_size": 16, "normalise": {"mean": [0.5] * 3, "std": [0.25] * 3}}
EXAMPLES = 1_000 if os.environ.get("NIGHT") else 25
GROWN = 700 * 2**10  # KiB that all files of a test together may need, one after the other
SECONDS = 20.0  # for one file, on a busy machine; they take milliseconds
# what stands in for a value: each of another kind
POOL = [
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 10**6, 2**31, 2**40, 2**63 - 1, -(2**63), 10**400, 0.0, -0.0, 0.5, -1.5,
    1e308, 5e-324, "", "conv", "relu", "sigmoid", "fp16", "max_pool", "ü\u202e", "x" * 300, [], [[]], {}, [1], [0, 0],
    [3, 3], [-1, 2], [1, 1, 1], [2**16, 2**16], [True, True], [1.0, 1.0], ["a"], {"a": 1}, {"value": 0}, {"value": 3},
    {"tensor": "head.weight"}, {"tensor": "?"}, {"batch": 1}, {"batch": 2**20}, {"type": "float32"}, {"type": "int64"},
    {"number": "nan"}, {"number": "inf"}, {"a": {"b": [[[[1]]]]}}, [[0, 1], [1, 0]],
]  # fmt: skip


def _parts(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    head = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][KEY])
    return head, parse(content)


def _sealed(content: bytes) -> bytes:
    """With the checksum that belongs to it."""
    return content.replace(UNKNOWN.encode(), hashlib.sha256(content).hexdigest().encode(), 1)


def forge(file: Path, text: str, streams: dict[str, Any]) -> None:
    file.write_bytes(_sealed(serialise(streams, {KEY: text})))


@pytest.fixture(scope="module")
def sound(make, own, masked, tmp_path_factory) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """A file of each format and precision: its head, with no checksum yet, and its streams."""
    folder, found = tmp_path_factory.mktemp("sound"), {}
    model, _ = make("mobilenet_v2", 0.125, 21, 0.1)
    graph = reduced(traced(model, (3, 21, 21)))
    torch.manual_seed(2)
    save(graph, ABOUT, folder / "graph")
    save(graph, ABOUT, folder / "graph half", "fp16")
    for name in ("attends", "reshaped"):
        network = masked(own(name).float(), (3, 16, 16), 0.2)
        trace = captured(network, (3, 16, 16))
        tensors = {**state_of(trace, network.state_dict()), **trace.constants}
        save_trace(trace, tensors, ABOUT, folder / name)
    for path in folder.iterdir():
        network = sparse_lab.load(path)
        network(torch.randn(2, *((3, 21, 21) if path.name.startswith("graph") else (3, 16, 16))))  # compiles kernels
        head, streams = _parts(path)
        found[path.name] = {**head, "checksum": UNKNOWN}, streams
    return found


def answer(file: Path) -> str | None:
    """The one line that a file gets; None where it is a network, which then answers."""
    begun, line = time.monotonic(), None
    try:
        network = sparse_lab.load(file)
    except UserError as error:
        line = str(error)
        assert line.isprintable() and len(line) < 500 and str(file) in line
    else:
        shape = network.trace.images if hasattr(network, "trace") else network._execute.shape
        if torch.Size(shape).numel() < 10**6:
            try:
                assert network(torch.randn(2, *shape)).dim() == 2
            except UserError as error:
                line = str(error)
                assert line.isprintable() and len(line) < 500
    assert time.monotonic() - begun < SECONDS
    return line


@pytest.fixture
def bounded() -> Iterator[None]:
    """The process's peak grows by what a file justifies."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWN


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value in a head."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*path, key)
        yield from nodes(one, (*path, key))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def change(head: Any, data: st.DataObject) -> None:
    """Replace, remove, double or swap one value, in place."""
    paths = list(nodes(head))
    path = data.draw(st.sampled_from(paths), "where")
    holder, key = _at(head, path[:-1]), path[-1]
    kind = data.draw(st.sampled_from(["replace", "replace", "remove", "double", "swap"]), "how")
    if kind == "replace":
        holder[key] = copy.deepcopy(data.draw(st.sampled_from(POOL), "by"))
    elif kind == "remove":
        del holder[key]
    elif kind == "double" and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif kind == "swap":
        other = data.draw(st.sampled_from(paths), "with")
        holder[key] = copy.deepcopy(_at(head, other))
    else:
        holder[f"{key}2"] = copy.deepcopy(holder[key])


@pytest.mark.parametrize("which", ["graph", "graph half", "attends", "reshaped"])
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_head_is_a_network_or_one_line(which, sound, tmp_path_factory, bounded, data):
    head, streams = copy.deepcopy(sound[which])
    for _ in range(data.draw(st.integers(1, 2), "changes")):
        change(head, data)
    file = tmp_path_factory.getbasetemp() / "forged.sparse"
    head = {**head, "checksum": UNKNOWN} if isinstance(head, dict) else head
    forge(file, json.dumps(head), streams)
    answer(file)


def _set(*path: Any, to: Any) -> Callable[[Any], None]:
    def change(head: Any) -> None:
        _at(head, path[:-1])[path[-1]] = to

    return change


GRAPHS = {
    "a kernel of one side": _set("nodes", 0, "kernel", to=[3]),
    "a kernel of three": _set("nodes", 0, "kernel", to=[3, 3, 3]),
    "a kernel of text": _set("nodes", 0, "kernel", to="33"),
    "a stride of 0": _set("nodes", 0, "stride", to=[0, 2]),
    "a huge stride": _set("nodes", 0, "stride", to=[2**40, 2**40]),
    "a huge padding": _set("nodes", 0, "padding", to=[2**16, 2**16]),
    "a scale that is no number": _set("nodes", 0, "scale", to=float("nan")),
    "a scale without end": _set("nodes", 0, "scale", to=float("inf")),
    "a scale of 0": _set("nodes", 0, "scale", to=0),
    "a scale that is true": _set("nodes", 0, "scale", to=True),
    "a source that is true": _set("nodes", 1, "source", to=True),
    "a source that is itself": _set("nodes", 1, "source", to=2),
    "a source before the image": _set("nodes", 1, "source", to=-1),
    "a source of 0.0": _set("nodes", 0, "source", to=0.0),
    "weights without end": _set("nodes", 0, "weights", to=2**62),
    "fewer weights than none": _set("nodes", 0, "weights", to=-1),
    "bits below 0": _set("nodes", 0, "bits", to=-3),
    "bits without end": _set("nodes", 0, "bits", to=10**9),
    "bytes below 0": _set("nodes", 0, "bytes", to=-3),
    "an image of 10^18 pixels": _set("maps", 0, to=[3, 10**9, 10**9]),
    "a map of 10^12 channels": _set("maps", 1, to=[10**12, 1, 1]),
    "a map below 0": _set("maps", 1, to=[-8, 11, 11]),
    "a map of two": _set("maps", 1, to=[8, 11]),
    "maps that are none": _set("maps", to={"0": [1, 1, 1]}),
    "no layers": _set("nodes", to=[]),
    "layers that are none": _set("nodes", to=7),
    "a layer that is none": _set("nodes", 0, to=[]),
    "a layer of a kind of its own": _set("nodes", 0, "kind", to=["conv"]),
    "depthwise by a number": _set("nodes", 0, "depthwise", to=1),
    "a channel beyond": _set("nodes", 0, "varying", to=[10**6]),
    "classes of maps that are not there": _set("nodes", 0, "classes", to=[[0] * 11, [0] * 11]),
    "about that is none": _set("about", to=[]),
    "values of a kind of their own": _set("values", to="fp8"),
    "values of another kind": _set("values", to="fp16"),
    "what nobody reads": _set("more", to=1),
    "a format that is true": _set("format", to=True),
    "a format of 1.0": _set("format", to=1.0),
    "a format of 0": _set("format", to=0),
    "a format of text": _set("format", to="1"),
    "another format": _set("format", to=2),
}


def _step(*step: Any) -> Callable[[Any], None]:
    return lambda head: head["trace"]["steps"].insert(0, list(step))


IMAGES = {"value": 0}
TRACES = {
    "images of text": _set("trace", "images", to=["3", 16, 16]),
    "images of 10^14 numbers": _set("trace", "images", to=[2**16, 2**16, 2**16]),
    "no images": _set("trace", "images", to=[]),
    "a result that is true": _set("trace", "result", to=True),
    "a result beyond": _set("trace", "result", to=10**9),
    "no steps": _set("trace", "steps", to={}),
    "more steps than any": _set("trace", "steps", to=[["relu", {"self": IMAGES}]] * 10_000),
    "names that are none": _set("trace", "parameters", to=[[]]),
    "a tensor of 10^12 numbers": _set("tensors", 0, to={"name": "x", "shape": [10**6, 10**6]}),
    "a sparse tensor of 2^29 numbers": _set(
        "tensors", 0, to={"name": "x", "shape": [2**29], "bits": 0, "bytes": 0, "weights": 0, "scale": 1.0}
    ),
    "a tensor that is true": _set("tensors", 0, "shape", to=[True]),
    "a tensor below 0": _set("tensors", 0, "shape", to=[-1]),
    "a tensor of 1,000 sides": _set("tensors", 0, "shape", to=[1] * 1000),
    "a tensor that is none": _set("tensors", 0, to=5),
    "a tensor without a name": _set("tensors", 0, "name", to=None),
    "tensors twice": lambda head: head["tensors"].insert(0, head["tensors"][0]),
    "an operation of its own": _step("system", {"self": IMAGES}),
    "an operation that is none": _step(["relu"], {"self": IMAGES}),
    "arguments of others": _step("relu", {"self": IMAGES, "out": IMAGES}),
    "arguments by place": _step("relu", [IMAGES]),
    "a step that reads itself": _step("relu", {"self": {"value": 1}}),
    "a file's own device": _step("zeros", {"size": [2], "device": "cuda"}),
    "10^15 numbers": _step("zeros", {"size": [10**15]}),
    "10^18 numbers in a row": _step("arange", {"end": 10**18}),
    "10^8 pieces": lambda head: head["trace"]["steps"].__setitem__(
        slice(0, 2), [["zeros", {"size": [10**8]}], ["unbind.int", {"self": {"value": 1}}]]
    ),
    "10^8 pieces by one": lambda head: head["trace"]["steps"].__setitem__(
        slice(0, 2), [["zeros", {"size": [10**8]}], ["split.Tensor", {"self": {"value": 1}, "split_size": 1}]]
    ),
    "10^9 pieces of nothing": _step("tensor_split.sections", {"self": IMAGES, "sections": 10**9}),
    "a window of nothing": _step("conv2d", {"input": IMAGES, "weight": IMAGES, "stride": [0, 0]}),
    "pooling by text": _step("max_pool2d", {"self": IMAGES, "kernel_size": "2"}),
}


NONE = [("graph", what) for what in GRAPHS] + [("attends", what) for what in TRACES]


@pytest.mark.parametrize(("which", "what"), NONE)
def test_a_head_that_is_no_network(which, what, sound, tmp_path, bounded):
    head, streams = copy.deepcopy(sound[which])
    (GRAPHS | TRACES)[what](head)
    forge(tmp_path / "forged.sparse", json.dumps(head), streams)
    assert answer(tmp_path / "forged.sparse") is not None


def _text(sound: Any, old: str, new: str) -> str:
    text = json.dumps(sound["graph"][0])
    assert old in text
    return text.replace(old, new, 1)


TEXTS = {
    "lists in lists": lambda sound: _text(sound, '"about": {', '"about": {"x": ' + "[" * 200 + "]" * 200 + ", "),
    "100,000 lists in lists": lambda sound: "[" * 100_000 + UNKNOWN,
    "mappings in mappings": lambda sound: '{"a":' * 20_000 + f'"{UNKNOWN}"' + "}" * 20_000,
    "a name twice": lambda sound: _text(sound, '"values"', '"values": "fp16", "values"'),
    "a name twice in a layer": lambda sound: _text(sound, '"bits"', '"bits": 3, "bits"'),
    "NaN": lambda sound: _text(sound, '"scale": 1.0', '"scale": NaN'),
    "a number of 10,000 digits": lambda sound: _text(sound, '"scale": 1.0', '"scale": 1' + "0" * 10_000),
    "half of a sign": lambda sound: _text(sound, '"a run"', '"\\ud800"'),
    "no mapping": lambda sound: json.dumps([UNKNOWN]),
    "nothing": lambda sound: UNKNOWN,
}


@pytest.mark.parametrize("what", TEXTS)
def test_a_head_that_is_no_head(what, sound, tmp_path, bounded):
    forge(tmp_path / "forged.sparse", TEXTS[what](sound), sound["graph"][1])
    found = answer(tmp_path / "forged.sparse")
    assert found is not None or what == "half of a sign"


FRAMES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "offsets of text": lambda frame: frame["biases"].update(data_offsets=["0", "4"]),
    "offsets that are one number": lambda frame: frame["biases"].update(data_offsets=4),
    "three offsets": lambda frame: frame["biases"].update(data_offsets=[0, 4, 8]),
    "no offsets": lambda frame: frame["biases"].pop("data_offsets"),
    "offsets below 0": lambda frame: frame["biases"].update(data_offsets=[-8, -4]),
    "offsets backwards": lambda frame: frame["biases"].update(data_offsets=frame["biases"]["data_offsets"][::-1]),
    "offsets that are true": lambda frame: frame["biases"].update(data_offsets=[False, True]),
    "offsets without end": lambda frame: frame["biases"].update(data_offsets=[0, 1e400]),
    "another type": lambda frame: frame["biases"].update(dtype="F64"),
    "a type that is none": lambda frame: frame["biases"].update(dtype=["F32"]),
    "a shape of two": lambda frame: frame["biases"].update(shape=[1, *frame["biases"]["shape"]]),
    "a shape of text": lambda frame: frame["biases"].update(shape="4"),
    "a stream of its own": lambda frame: frame.update(other=frame.pop("biases")),
    "a stream that is none": lambda frame: frame.update(biases=[]),
    "one over another": lambda frame: frame["biases"].update(data_offsets=frame["values"]["data_offsets"]),
    "metadata that are none": lambda frame: frame.update(__metadata__="x" + UNKNOWN),
    "a head that is none": lambda frame: frame["__metadata__"].update({KEY: 5, "x": UNKNOWN}),
}


@pytest.mark.parametrize("what", FRAMES)
def test_a_container_that_is_none(what, sound, tmp_path, bounded):
    head, streams = sound["graph"]
    content = serialise(streams, {KEY: json.dumps(head)})
    size = int.from_bytes(content[:8], "little")
    frame = json.loads(content[8 : 8 + size])
    FRAMES[what](frame)
    text = json.dumps(frame).encode()
    (tmp_path / "forged.sparse").write_bytes(_sealed(len(text).to_bytes(8, "little") + text + content[8 + size :]))
    assert answer(tmp_path / "forged.sparse") is not None


def test_a_stream_that_nobody_reads_to_its_end(sound, tmp_path):
    head, streams = sound["graph"]
    for name, numbers in streams.items():
        forge(tmp_path / "forged.sparse", json.dumps(head), {**streams, name: numbers.repeat(2)})
        assert answer(tmp_path / "forged.sparse") is not None, name


def test_no_file_at_all(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "empty").touch()
    for path in (*tmp_path.iterdir(), tmp_path, Path("/dev/zero"), Path("/dev/null")):
        begun = time.monotonic()
        with pytest.raises(UserError) as caught:
            sparse_lab.load(path)
        assert str(caught.value).isprintable() and str(path) in str(caught.value)
        assert time.monotonic() - begun < 5


def test_numbers_that_only_the_computing_looks_at(tmp_path):
    """A position beyond what it is looked up in: torch says so when it is there."""
    steps = (
        Step("mean.dim", {"self": Value(0), "dim": [2, 3]}),
        Step("index_select", {"self": Value(1), "dim": 1, "index": Named("i")}),
    )
    trace = Trace((3, 8, 8), steps, 2, (), ("i",), {})
    save_trace(trace, {"i": torch.tensor([0, 10**9])}, ABOUT, tmp_path / "beyond.sparse")
    assert "step 1, index_select, of this network cannot be computed" in str(answer(tmp_path / "beyond.sparse"))


def test_a_small_file_for_huge_images(sound, tmp_path, bounded):
    """A convolution whose bias maps would take gibibytes."""
    steps = (
        Step("conv2d", {"input": Value(0), "weight": Named("w"), "bias": Named("b"), "padding": [1, 1]}),
        Step("mean.dim", {"self": Value(1), "dim": [2, 3]}),
    )
    tensors = {"w": torch.zeros(1, 1, 3, 3), "b": torch.ones(1)}
    trace = Trace((1, 2**14, 2**14), steps, 2, ("w", "b"), (), {})
    save_trace(trace, tensors, ABOUT, tmp_path / "huge.sparse")
    assert "an image takes" in str(answer(tmp_path / "huge.sparse"))
    save_trace(replace(trace, images=(1, 64, 64)), tensors, ABOUT, tmp_path / "small.sparse")
    assert answer(tmp_path / "small.sparse") is None
