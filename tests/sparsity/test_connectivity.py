"""Paths through masks, against a search over every position (channel, y, x) of every map."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_lab.models import build, offsets
from sparse_lab.sparsity.connectivity import connectivity, on_paths
from sparse_lab.sparsity.masks import Masks, count, layers

Node = tuple[str, int, int, int]
Weight = tuple[Any, ...]  # the layer, then the place in it


class Graph:
    """Positions joined by edges; an edge may carry a weight (its layer and place)."""

    def __init__(self, masks: dict[str, Tensor]) -> None:
        self.masks = masks
        self.edges: list[tuple[Node, Node, Weight | None]] = []

    def conv(self, layer: str, source: str, target: str, side: int, stride: int = 1, padding: int = 0) -> int:
        """Edges of a conv (groups follow from the shapes); returns the side of its output."""
        mask = self.masks[layer]
        outputs, inputs, kernel, _ = mask.shape
        after = (side + 2 * padding - kernel) // stride + 1
        groups = 2 if layer == "grouped" else 1
        for o, i, ky, kx in torch.nonzero(mask).tolist():
            channel = i + inputs * (o // (outputs // groups))
            for y, x in product(range(after), repeat=2):
                row, column = y * stride + ky - padding, x * stride + kx - padding
                if 0 <= row < side and 0 <= column < side:
                    self.edges.append(((source, channel, row, column), (target, o, y, x), (layer, o, i, ky, kx)))
        return after

    def pool(self, source: str, target: str, channels: int, side: int, kernel: int, stride: int, padding: int) -> int:
        after = (side + 2 * padding - kernel) // stride + 1
        for c, y, x, dy, dx in product(range(channels), range(after), range(after), range(kernel), range(kernel)):
            row, column = y * stride + dy - padding, x * stride + dx - padding
            if 0 <= row < side and 0 <= column < side:
                self.edges.append(((source, c, row, column), (target, c, y, x), None))
        return after

    def same(self, source: str, target: str, channels: int, side: int) -> None:
        for c, y, x in product(range(channels), range(side), range(side)):
            self.edges.append(((source, c, y, x), (target, c, y, x), None))

    def linear(self, layer: str, source: str, side: int) -> None:
        """The classifier on a flattened map (C, H, W)."""
        for o, i in torch.nonzero(self.masks[layer]).tolist():
            place = (source, i // side**2, i // side % side, i % side)
            self.edges.append((place, ("logits", o, 0, 0), (layer, o, i)))

    def _reach(self, starts: set[Node], backwards: bool) -> set[Node]:
        ways = defaultdict(list)
        for source, target, _ in self.edges:
            ways[target if backwards else source].append(source if backwards else target)
        seen, todo = set(starts), list(starts)
        while todo:
            for node in ways[todo.pop()]:
                if node not in seen:
                    seen.add(node)
                    todo.append(node)
        return seen

    def effective(self, side: int, classes: int) -> tuple[set[Weight], int]:
        """Weights on a path from a pixel to a logit, and how many logits are reached."""
        pixels = {("image", c, y, x) for c, y, x in product(range(3), range(side), range(side))}
        logits = {("logits", o, 0, 0) for o in range(classes)}
        forward, backward = self._reach(pixels, False), self._reach(logits, True)
        on_path = {w for source, target, w in self.edges if w is not None and source in forward and target in backward}
        return on_path, len(forward & logits)


class Points(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 1)
        self.bn = nn.BatchNorm2d(5)
        self.relu = nn.ReLU()
        self.second = nn.Conv2d(5, 4, 1)
        self.fc = nn.Linear(4 * 9, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(self.relu(self.bn(self.first(x)))).flatten(1))

    @staticmethod
    def graph(graph: Graph) -> None:
        graph.conv("first", "image", "a", 3)
        graph.conv("second", "a", "b", 3)
        graph.linear("fc", "b", 3)


class Pooled(nn.Module):
    """3x3 with padding, max-pools with and without padding, strides, groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU6()
        self.pool = nn.MaxPool2d(2)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.pool2 = nn.MaxPool2d(3, stride=2, padding=1)
        self.last = nn.Conv2d(4, 3, 3, stride=2, padding=1)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn(self.first(x))))
        x = self.last(self.pool2(self.grouped(x)))
        return self.fc(self.drop(x.flatten(1)))

    @staticmethod
    def graph(graph: Graph) -> None:
        side = graph.conv("first", "image", "a", 6, padding=1)
        side = graph.pool("a", "b", 4, side, 2, 2, 0)
        side = graph.conv("grouped", "b", "c", side, padding=1)
        side = graph.pool("c", "d", 4, side, 3, 2, 1)
        side = graph.conv("last", "d", "e", side, stride=2, padding=1)
        assert side == 1
        graph.linear("fc", "e", side)


class Residual(nn.Module):
    """A branch beside an identity, then one beside a strided 1x1 shortcut, then a global mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.conv3 = nn.Conv2d(4, 5, 3, stride=2, padding=1)
        self.shortcut = nn.Sequential(nn.Conv2d(4, 5, 1, stride=2), nn.BatchNorm2d(5))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv2(self.relu(self.conv1(x)))
        x = self.relu(self.conv3(x) + self.shortcut(x))
        return self.fc(self.avgpool(x).flatten(1))

    @staticmethod
    def graph(graph: Graph) -> None:
        graph.conv("stem", "image", "a", 4, padding=1)
        graph.conv("conv1", "a", "b", 4, padding=1)
        graph.conv("conv2", "b", "c", 4, padding=1)
        graph.same("a", "c", 4, 4)
        graph.conv("conv3", "c", "d", 4, stride=2, padding=1)
        graph.conv("shortcut.0", "c", "d", 4, stride=2)
        graph.pool("d", "e", 5, 2, 2, 2, 0)
        graph.linear("fc", "e", 1)


CASES: list[tuple[Callable[[], nn.Module], int, int]] = [(Points, 3, 6), (Pooled, 6, 5), (Residual, 4, 4)]


def _masked(net: nn.Module, density: float, seed: int) -> Masks:
    """Random masks, and BatchNorms as training may leave them: paths follow masks, not values."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.running_mean, 3.0)
            nn.init.constant_(module.weight, -1.0)
    masks = Masks(net)
    masks.set({name: torch.rand(mask.shape, generator=generator) < density for name, mask in masks.masks().items()})
    return masks


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("density", [0.08, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_effective_weights_are_those_on_a_path(
    case: tuple[Callable[[], nn.Module], int, int], density: float, seed: int
) -> None:
    kind, side, classes = case
    torch.manual_seed(seed)
    net = kind()
    masks = _masked(net, density, seed)
    graph = Graph(masks.masks())
    net.graph(graph)
    on_path, live = graph.effective(side, classes)
    found = connectivity(net, side)
    by_layer = {name: sum(1 for weight in on_path if weight[0] == name) for name in masks.layers}
    convs = {name: mask for name, mask in masks.masks().items() if mask.dim() == 4}
    channels = sum(mask.shape[0] for mask in convs.values())
    living = {(weight[0], weight[1]) for weight in on_path if weight[0] in convs}
    assert found.kept == masks.kept()
    assert found.effective == len(on_path)
    assert found.dead_layers == [name for name, number in by_layer.items() if number == 0]
    assert (found.channels, found.dead_channels) == (channels, channels - len(living))
    assert (found.logits, found.live_logits, found.connected) == (classes, live, live > 0)


def test_random_cases_hold_what_they_should() -> None:
    """The search above sees every kind of case: cut, partly effective, and taps that see padding only."""
    results = []
    for (kind, side, _), density, seed in product(CASES, (0.08, 0.2, 0.5), range(4)):
        torch.manual_seed(seed)
        net = kind()
        _masked(net, density, seed)
        results.append(connectivity(net, side))
    assert any(not found.connected for found in results)
    assert any(found.connected and found.effective < found.kept for found in results)
    assert any(found.connected and found.live_logits < found.logits for found in results)


def _stack(*modules: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*modules)


def test_a_tap_that_only_sees_padding_is_on_no_path() -> None:
    net = _stack(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4, 2))
    found = connectivity(net, 1)
    assert found.kept == 3 * 4 * 9 + 8
    assert found.effective == 3 * 4 * 1 + 8
    assert found.dead_channels == 0
    mask = torch.ones(4, 3, 3, 3, dtype=torch.bool)
    mask[:, :, 1, 1] = False
    Masks(net).set({"0": mask})
    cut = connectivity(net, 1)
    assert (cut.effective, cut.connected, cut.dead_channels) == (0, False, 4)


def test_a_cut_network_says_so_whatever_its_biases() -> None:
    net = _stack(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4, 3))
    for module in net.modules():
        if getattr(module, "bias", None) is not None:
            nn.init.ones_(module.bias)
    Masks(net).set({"3": torch.zeros(4, 4, 1, 1, dtype=torch.bool)})
    found = connectivity(net, 1)
    assert found.kept == 12 + 12
    assert (found.effective, found.live_logits, found.connected) == (0, 0, False)
    assert found.dead_layers == ["0", "3", "5"]
    assert (found.channels, found.dead_channels) == (8, 8)
    assert found.as_dict()["connected"] is False


def test_two_halves_that_do_not_meet_are_cut() -> None:
    """Both layers hold weights, but the first ends in channel 0 and the second begins in channel 1."""
    net = _stack(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(2, 2))
    first, last = torch.zeros(2, 3, 1, 1, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.bool)
    first[0] = True
    last[:, 1] = True
    Masks(net).set({"0": first, "2": last})
    assert (connectivity(net, 1).kept, connectivity(net, 1).effective) == (5, 0)


def test_weights_are_judged_by_mask_and_not_by_value() -> None:
    """A weight that has just regrown at zero is on a path; a negative one is too."""
    net = _stack(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    Masks(net)
    with torch.no_grad():
        net[0].weight.fill_(-1.0)
        net[3].weight.zero_()
    assert connectivity(net, 1).effective == 12 + 8


def test_fifty_wide_layers_do_not_underflow() -> None:
    """One path through 50 convs with a fan-in of 4,489 each: 4489^-50 is 1e-183."""
    net = _stack(*(nn.Conv2d(3 if i == 0 else 1, 1, 67, padding=33, bias=False) for i in range(50)), nn.Flatten())
    net.append(nn.Linear(1, 1))
    middle = torch.zeros(67, 67, dtype=torch.bool)
    middle[33, 33] = True
    masks = Masks(net)
    masks.set({str(i): middle.expand_as(masks[str(i)]) for i in range(50)})
    found = connectivity(net, 1)
    assert found.connected
    assert found.effective == found.kept == 3 + 49 + 1


def test_the_network_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    net = Pooled()
    _masked(net, 0.4, 1)
    net.train()
    net.bn.eval()
    net.first.weight.requires_grad_(False)
    net.last.weight.grad = torch.ones_like(net.last.weight)
    tensors = net.state_dict(keep_vars=True)
    copies = {name: value.detach().clone() for name, value in tensors.items()}
    modules = dict(net.named_modules())
    modes = {name: module.training for name, module in modules.items()}
    with torch.no_grad():
        connectivity(net, 6)
    after = net.state_dict(keep_vars=True)
    assert list(after) == list(tensors)
    assert all(after[name] is tensors[name] and torch.equal(after[name], copies[name]) for name in after)
    assert dict(net.named_modules()) == modules
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert not net.first.weight.requires_grad
    assert torch.equal(net.last.weight.grad, torch.ones_like(net.last.weight))
    assert net.fc.weight.grad is None


def test_a_dense_vgg16_is_effective_to_the_last_weight() -> None:
    """At 32x32 its last 3x3 convs run on 2x2 maps: each tap, seen from some place, falls on a real one."""
    torch.manual_seed(0)
    net = build("vgg16", width=0.25)
    found = connectivity(net, 32)
    assert found.effective == found.kept == count(net)
    assert (found.dead_channels, found.dead_layers, found.live_logits) == (0, [], 10)
    assert found.channels == sum(round(0.25 * c) * n for c, n in ((64, 2), (128, 2), (256, 3), (512, 6)))


def test_a_dense_resnet_on_eight_pixels_has_taps_in_the_padding_only() -> None:
    """Its last stage runs on 1x1 maps: of stride-1 3x3 convs only the middle tap counts there; of the strided one, that
    comes from 2x2, four taps do.
    """
    torch.manual_seed(0)
    net = build("resnet34", width=0.125)
    idle = 0
    for name, module in layers(net).items():
        if name.startswith("layer4") and tuple(module.weight.shape[2:]) == (3, 3):
            idle += module.weight[:, :, 0, 0].numel() * (5 if name == "layer4.0.conv1" else 8)
    found = connectivity(net, 8)
    assert found.effective == count(net) - idle
    assert found.dead_channels == 0


def _through_offsets(net: nn.Module, masks: Masks, links: dict[str, Tensor], side: int, classes: int) -> dict[str, Any]:
    """What a search finds that may also cross a layer through its offset: the same edges, but for what they carry."""
    ways = {name: mask | links[name] if name in links else mask for name, mask in masks.masks().items()}
    graph = Graph(ways)
    net.graph(graph)  # type: ignore[operator]
    on_path, live = graph.effective(side, classes)
    convs = [name for name, mask in ways.items() if mask.dim() == 4]
    alive = {(weight[0], weight[1]) for weight in on_path if weight[0] in convs}
    by_layer = {name: sum(bool(mask[w[1:]]) for w in on_path if w[0] == name) for name, mask in masks.masks().items()}
    return {
        "effective_by_layer": by_layer,
        "effective": sum(by_layer.values()),
        "dead_layers": [name for name in ways if name not in {weight[0] for weight in on_path}],
        "dead_channels": sum(len(ways[name]) for name in convs) - len(alive),
        "live_logits": live,
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("density", [0.04, 0.2, 0.5])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_paths_through_recovered_means(
    case: tuple[Callable[[], nn.Module], int, int], density: float, seed: int
) -> None:
    """Only some layers have means, and in those some filters' are zero: nothing leads through them."""
    kind, side, classes = case
    torch.manual_seed(seed)
    net = kind()
    masks = _masked(net, density, seed)
    means = {
        name: torch.randn(len(layer.weight)) * (torch.rand(len(layer.weight)) < 0.5)
        for index, (name, layer) in enumerate(masks.layers.items())
        if index % 3 != seed
    }
    before = connectivity(net, side)
    offsets.recover(net, means)
    links = {name: ~masks[name] & (mean != 0).view(-1, *(1,) * (masks[name].dim() - 1)) for name, mean in means.items()}
    found = connectivity(net, side)
    wanted = _through_offsets(net, masks, links, side, classes)
    assert {name: getattr(found, name) for name in wanted} == wanted
    assert found.effective >= before.effective


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_paths_through_a_dct(case: tuple[Callable[[], nn.Module], int, int], seed: int) -> None:
    """It links all that a cosine of zero does not cut off, whatever its sign, and nothing where alpha is zero."""
    kind, side, classes = case
    torch.manual_seed(seed)
    net = kind()
    masks = _masked(net, 0.04, seed)
    offsets.install_dct(net)
    off = list(masks.layers)[seed]
    net.get_submodule(off).get_parameter("alpha").data.zero_()
    bases = {name: layer.get_buffer("basis") for name, layer in masks.layers.items()}
    assert any((basis.abs() < 1e-6).any() for basis in bases.values())
    links = {name: (basis.abs() > 1e-6) & (name != off) for name, basis in bases.items()}
    found = connectivity(net, side)
    wanted = _through_offsets(net, masks, links, side, classes)
    assert {name: getattr(found, name) for name in wanted} == wanted


def test_a_cut_vgg16_is_whole_with_a_dct() -> None:
    """One layer writes to channel 0 alone, and the next reads from channel 1 alone."""
    torch.manual_seed(0)
    net = build("vgg16", width=0.125)
    masks = _masked(net, 0.05, 0)
    first, second = (torch.zeros_like(masks[f"features.{index}"]) for index in (7, 10))
    first[0], second[:, 1] = True, True
    masks.set({"features.7": first, "features.10": second})
    plain = connectivity(net, 32)
    assert (plain.connected, plain.effective) == (False, 0)
    assert plain.dead_channels == plain.channels
    offsets.install_dct(net)
    found = connectivity(net, 32)
    assert (found.connected, found.live_logits) == (True, 10)
    assert list(found.effective_by_layer) == list(masks.layers)
    assert found.effective == found.kept == plain.kept
    assert (found.dead_channels, found.dead_layers) == (0, [])


def test_recovered_means_fill_what_the_masks_that_are_asked_about_leave() -> None:
    net = _stack(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(2, 2))
    Masks(net)
    offsets.recover(net, {"0": torch.tensor([1.0, 0.0])})
    given = {"0": torch.zeros(2, 3, 1, 1, dtype=torch.bool), "2": torch.ones(2, 2, dtype=torch.bool)}
    given["0"][:, 0] = True
    crossed, logits = on_paths(net, 1, given)
    assert torch.equal(crossed["0"], given["0"])
    given["0"].zero_()
    crossed, logits = on_paths(net, 1, given)
    assert crossed["2"].tolist() == [[True, False], [True, False]]  # filter 1 has no weight and no mean
    assert logits.all()


def test_fifty_layers_with_offsets_do_not_overflow() -> None:
    """Weight and offset together pass on twice what comes in."""
    middle = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(50))
    net = _stack(nn.Conv2d(3, 4, 1), *middle, nn.Flatten(), nn.Linear(4 * 64, 2))
    offsets.install_dct(net)
    found = connectivity(net, 8)
    assert found.live_logits == 2
    assert found.effective == found.kept == 12 + 50 * 144 + 512


def test_a_network_with_offsets_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    net = Pooled()
    masks = _masked(net, 0.4, 1)
    offsets.recover(net, {"first": torch.ones(4), "fc": torch.ones(5)})
    tensors = [(id(tensor), tensor.sum().item()) for tensor in (*net.parameters(), *net.buffers())]
    kinds = [(type(module), len(module._forward_hooks)) for module in net.modules()]
    image = torch.randn(1, 3, 6, 6)
    answer = net.eval()(image)
    connectivity(net, 6)
    on_paths(net, 6, {name: ~mask for name, mask in masks.masks().items()})
    assert [(id(tensor), tensor.sum().item()) for tensor in (*net.parameters(), *net.buffers())] == tensors
    assert [(type(module), len(module._forward_hooks)) for module in net.modules()] == kinds
    assert torch.equal(net(image), answer)
