"""Connected starts, followed position by position with boolean maps in numpy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparse_lab.errors import SparseLabError
from sparse_lab.models import build, dyrelu
from sparse_lab.models.weight_sharing import share
from sparse_lab.sparsity import paths
from sparse_lab.sparsity.connectivity import connectivity, on_paths
from sparse_lab.sparsity.distributions import distribute
from sparse_lab.sparsity.mask_updates import prune_to
from sparse_lab.sparsity.masks import Masks, layers, num_kept
from sparse_lab.sparsity.paths import connected_init

Map = np.ndarray[Any, np.dtype[np.bool_]]  # (channels, rows, columns): can a path be here?
ROUNDS = 60  # more sweeps over a network than any start should need


class Trace:
    """A network followed forwards on boolean maps; `finish` follows it back and says which weights were crossed."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = {name: mask.numpy() for name, mask in masks.items()}
        self.crossed = {name: np.zeros_like(mask) for name, mask in self.masks.items()}
        self.maps: list[Map] = []  # what a path from a pixel reaches
        self.backs: list[Callable[[list[Map]], None]] = []

    def _new(self, value: Map, back: Callable[[list[Map]], None]) -> int:
        self.maps.append(value)
        self.backs.append(back)
        return len(self.maps) - 1

    def image(self, side: int) -> int:
        return self._new(np.ones((3, side, side), bool), lambda _: None)

    def conv(self, x: int, name: str, stride: int, padding: int, depthwise: bool = False) -> int:
        mask, source, here = self.masks[name], self.maps[x], len(self.maps)
        kernel = mask.shape[2]
        side = (source.shape[1] + 2 * padding - kernel) // stride + 1
        weights = np.argwhere(mask).tolist()

        def window(maps: Map, ky: int, kx: int) -> Map:
            return maps[ky : ky + stride * (side - 1) + 1 : stride, kx : kx + stride * (side - 1) + 1 : stride]

        def padded(value: Map) -> Map:
            return np.pad(value, ((0, 0), (padding, padding), (padding, padding)))

        around = padded(source)
        result = np.zeros((mask.shape[0], side, side), bool)
        for o, i, ky, kx in weights:
            result[o] |= window(around[o if depthwise else i], ky, kx)

        def back(wanted: list[Map]) -> None:
            into = padded(np.zeros_like(source))
            for o, i, ky, kx in weights:
                c = o if depthwise else i
                window(into[c], ky, kx)[...] |= wanted[here][o]
                self.crossed[name][o, i, ky, kx] |= (window(around[c], ky, kx) & wanted[here][o]).any()
            wanted[x] |= into[:, padding : padding + source.shape[1], padding : padding + source.shape[2]]

        return self._new(result, back)

    def windows(self, x: int, spans: list[tuple[int, int]]) -> int:
        """Pooling of any kind over square windows: row and column spans (from, to) of every output position."""
        source, here = self.maps[x], len(self.maps)
        result = np.zeros((source.shape[0], len(spans), len(spans)), bool)
        for y, rows in enumerate(spans):
            for z, columns in enumerate(spans):
                result[:, y, z] = source[:, slice(*rows), slice(*columns)].any((1, 2))

        def back(wanted: list[Map]) -> None:
            for y, rows in enumerate(spans):
                for z, columns in enumerate(spans):
                    wanted[x][:, slice(*rows), slice(*columns)] |= wanted[here][:, y : y + 1, z : z + 1]

        return self._new(result, back)

    def pool(self, x: int, kernel: int, stride: int, padding: int = 0) -> int:
        side = self.maps[x].shape[1]
        after = (side + 2 * padding - kernel) // stride + 1
        begins = [stride * k - padding for k in range(after)]
        return self.windows(x, [(max(0, begin), min(side, begin + kernel)) for begin in begins])

    def adaptive(self, x: int, size: int) -> int:
        side = self.maps[x].shape[1]
        return self.windows(x, [(k * side // size, -(-(k + 1) * side // size)) for k in range(size)])

    def add(self, x: int, y: int) -> int:
        here = len(self.maps)

        def back(wanted: list[Map]) -> None:
            wanted[x] |= wanted[here]
            wanted[y] |= wanted[here]

        return self._new(self.maps[x] | self.maps[y], back)

    def linear(self, x: int, name: str) -> int:
        mask, source, here = self.masks[name], self.maps[x], len(self.maps)
        result = (mask & source.reshape(1, -1)).any(1).reshape(-1, 1, 1)

        def back(wanted: list[Map]) -> None:
            used = mask & wanted[here].reshape(-1, 1)
            self.crossed[name] |= used & source.reshape(1, -1)
            wanted[x] |= used.any(0).reshape(source.shape)

        return self._new(result, back)

    def finish(self) -> tuple[dict[str, Tensor], Tensor]:
        wanted = [np.zeros_like(value) for value in self.maps]
        wanted[-1][:] = True
        for back in reversed(self.backs):
            back(wanted)
        crossed = {name: torch.from_numpy(mask) for name, mask in self.crossed.items()}
        return crossed, torch.from_numpy(self.maps[-1].reshape(-1))


def _follow_resnet(trace: Trace, convs: int, image_size: int, sharing: bool) -> None:
    imagenet = image_size >= 64
    x = trace.image(image_size)
    x = trace.conv(x, "conv1", *((2, 3) if imagenet else (1, 1)))
    x = trace.pool(x, 3, 2, 1) if imagenet else x
    for stage, (blocks, first_stride) in enumerate(((3, 1), (4, 2), (6, 2), (3, 2)), start=1):
        for block in range(blocks):
            owner = f"layer{stage}.{1 if sharing and block > 1 else block}"
            shortcut = f"layer{stage}.{block}.downsample.0"
            stride = first_stride if block == 0 else 1
            y = x
            for number in range(1, convs + 1):
                name = f"{owner}.conv{number}"
                padding = trace.masks[name].shape[2] // 2
                # a basic block shrinks the map in its first convolution, a bottleneck in its 3x3
                y = trace.conv(y, name, stride if number == (1 if convs == 2 else 2) else 1, padding)
            x = trace.add(y, trace.conv(x, shortcut, stride, 0) if shortcut in trace.masks else x)
    trace.linear(trace.adaptive(x, 1), "fc")


def _follow_vgg(trace: Trace, image_size: int) -> None:
    x, index = trace.image(image_size), 0
    for convs in (2, 2, 3, 3, 3):
        for _ in range(convs):
            x = trace.conv(x, f"features.{index}", 1, 1)
            index += 3
        x, index = trace.pool(x, 2, 2), index + 1
    x = trace.adaptive(x, 7) if image_size >= 64 else x
    for name in [name for name in trace.masks if name.startswith("classifier")]:
        x = trace.linear(x, name)


def _follow_mobilenet(trace: Trace) -> None:
    stages = ((1, 1), (2, 1), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1))  # blocks and stride, for small images
    x, index = trace.conv(trace.image(32), "features.0.0", 1, 1), 1
    for stage, (blocks, first_stride) in enumerate(stages):
        for block in range(blocks):
            stride, prefix = first_stride if block == 0 else 1, f"features.{index}.conv"
            y = x if stage == 0 else trace.conv(x, f"{prefix}.0.0", 1, 0)
            middle = 0 if stage == 0 else 1
            y = trace.conv(y, f"{prefix}.{middle}.0", stride, 1, depthwise=True)
            y = trace.conv(y, f"{prefix}.{middle + 1}", 1, 0)
            same = stride == 1 and trace.maps[x].shape == trace.maps[y].shape
            x, index = trace.add(x, y) if same else y, index + 1
    x = trace.conv(x, f"features.{index}.0", 1, 0)
    trace.linear(trace.adaptive(x, 1), "classifier.1")


def _follow(name: str, masks: Mapping[str, Tensor], image_size: int, sharing: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Which weights lie on a path from a pixel to a logit, and which logits are reached."""
    trace = Trace(masks)
    if name.startswith("resnet"):
        _follow_resnet(trace, 2 if name == "resnet34" else 3, image_size, sharing)
    elif name == "vgg16":
        _follow_vgg(trace, image_size)
    else:
        _follow_mobilenet(trace)
    return trace.finish()


def _build(name: str, width: float, image_size: int, sharing: bool) -> nn.Module:
    torch.manual_seed(0)
    model = build(name, width=width, image_size=image_size)
    if sharing:
        share(model)
    return model


def _counts(model: nn.Module, kept: int) -> dict[str, int]:
    weights = {name: module.weight for name, module in layers(model).items()}
    alive = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    return distribute("erk", kept, weights, weights, alive)


def _start(model: nn.Module, counts: Mapping[str, int], seed: int, image_size: int) -> dict[str, Tensor]:
    return connected_init(model, image_size, torch.Generator().manual_seed(seed), counts)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that does not come to an end fails, instead of keeping the machine busy."""
    sweeps = [0]

    def limited(*args: Any) -> Any:
        sweeps[0] += 1
        assert sweeps[0] <= ROUNDS, f"no end after {ROUNDS} sweeps over the network"
        return on_paths(*args)

    monkeypatch.setattr(paths, "on_paths", limited)


# network, width, image size, shared
CASES = [
    ("resnet34", 0.0625, 32, False),
    ("resnet34", 0.0625, 32, True),
    ("resnet34", 0.0625, 8, False),
    ("resnet34", 0.0625, 8, True),
    ("resnet34", 0.0625, 64, False),
    ("resnet50", 0.0625, 32, False),
    ("resnet50", 0.0625, 32, True),
    ("resnet50", 0.0625, 64, True),
    ("vgg16", 0.0625, 32, False),
    ("vgg16", 0.03, 64, False),
    ("mobilenet_v2", 0.1, 32, False),
]


@pytest.mark.every(2)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in (1, 2))])
@pytest.mark.parametrize("density", [0.0, 0.003, 0.05, 1.0])
@pytest.mark.parametrize(("name", "width", "image_size", "sharing"), CASES)
def test_every_reserved_weight_is_on_a_path(
    impatient: None, name: str, width: float, image_size: int, sharing: bool, density: float, seed: int
) -> None:
    """From one weight a layer to all of them: within the budgets, at least one each, and none for nothing."""
    model = _build(name, width, image_size, sharing)
    found = layers(model)
    sizes = {layer: module.weight.numel() for layer, module in found.items()}
    total = sum(sizes.values())
    counts = sizes if density == 1.0 else _counts(model, max(len(found), round(density * total)))
    kept = _start(model, counts, seed, image_size)
    assert list(kept) == list(found)
    for layer, mask in kept.items():
        assert mask.dtype == torch.bool
        assert mask.shape == found[layer].weight.shape
        assert 1 <= int(mask.sum()) <= counts[layer]
    if density == 0.0:
        assert all(int(mask.sum()) == 1 for mask in kept.values())
    crossed, logits = _follow(name, kept, image_size, sharing)
    assert {layer: int((kept[layer] & ~crossed[layer]).sum()) for layer in kept} == dict.fromkeys(kept, 0)
    assert logits.any()
    if density == 1.0:
        assert logits.all()


@pytest.mark.parametrize(("name", "density"), [("resnet34", 0.1), ("vgg16", 0.1), ("mobilenet_v2", 0.2)])
def test_the_search_above_agrees_with_the_sweep(name: str, density: float) -> None:
    """Two ways that share nothing: boolean maps, and positive numbers with their gradients."""
    model = _build(name, 0.0625, 32, sharing=False)
    generator = torch.Generator().manual_seed(3)
    masks = {
        layer: torch.rand(module.weight.shape, generator=generator) < density for layer, module in layers(model).items()
    }
    crossed, logits = _follow(name, masks, 32, sharing=False)
    found, reached = on_paths(model, 32, masks)
    assert torch.equal(reached, logits)
    assert {layer: int((mask ^ crossed[layer]).sum()) for layer, mask in found.items()} == dict.fromkeys(masks, 0)
    assert 0 < sum(int(mask.sum()) for mask in crossed.values()) < sum(int(mask.sum()) for mask in masks.values())


@pytest.mark.parametrize(
    ("name", "image_size", "sharing", "density", "seed"),
    [
        ("resnet34", 8, False, 0.0, 2),
        ("resnet34", 8, False, 0.01, 0),
        ("resnet34", 8, True, 0.01, 1),
        ("resnet50", 16, True, 0.01, 3),
        ("vgg16", 32, False, 0.01, 20),
        ("vgg16", 32, False, 0.01, 41),
    ],
)
def test_small_maps_where_two_taps_can_miss_each_other(
    impatient: None, name: str, image_size: int, sharing: bool, density: float, seed: int
) -> None:
    """A central tap can be on no path because its neighbours' taps look away, while they are on other paths."""
    model = _build(name, 0.0625, image_size, sharing)
    total = sum(module.weight.numel() for module in layers(model).values())
    counts = _counts(model, max(83, round(density * total)))
    kept = _start(model, counts, seed, image_size)
    crossed, logits = _follow(name, kept, image_size, sharing)
    assert {layer: int((kept[layer] & ~crossed[layer]).sum()) for layer in kept} == dict.fromkeys(kept, 0)
    assert logits.any()


@pytest.mark.every(2)
@pytest.mark.parametrize("sharing", [True, False])
def test_resnet34_at_9999(sharing: bool) -> None:
    """The whole ResNet-34 with 2,127 of 21,265,088 weights: connected to every logit."""
    model = _build("resnet34", 1.0, 32, sharing)
    masks = Masks(model)
    counts = _counts(model, 2127)
    kept = _start(model, counts, 0, 32)
    crossed, logits = _follow("resnet34", kept, 32, sharing)
    assert all(torch.equal(crossed[layer], mask) for layer, mask in kept.items())
    assert all(1 <= int(mask.sum()) <= counts[layer] for layer, mask in kept.items())
    assert logits.all()
    assert masks.kept() == masks.unique()
    if sharing:
        return
    # without it ERK's random masks are cut through
    loose = {name: torch.zeros(mask.numel(), dtype=torch.bool) for name, mask in kept.items()}
    generator = torch.Generator().manual_seed(0)
    for name, mask in loose.items():
        mask[torch.randperm(mask.numel(), generator=generator)[: counts[name]]] = True
    shaped = {name: mask.reshape(kept[name].shape) for name, mask in loose.items()}
    assert not _follow("resnet34", shaped, 32, sharing)[1].any()


@pytest.mark.every(2)
@pytest.mark.parametrize("sharing", [True, False])
def test_pruning_with_a_connected_start_first(sharing: bool) -> None:
    """Exact counts as without it; what is reserved is in; the rest is what scores best."""
    model = _build("resnet34", 0.25, 32, sharing)
    masks = Masks(model)
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(weight.shape, generator=generator) for name, weight in masks.weights().items()}
    kept = num_kept(0.999, masks.total())
    told: dict[str, int] = {}
    reserved: dict[str, Tensor] = {}

    def first(counts: dict[str, int]) -> dict[str, Tensor]:
        told.update(counts)
        reserved.update(_start(model, counts, 1, 32))
        return reserved

    new = prune_to(masks, kept, scores, "erk", first)
    plain = prune_to(masks, kept, scores, "erk")
    assert {name: int(mask.sum()) for name, mask in new.items()} == told
    assert {name: int(mask.sum()) for name, mask in plain.items()} == told
    assert sum(told.values()) == kept
    for name, mask in new.items():
        left = told[name] - int(reserved[name].sum())
        others = scores[name].double().masked_fill(reserved[name], -1.0).flatten().tolist()
        best = sorted(range(len(others)), key=lambda i: (-others[i], i))[:left]
        wanted = reserved[name].clone()
        wanted.view(-1)[best] = True
        assert torch.equal(mask, wanted)
    masks.set(new)
    found = connectivity(model, 32)
    assert (found.kept, found.connected, found.dead_layers) == (kept, True, [])
    assert found.effective >= sum(int(mask.sum()) for mask in reserved.values())


def test_the_seed_decides() -> None:
    model = _build("resnet34", 0.125, 32, sharing=False)
    counts = _counts(model, 600)
    first, again, other = (_start(model, counts, seed, 32) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert sum(not torch.equal(first[name], other[name]) for name in first) > len(first) / 2
    torch.manual_seed(5)
    state = torch.get_rng_state()
    _start(model, counts, 1, 32)
    assert torch.equal(torch.get_rng_state(), state), "only its own generator is used"


@pytest.mark.full
def test_positions_are_spread_over_channels_and_taps() -> None:
    """Over many seeds every channel and every tap of a kernel comes up."""
    model = _build("resnet34", 0.0625, 32, sharing=False)
    counts = dict.fromkeys(layers(model), 1)
    seen = sum(_start(model, counts, seed, 32)["layer2.2.conv1"].int() for seed in range(40))
    assert int(seen.sum()) == 40
    assert (seen.sum((0, 1)) > 0).all()
    assert (seen.sum((1, 2, 3)) > 0).sum() >= 7
    assert (seen.sum((0, 2, 3)) > 0).sum() >= 7


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 12])
def test_equal_budgets(budget: int) -> None:
    """As many paths side by side as every layer can carry: k used channels between layers cost k weights."""
    for name in ("resnet34", "vgg16", "mobilenet_v2"):
        model = _build(name, 0.0625, 32, sharing=False)
        found = layers(model)
        counts = {layer: min(budget, module.weight.numel()) for layer, module in found.items()}
        kept = _start(model, counts, budget, 32)
        crossed, logits = _follow(name, kept, 32, sharing=False)
        assert all(torch.equal(crossed[layer], mask) for layer, mask in kept.items())
        assert all(1 <= int(mask.sum()) <= counts[layer] for layer, mask in kept.items())
        # between two tensors of the same size no budget is left over, where three image channels allow it
        assert int(logits.sum()) >= min(budget, 10) / 3


def test_nothing_changes_but_the_generator() -> None:
    model = _build("resnet34", 0.0625, 32, sharing=True)
    dyrelu.install(model, 32)
    masks = Masks(model)
    masks.set({name: torch.rand(mask.shape) < 0.5 for name, mask in masks.masks().items()})
    nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    model.layer2.eval()
    model.fc.weight.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: (type(module), module.training) for name, module in model.named_modules()}
    given = {name: torch.rand(mask.shape) < 0.2 for name, mask in masks.masks().items()}
    held = {name: mask.clone() for name, mask in given.items()}
    look: list[Callable[[], object]] = [
        partial(on_paths, model, 32, given),
        partial(connectivity, model, 32),
        partial(_start, model, _counts(model, 500), 0, 32),
    ]
    for one in look:
        with torch.no_grad():
            one()
        after = model.state_dict()
        assert list(after) == list(state)
        assert all(
            torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in state.items()
        )
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == flags[name]
            grad = grads[name]
            assert (parameter.grad is None) == (grad is None)
            assert grad is None or torch.equal(parameter.grad, grad)
        assert {name: (type(module), module.training) for name, module in model.named_modules()} == modes
        assert all(torch.equal(given[name], mask) for name, mask in held.items())


def test_masks_given_count_and_not_those_worn() -> None:
    """`on_paths` looks at the masks that it is told, whatever the network wears."""
    model = _build("resnet34", 0.0625, 32, sharing=True)
    masks = Masks(model)
    start = _start(model, _counts(model, 100), 4, 32)
    masks.set({name: torch.zeros_like(mask) for name, mask in masks.masks().items()})
    crossed, logits = on_paths(model, 32, start)
    assert all(torch.equal(crossed[name], mask) for name, mask in start.items())
    assert logits.any()
    assert not connectivity(model, 32).connected
    assert math.isclose(masks.sparsity(), 1.0)


def test_grouped_convolutions_are_refused_and_not_searched_for_ever() -> None:
    """Channels of one group lead into that group only, which the drawing of channels does not know."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip
    counts = {name: 8 for name in layers(model)}
    with pytest.raises(SparseLabError, match="grouped"):
        for seed in range(20):
            connected_init(model, 16, torch.Generator().manual_seed(seed), counts)
