"""Programs for the inference kernels against torch in float64: single layers of odd shapes, and whole networks."""

from __future__ import annotations

from collections.abc import Iterator

import numba
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparse_lab.export.dead_channels import reduced
from sparse_lab.export.lowering import traced
from sparse_lab.export.runtime import SparseNetwork
from sparse_lab.models import build
from sparse_lab.sparse_cpu import program
from sparse_lab.sparse_cpu.inference_kernels import LANES
from sparse_lab.sparsity.masks import Masks

COUNTS = (1, 2, LANES, 2 * LANES + 3)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """For the reference alone: its small layers would spend their time on waiting for threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class _Layers(nn.Module):
    """Layers between a convolution that makes their channels and a linear layer that reads all of their pixels."""

    def __init__(self, channels: int, layers: list[nn.Module], size: int, residual: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 1)
        self.layers = nn.Sequential(*layers)
        self.residual = residual
        made = self.layers(torch.zeros(1, channels, size, size))
        self.last = nn.Linear(made[0].numel(), 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        made = self.layers(x)
        return self.last(torch.flatten(made + x if self.residual else made, 1))


def _conv(inputs: int, outputs: int, *window: object, **more: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, *window, **more)  # type: ignore[arg-type]


LAYERS = {
    "3x3": (lambda: [_conv(5, 7, 3, padding=1), nn.ReLU()], 9, False),
    "3x3 without padding": (lambda: [_conv(5, 7, 3), nn.ReLU6()], 9, False),
    "much padding": (lambda: [_conv(5, 3, (3, 1), padding=(4, 2))], 7, False),
    "1x1 stride 2": (lambda: [_conv(5, 7, 1, stride=2)], 9, False),
    "3x3 stride 2": (lambda: [_conv(5, 7, 3, stride=2, padding=1), nn.ReLU()], 10, False),
    "7x7 stride 2": (lambda: [_conv(5, 4, 7, stride=2, padding=3)], 13, False),
    "stride (3, 2), dilation 2": (lambda: [_conv(5, 4, 3, stride=(3, 2), padding=(1, 3), dilation=2)], 17, False),
    "depthwise": (lambda: [_conv(5, 5, 3, padding=1, groups=5), nn.ReLU6()], 9, False),
    "depthwise stride 2": (lambda: [_conv(5, 5, 3, stride=2, padding=1, groups=5)], 9, False),
    "residual": (lambda: [_conv(5, 5, 3, padding=1)], 9, True),
    "residual, no spare pixels": (lambda: [_conv(5, 5, 1), nn.ReLU()], 3, True),
    "2x2 pool, odd": (lambda: [_conv(5, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)], 11, False),
    "2x2 pool, negative": (lambda: [_conv(5, 6, 3, padding=1), nn.MaxPool2d(2), _conv(6, 2, 3, padding=1)], 8, False),
    "2x2 pool, long rows": (lambda: [_conv(5, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)], 22, False),
    "3x3 pool": (lambda: [_conv(5, 6, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1)], 11, False),
    "adaptive pool": (lambda: [nn.AdaptiveAvgPool2d((3, 7)), _conv(5, 3, 3, padding=1)], 5, False),
    "long rows": (lambda: [_conv(5, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(5, stride=5)], 75, False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_within_1e_6_of_float64(name: str) -> None:
    make, size, residual = LAYERS[name]
    torch.manual_seed(0)
    model = _Layers(5, make(), size, residual).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module is not model.first:
                module.weight.mul_(torch.rand_like(module.weight) < 0.5)
    network = SparseNetwork(reduced(traced(model, size)), {})
    images = torch.randn(max(COUNTS), 3, size, size)
    wanted = model.double()(images.double()).detach()
    for count in COUNTS:
        found = network(images[:count])
        assert found.dtype == torch.float32 and found.shape == (count, 4)
        assert (found - wanted[:count]).abs().max() <= 1e-6 * wanted.abs().max(), count


@pytest.mark.parametrize("size", [8, 11])
@pytest.mark.parametrize("pooled", [True, False])
def test_bias_maps_are_within_1e_6_of_float64(size: int, pooled: bool) -> None:
    """Two channels are constants, and what they add behind zero padding is none."""
    torch.manual_seed(0)
    layers = [_conv(5, 6, 3, padding=1), nn.ReLU(), *([nn.MaxPool2d(2)] if pooled else [])]
    model = _Layers(5, layers, size).eval()
    with torch.no_grad():
        model.first.weight[:2] = 0.0
        model.first.bias[:2] = torch.tensor([1.0, -2.0])
        model.layers[0].weight[:3, 3:] = 0.0
    graph = reduced(traced(model, size))
    assert any(len(getattr(node, "varying", ())) for node in graph.nodes)
    images = torch.randn(max(COUNTS), 3, size, size)
    wanted = model.double()(images.double()).detach()
    for count in COUNTS:
        found = SparseNetwork(graph, {})(images[:count])
        assert (found - wanted[:count]).abs().max() <= 1e-6 * wanted.abs().max(), count


@pytest.fixture(scope="module", params=["vgg16", "resnet34", "resnet50", "mobilenet_v2"])
def pair(request: pytest.FixtureRequest) -> tuple[SparseNetwork, Tensor, Tensor]:
    """A network at 95% sparsity, images, and float64's logits."""
    torch.manual_seed(0)
    model = build(request.param, width=0.25)
    masks = Masks(model)
    masks.set({name: torch.rand(weight.shape) < 0.05 for name, weight in masks.weights().items()})
    images = torch.randn(max(COUNTS), 3, 32, 32)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
                nn.init.normal_(module.bias, 0.0, 0.5)
        model.train()(images)
        wanted = model.eval().double()(images.double())
    return SparseNetwork(reduced(traced(model, 32)), {}), images, wanted


@pytest.mark.every(2)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", COUNTS)
def test_a_network_is_within_1e_5_of_float64(pair, count: int, threads: int) -> None:
    network, images, wanted = pair
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(min(threads, before))
        found = network(images[:count])
    finally:
        numba.set_num_threads(before)
    assert (found - wanted[:count]).abs().max() <= 1e-5 * wanted.abs().max()


def test_sharing_out_a_layer_changes_no_bit(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sum has one order, whoever takes it."""
    network, images, _ = pair
    alone = network(images[:1])
    monkeypatch.setattr(program, "ALONE", 0)
    assert torch.equal(network(images[:1]), alone)


def test_an_answer_depends_on_no_other_image_and_on_nothing_before(pair) -> None:
    network, images, _ = pair
    first = network(images)
    network(100.0 * images.flip(0))
    assert torch.equal(network(images), first)
    assert torch.equal(network(images[:LANES]), first[:LANES])
    assert network(images[:0]).shape == (0, 10)


def test_images_of_other_kinds_are_taken_or_refused(pair) -> None:
    network, images, _ = pair
    wanted = network(images[:3])
    strided = images[:3].to(memory_format=torch.channels_last)
    assert torch.equal(network(strided), wanted)
    assert torch.equal(network(images[:3].double().requires_grad_()), wanted)
    for wrong in (images[0], images[:, :2], images[..., :31]):
        with pytest.raises(ValueError, match="images must have shape"):
            network(wrong)


@pytest.mark.parametrize("count", [1, LANES])
def test_memory_begins_on_a_cache_line(pair, count: int) -> None:
    """Numpy's own lies 16 bytes beyond one: every other vector of pixels would lie on two lines."""
    network, images, _ = pair
    network(images[:count])
    for arenas, sums in network._execute._arenas.values():
        assert all(row.ctypes.data % 64 == 0 for row in (*arenas, *sums))


def test_memory_is_that_of_a_few_maps(pair) -> None:
    """Places are used again: a thread's memory for one image stays below a third of all maps together."""
    network, images, _ = pair
    network(images[:1])
    (arenas, _), *_ = [memory for (lanes, _), memory in network._execute._arenas.items() if lanes == 1]
    together = sum(len(of.channels) * of.height * of.width for of in network.graph.maps)
    assert arenas.shape[1] < together / 3
    assert not np.isnan(arenas).any()
