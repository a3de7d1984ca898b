"""The packed file: what comes back, how small it is, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch
from torch import nn

import sparse_lab
from sparse_lab.errors import UserError
from sparse_lab.export.dead_channels import reduced
from sparse_lab.export.dense_graph import evaluate
from sparse_lab.export.graph import Conv, Graph
from sparse_lab.export.lowering import traced
from sparse_lab.export.packed import UNKNOWN, read, save
from sparse_lab.export.runtime import SparseNetwork
from sparse_lab.models import build
from sparse_lab.sparsity.distributions import erk, share_out
from sparse_lab.sparsity.masks import Masks

ABOUT = {"name": "a run", "num_classes": 10, "image_size": 21, "normalise": {"mean": [0.5] * 3, "std": [0.25] * 3}}


@pytest.fixture(scope="module")
def graph(make) -> Graph:
    """With everything in it: bias maps, residuals, depthwise layers, ReLU6."""
    model, _ = make("mobilenet_v2", 0.25, 21, 0.1)
    return reduced(traced(model, 21))


@pytest.fixture
def file(graph, tmp_path):
    save(graph, ABOUT, tmp_path / "net.sparse")
    return tmp_path / "net.sparse"


def test_a_network_comes_back_bit_for_bit(graph, file) -> None:
    network = sparse_lab.load(file)
    images = torch.randn(3, 3, 21, 21)
    assert torch.equal(network(images), SparseNetwork(graph, {})(images))
    assert network.about == ABOUT
    assert any(len(node.varying) for node in graph.nodes if isinstance(node, Conv))


def test_all_that_a_graph_holds_comes_back(graph, file) -> None:
    found, _ = read(file)
    assert len(found.nodes) == len(graph.nodes)
    for one, other in zip([*found.maps, *found.nodes], [*graph.maps, *graph.nodes], strict=True):
        for field in dataclasses.fields(one):
            mine, wanted = getattr(one, field.name), getattr(other, field.name)
            if isinstance(wanted, np.ndarray) and wanted.dtype == np.float64:
                wanted = wanted.astype(np.float32)
            assert np.array_equal(mine, wanted), field.name


def test_float16_halves_the_values_and_rounds_them_to_eleven_bits(graph, file, tmp_path) -> None:
    graph = Graph(graph.maps, tuple(_scaled(node) for node in graph.nodes))
    save(graph, ABOUT, tmp_path / "half.sparse", values="fp16")
    assert (tmp_path / "half.sparse").stat().st_size <= file.stat().st_size - 2 * graph.weights() + 2000
    found, _ = read(tmp_path / "half.sparse")
    for one, other in zip(found.nodes, graph.nodes, strict=True):
        if isinstance(one, Conv) and len(one.values):
            assert np.abs(one.values - other.values).max() <= 2.0**-11 * np.abs(other.values).max()


def _scaled(node):
    """Values that float16 could not hold by itself."""
    return dataclasses.replace(node, values=node.values * 1e7) if isinstance(node, Conv) else node


def _resnet34(kept: dict[str, int] | None, channels: int | None) -> nn.Module:
    torch.manual_seed(0)
    model = build("resnet34")
    masks = Masks(model)
    new = {}
    for name, weight in masks.weights().items():
        score = torch.rand(weight.shape)
        if channels is not None and weight.dim() == 4:
            score[channels:] = -1.0
            score[:, channels:] = -1.0
        new[name] = score
    if kept is None:
        threshold = torch.cat([score.flatten() for score in new.values()]).topk(2_129).values[-1]
        masks.set({name: score >= threshold for name, score in new.items()})
    else:
        masks.set({name: score >= score.flatten().topk(kept[name]).values[-1] for name, score in new.items()})
    return model.eval()


def test_resnet34_at_99_9_percent_takes_260_kibibytes_at_most(tmp_path) -> None:
    shapes = {name: tuple(weight.shape) for name, weight in Masks(build("resnet34")).weights().items()}
    claims, sizes = erk(shapes), {name: int(np.prod(shape)) for name, shape in shapes.items()}
    counts = share_out(round(sum(sizes.values()) / 1000), list(claims.values()), [1] * len(sizes), list(sizes.values()))
    model = _resnet34(dict(zip(sizes, counts, strict=True)), None)
    save(reduced(traced(model, 32)), ABOUT, tmp_path / "net.sparse")
    assert (tmp_path / "net.sparse").stat().st_size <= 260 * 1024


def test_resnet34_at_99_99_percent_takes_40_kibibytes_at_most(tmp_path) -> None:
    """A mask that connects, as SynFlow's do: a few channels of each layer hold all weights."""
    graph = reduced(traced(_resnet34(None, 7), 32))
    assert 1_500 < graph.weights() <= 2_129
    save(graph, ABOUT, tmp_path / "net.sparse")
    assert (tmp_path / "net.sparse").stat().st_size <= 40 * 1024


def test_any_flipped_byte_is_refused_in_one_line(file, tmp_path) -> None:
    content = file.read_bytes()
    damaged = tmp_path / "damaged.sparse"
    head = 8 + int.from_bytes(content[:8], "little")
    for place in [*range(0, head, 31), *range(head, len(content), 499), len(content) - 1]:
        damaged.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError) as error:
            read(damaged)
        assert "\n" not in str(error.value) and str(damaged) in str(error.value), place


def test_a_file_cut_short_or_grown_is_refused(file, tmp_path) -> None:
    content = file.read_bytes()
    other = tmp_path / "other.sparse"
    for length in [0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1]:
        other.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"truncated|not a packed network"):
            read(other)
    other.write_bytes(content + b"\0")
    with pytest.raises(UserError, match="damaged"):
        read(other)
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / "nowhere.sparse")
    other.write_bytes(b"PK\x03\x04" + bytes(500))
    with pytest.raises(UserError, match="not a packed network"):
        read(other)


def _rewritten(file, change) -> None:
    """The file with another head, and the checksum that belongs to it: made by somebody who knows the format."""
    from safetensors.numpy import load
    from safetensors.numpy import save as serialise

    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    head = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["sparse_lab"])
    head["checksum"] = UNKNOWN
    change(head)
    new = serialise(load(content), {"sparse_lab": json.dumps(head)})
    file.write_bytes(new.replace(UNKNOWN.encode(), hashlib.sha256(new).hexdigest().encode(), 1))


def test_a_newer_version_is_refused_and_says_what_to_do(file) -> None:
    _rewritten(file, lambda head: head.update(format=3))
    with pytest.raises(UserError, match=r"format 3 .* reads up to 2: pip install --upgrade"):
        read(file)


@pytest.mark.parametrize(
    "key, value",
    [("source", 40), ("residual", 39), ("weights", 10**6), ("kernel", [9, 9]), ("bits", 2), ("activation", "gelu")],
)
def test_a_file_that_contradicts_itself_never_reaches_the_kernels(file, key, value) -> None:
    def change(head) -> None:
        head["nodes"][4][key] = value

    _rewritten(file, change)
    with pytest.raises(UserError, match="is not what it says it is"):
        read(file)


def test_a_constant_network_is_a_small_file(make, tmp_path) -> None:
    model, images = make("vgg16", 0.125, 32, 0.0001)
    graph = reduced(traced(model, 32))
    save(graph, ABOUT, tmp_path / "net.sparse")
    assert (tmp_path / "net.sparse").stat().st_size < 2048
    logits = sparse_lab.load(tmp_path / "net.sparse")(images.float())
    assert torch.allclose(logits, evaluate(graph, images).float(), rtol=1e-6)
