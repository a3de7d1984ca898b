"""Graphs against the networks they came from, in float64: exact whatever is dead, at any image size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparse_lab.errors import UserError
from sparse_lab.export.dead_channels import reduced
from sparse_lab.export.dense_graph import evaluate
from sparse_lab.export.graph import Conv, Graph, check
from sparse_lab.export.lowering import traced
from sparse_lab.sparsity.connectivity import on_paths
from sparse_lab.sparsity.masks import layers

# name, width, image size
NETWORKS = [
    ("vgg16", 0.125, 33),
    ("vgg16", 0.03, 71),
    ("resnet34", 0.125, 19),
    ("resnet34", 0.0625, 65),
    ("resnet50", 0.0625, 13),
    ("mobilenet_v2", 0.2, 15),
    ("mobilenet_v2", 0.1, 69),
]


def _assert_same(graph: Graph, model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = model(images)
        found = evaluate(graph, images)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-9 * wanted.abs().max()
    # what differs from image to image, too, which may be far smaller than the logits
    spread = wanted - wanted.mean(0)
    assert (found - found.mean(0) - spread).abs().max() <= 1e-9 * wanted.abs().max()
    return spread.abs().max() / wanted.abs().max()


@pytest.mark.every(3)
@pytest.mark.parametrize("density", [0.1, 0.02, 0.001, 0.0001])
@pytest.mark.parametrize("name, width, size", NETWORKS)
def test_a_reduced_graph_has_the_networks_logits(make, name, width, size, density) -> None:
    model, images = make(name, width, size, density, images=3)
    graph = traced(model, size)
    _assert_same(graph, model, images)
    smaller = reduced(graph)
    check(smaller)
    _assert_same(smaller, model, images)
    assert smaller.weights() <= graph.weights()


@pytest.mark.parametrize("name, width, size", [network for network in NETWORKS if network[0] != "vgg16"])
def test_the_image_makes_a_difference_where_it_should(make, name, width, size) -> None:
    model, images = make(name, width, size, 0.3, images=4)
    assert _assert_same(reduced(traced(model, size)), model, images) > 0.001


@pytest.mark.every(2)
@pytest.mark.parametrize("name, width, size", NETWORKS)
def test_the_weights_that_stay_are_those_on_a_path(make, name, width, size) -> None:
    """Counted by the sweeps of the connectivity report, which know nothing of graphs and follow single pixels: few
    weights read a live channel where no path crosses it, and those stay too.
    """
    model, _ = make(name, width, size, 0.04)
    paths, _ = on_paths(model, size, {layer: module.mask for layer, module in layers(model).items()})
    kept = sum(int(weights.sum()) for weights in paths.values())
    assert kept <= reduced(traced(model, size)).weights() <= 1.01 * kept


def test_a_network_that_is_cut_is_a_constant(make) -> None:
    model, images = make("vgg16", 0.125, 32, 0.5)
    with torch.no_grad():
        model.features[24].weight.zero_()
    graph = reduced(traced(model, 32))
    assert len(graph.nodes) == 1 and graph.weights() == 0
    assert _assert_same(graph, model, images) == 0.0


def test_a_constant_through_a_padded_convolution_becomes_a_map(make) -> None:
    model, images = make("resnet34", 0.125, 17, 1.0)
    with torch.no_grad():
        model.conv1.weight[0] = 0.0
        model.bn1.bias[0] = 2.0
    graph = reduced(traced(model, 17))
    assert 0 not in graph.maps[1].channels and len(graph.maps[1].channels) == 7
    first = graph.nodes[1]
    assert isinstance(first, Conv) and len(first.varying) == 8
    assert np.ptp(first.maps[:, 1:-1, 1:-1], axis=(1, 2)).max() < 1e-12 < np.ptp(first.maps, axis=(1, 2)).min()
    _assert_same(graph, model, images)


def test_what_no_logit_reads_goes(make) -> None:
    model, images = make("resnet34", 0.125, 17, 1.0)
    with torch.no_grad():
        model.layer4[2].bn2.weight[5:] = 0.0
        model.layer4[1].conv2.weight[:] = 0.0
    graph = reduced(traced(model, 17))
    last_inner = graph.maps[-4]
    assert len(last_inner.channels) == 64
    made = [node for node in graph.nodes if isinstance(node, Conv) and node.kernel == (3, 3)]
    assert len(made) == 1 + 32 - 1  # layer4.1.conv1 is read by nobody; conv2, without weights, still adds its bias
    _assert_same(graph, model, images)


class _Odd(nn.Module):
    """Everything that a graph knows and our networks do not have: groups, dilation, odd strides, adaptive pools."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
        self.grouped = nn.Conv2d(6, 4, 3, groups=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU6()
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.average = nn.AdaptiveAvgPool2d((3, 2))
        self.hidden = nn.Linear(24, 7)
        self.last = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        x = self.norm(self.grouped(x))
        x = self.pool(self.relu(x) + x)
        return self.last(self.relu(self.hidden(torch.flatten(self.average(x), 1))))


def test_layers_that_our_networks_do_not_have() -> None:
    torch.manual_seed(0)
    model = _Odd().double().eval()
    with torch.no_grad():
        model.norm.running_var.uniform_(0.5, 2.0)
        model.norm.running_mean.normal_()
        model.first.weight[:2] = 0.0
        model.grouped.weight[1] = 0.0
    images = torch.randn(3, 3, 19, 19, dtype=torch.float64)
    graph = reduced(traced(model, 19))
    check(graph)
    assert _assert_same(graph, model, images) > 0.01


@pytest.mark.parametrize(
    "layer, said",
    [
        (nn.Sigmoid(), "sigmoid"),
        (nn.AvgPool2d(2, ceil_mode=True), "avg_pool2d with ceil_mode"),
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), "pad"),
    ],
)
def test_what_has_no_place_in_a_graph_is_named(layer, said) -> None:
    model = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    with pytest.raises(UserError, match=said) as error:
        traced(model, 8)
    assert "\n" not in str(error.value)
