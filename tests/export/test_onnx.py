"""ONNX files in onnxruntime against the networks that they came from."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from sparse_lab.errors import UserError
from sparse_lab.export import onnx as onnx_file
from sparse_lab.export.dead_channels import reduced
from sparse_lab.export.lowering import traced

pytest.importorskip("onnxruntime")


@pytest.mark.every(2)
@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize(
    "name, width, size, density",
    [
        ("vgg16", 0.125, 33, 0.1),
        ("vgg16", 0.03, 70, 0.3),
        ("resnet34", 0.125, 19, 0.02),
        ("resnet50", 0.0625, 65, 0.1),
        ("mobilenet_v2", 0.2, 15, 0.1),
        ("vgg16", 0.125, 32, 0.0001),
    ],
)
def test_onnxruntime_gives_the_networks_logits(make, tmp_path, name, width, size, density, multiple) -> None:
    model, images = make(name, width, size, density)
    onnx_file.save(reduced(traced(model, size)), {"name": "x"}, tmp_path / "net.onnx", multiple)
    run = onnx_file.runner(tmp_path / "net.onnx")
    with torch.no_grad():
        wanted = model(images)
    for count in (1, 5):
        found = run(images[:count].float())
        assert found.shape == (count, 10)
        assert (found - wanted[:count]).abs().max() <= 1e-5 * wanted.abs().max()


def test_channels_are_those_that_live_and_padding_makes_multiples(make) -> None:
    model, _ = make("vgg16", 0.25, 32, 0.02)
    graph = reduced(traced(model, 32))
    thin = onnx_file.slots(graph, 1)
    assert [size for _, size in thin] == [len(of.channels) for of in graph.maps]
    padded = onnx_file.slots(graph, 16)
    assert all(
        size % 16 == 0 and 0 <= size - small < 16
        for (_, size), (_, small) in zip(padded[1:-1], thin[1:-1], strict=True)
    )
    assert (padded[0][1], padded[-1][1]) == (3, 10)


def test_what_is_added_has_the_same_slots(make) -> None:
    model, _ = make("resnet34", 0.125, 17, 0.02)
    graph = reduced(traced(model, 17))
    places = onnx_file.slots(graph, 1)
    for number, node in enumerate(graph.nodes, start=1):
        if getattr(node, "residual", None) is not None:
            assert places[number][1] == places[node.residual][1]
            _, mine, other = np.intersect1d(
                graph.maps[number].channels, graph.maps[node.residual].channels, return_indices=True
            )
            assert np.array_equal(places[number][0][mine], places[node.residual][0][other])


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(make, tmp_path, monkeypatch, package) -> None:
    model, _ = make("vgg16", 0.03, 32, 0.1)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package} is needed .*pip install 'sparse_lab\[onnx\]'"):
        onnx_file.save(reduced(traced(model, 32)), {}, tmp_path / "net.onnx")
        onnx_file.runner(tmp_path / "net.onnx")


def test_the_faster_of_two_files_stays_alone(make, tmp_path) -> None:
    model, images = make("vgg16", 0.125, 32, 0.1)
    run = onnx_file.save_fastest(reduced(traced(model, 32)), {}, tmp_path / "net.onnx", images.float())
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    with torch.no_grad():
        assert (run(images.float()) - model(images)).abs().max() <= 1e-5 * model(images).abs().max()
