"""Counts, costs and paths on networks with shared weights and with DyReLU, and ERK's counts as EAST needs them."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparse_lab.errors import SparseLabError
from sparse_lab.models import build, dyrelu
from sparse_lab.models.weight_sharing import share
from sparse_lab.sparsity.connectivity import connectivity, on_paths
from sparse_lab.sparsity.distributions import distribute
from sparse_lab.sparsity.flops import layer_costs
from sparse_lab.sparsity.mask_updates import drop_and_grow, move_to, prune_to
from sparse_lab.sparsity.masks import Masks, count, layers, num_kept, uses
from sparse_lab.sparsity.schedules import Cyclic

# name, classes, image size: weights before sharing, weights that exist after it
TOTALS = {
    ("resnet34", 10, 32): (21_265_088, 11_164_352),
    ("resnet34", 100, 32): (21_311_168, 11_210_432),
    ("resnet50", 10, 32): (23_467_712, 13_928_128),
    ("resnet50", 100, 32): (23_652_032, 14_112_448),
    ("resnet50", 1000, 224): (25_502_912, 15_963_328),
}
BLOCKS = {"layer1": 3, "layer2": 4, "layer3": 6, "layer4": 3}


def _owner(name: str) -> str:
    """The layer whose weight a convolution of the plain network uses once weights are shared."""
    parts = name.split(".")
    if parts[0] in BLOCKS and int(parts[1]) >= 2:
        parts[1] = "1"
    return ".".join(parts)


def _pair(name: str, density: float, seed: int = 0, width: float = 0.0625) -> tuple[nn.Module, nn.Module]:
    """A shared network with random masks and the plain one whose every copy wears the same mask."""
    torch.manual_seed(seed)
    shared, plain = build(name, width=width), build(name, width=width)
    share(shared)
    ours, theirs = Masks(shared), Masks(plain)
    ours.set({key: torch.rand(mask.shape) < density for key, mask in ours.masks().items()})
    theirs.set({key: ours[_owner(key)] for key in theirs.layers})
    return shared, plain


@pytest.mark.parametrize(("name", "classes", "image_size"), TOTALS)
def test_weights_before_and_after_sharing(name: str, classes: int, image_size: int) -> None:
    total, unique = TOTALS[name, classes, image_size]
    with torch.device("meta"):
        model = build(name, classes, image_size=image_size)
        plain_names = list(layers(model))
        assert (count(model), Masks(model).total(), Masks(model).unique()) == (total, total, total)
        share(model)
        masks = Masks(model)
    assert (count(model), masks.total(), masks.unique()) == (total, total, unique)
    wanted: dict[str, int] = {}
    for key in plain_names:
        wanted[_owner(key)] = wanted.get(_owner(key), 0) + 1
    assert uses(model) == wanted
    assert list(masks.layers) == list(wanted)


@pytest.mark.parametrize("density", [0.001, 0.1, 0.7])
@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
def test_kept_with_reuse_is_what_the_plain_network_keeps(name: str, density: float) -> None:
    shared, plain = _pair(name, density)
    masks = Masks(shared)
    everywhere = {key: value for key, value in plain.state_dict().items() if key.endswith(".mask")}
    here = {key: value for key, value in shared.state_dict().items() if key.endswith(".mask")}
    assert len(everywhere) - len(here) == {"resnet34": 16, "resnet50": 24}[name]
    assert masks.kept_with_reuse() == sum(int(mask.sum()) for mask in everywhere.values())
    assert masks.kept() == sum(int(mask.sum()) for mask in here.values()) < masks.kept_with_reuse()
    assert masks.total() == sum(mask.numel() for mask in everywhere.values())
    assert masks.sparsity() == pytest.approx(1 - masks.kept() / masks.total(), abs=1e-15)
    assert Masks(plain).kept_with_reuse() == Masks(plain).kept() == masks.kept_with_reuse()


@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
def test_multiply_adds_count_every_use(name: str) -> None:
    shared, plain = _pair(name, 0.2)
    dense: dict[str, int] = {}
    sparse: dict[str, int] = {}
    for key, layer in plain.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue

        def watch(module: nn.Module, _: tuple[Tensor, ...], output: Tensor, key: str = key) -> None:
            places = output[0].numel() // output.shape[1]
            owner, weight = _owner(key), module.get_parameter("weight")
            dense[owner] = dense.get(owner, 0) + places * weight.numel()
            sparse[owner] = sparse.get(owner, 0) + places * int(module.get_buffer("mask").sum())

        layer.register_forward_hook(watch)
    plain.eval()(torch.zeros(1, 3, 32, 32))
    costs = layer_costs(shared, 32)
    assert {cost.name: cost.macs for cost in costs} == dense
    assert {cost.name: cost.sparse_macs for cost in costs} == sparse
    assert sum(cost.total for cost in costs) == Masks(shared).unique()
    assert sum(cost.kept for cost in costs) == Masks(shared).kept()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in (1, 2))])
@pytest.mark.parametrize("density", [0.02, 0.05, 0.2])
@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
def test_a_shared_weight_is_effective_if_any_of_its_copies_is(name: str, density: float, seed: int) -> None:
    shared, plain = _pair(name, density, seed)
    crossed, logits = on_paths(plain, 16, Masks(plain).masks())
    wanted: dict[str, Tensor] = {}
    for key, mask in crossed.items():
        wanted[_owner(key)] = wanted.get(_owner(key), torch.zeros_like(mask)) | mask
    found, reached = on_paths(shared, 16, Masks(shared).masks())
    assert torch.equal(reached, logits)
    assert list(found) == list(wanted)
    assert all(torch.equal(found[key], mask) for key, mask in wanted.items())
    summary = connectivity(shared, 16)
    assert summary.kept == Masks(shared).kept()
    assert summary.effective_by_layer == {key: int(mask.sum()) for key, mask in wanted.items()}
    assert summary.effective == sum(summary.effective_by_layer.values())
    assert summary.channels == sum(mask.shape[0] for mask in wanted.values() if mask.dim() == 4)
    assert summary.connected == bool(logits.any())


def test_some_copies_are_effective_and_some_are_not() -> None:
    """Otherwise the test above could not tell 'any' from 'all'."""
    _, plain = _pair("resnet34", 0.05)
    crossed, _ = on_paths(plain, 16, Masks(plain).masks())
    assert sum(int((mask ^ crossed[_owner(key)]).sum()) for key, mask in crossed.items()) > 100


def test_scales_do_not_cut_paths() -> None:
    """A scale of zero or below is a value like any weight's: paths follow masks."""
    shared, _ = _pair("resnet34", 0.1)
    before = connectivity(shared, 16)
    for index, parameter in enumerate(shared.parameters()):
        if parameter.dim() == 0:
            parameter.data.fill_(-1.0 if index % 2 else 0.0)
    assert connectivity(shared, 16) == before


@pytest.mark.every(2)
@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("name", ["resnet34", "resnet50", "vgg16"])
def test_dyrelu_is_neither_counted_nor_in_the_way(name: str, sharing: bool) -> None:
    if name == "vgg16" and sharing:
        return
    torch.manual_seed(0)
    model = build(name, width=0.0625)
    if sharing:
        share(model)
    masks = Masks(model)
    masks.set({key: torch.rand(mask.shape) < 0.1 for key, mask in masks.masks().items()})
    names, found, costs = list(layers(model)), connectivity(model, 32), layer_costs(model, 32)
    before = (count(model), masks.total(), masks.unique(), masks.kept(), uses(model))
    dyrelu.install(model, 32)
    again = Masks(model)
    assert list(layers(model)) == names == list(again.layers)
    assert (count(model), again.total(), again.unique(), again.kept(), uses(model)) == before
    assert connectivity(model, 32) == found
    assert 0 < found.effective < found.kept
    assert layer_costs(model, 32) == costs
    assert not any("mask" in dict(module.named_buffers()) for module in dyrelu.activations(model).values())
    dyrelu.fade(model, 0.0)
    assert connectivity(model, 32) == found


def _erk(kept: int, shapes: list[tuple[int, ...]]) -> list[int]:
    """x_i = clamp(scale * (sum of dims), 1, size) with the scale, found exactly, at which they add up to `kept`; then
    whole numbers by the largest remainder.
    """
    claims = [Fraction(sum(shape)) for shape in shapes]
    sizes = [math.prod(shape) for shape in shapes]

    def at(scale: Fraction) -> list[Fraction]:
        return [min(max(scale * claim, Fraction(1)), Fraction(size)) for claim, size in zip(claims, sizes, strict=True)]

    bends = sorted({Fraction(bound) / claim for claim, size in zip(claims, sizes, strict=True) for bound in (1, size)})
    low = max((bend for bend in bends if sum(at(bend)) <= kept), default=Fraction(0))
    high = min((bend for bend in bends if sum(at(bend)) > kept), default=low)
    ideal = at(low)
    if high > low:  # between two bends the sum is a straight line
        slope = (sum(at(high)) - sum(ideal)) / (high - low)
        ideal = at(low + (kept - sum(ideal)) / slope)
    assert sum(ideal) == kept
    counts = [value.numerator // value.denominator for value in ideal]
    short = kept - sum(counts)
    for index in sorted(range(len(counts)), key=lambda i: (counts[i] - ideal[i], i))[:short]:
        counts[index] += 1
    return counts


def _allocated(model: nn.Module, kept: int) -> dict[str, int]:
    alive = {name: torch.ones(module.weight.shape, dtype=torch.bool) for name, module in layers(model).items()}
    weights = {name: module.weight for name, module in layers(model).items()}
    return distribute("erk", kept, weights, weights, alive)


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
def test_erk_counts(name: str, sharing: bool) -> None:
    with torch.device("meta"):
        model = build(name)
        if sharing:
            share(model)
    shapes = [tuple(module.weight.shape) for module in layers(model).values()]
    total = TOTALS[name, 10, 32][0]
    for sparsity in (0.5, 0.9, 0.99, 0.999, 0.9999):
        kept = round((1 - sparsity) * total)
        if kept > sum(math.prod(shape) for shape in shapes):
            continue
        counts = list(_allocated(model, kept).values())
        assert sum(counts) == kept == num_kept(sparsity, count(model))
        assert counts == _erk(kept, shapes)
        assert all(1 <= number <= math.prod(shape) for number, shape in zip(counts, shapes, strict=True))


# ERK counts layer by layer in the model's order, as numbers: worked out once with the exact solver above
FROZEN = json.loads(Path(__file__).with_name("erk_counts.json").read_text())


@pytest.mark.parametrize("case", FROZEN)
def test_erk_counts_as_numbers(case: str) -> None:
    name, *shared, percent = case.split()
    with torch.device("meta"):
        model = build(name)
        if shared:
            share(model)
    kept = round((1 - float(percent.rstrip("%")) / 100) * TOTALS[name, 10, 32][0])
    assert list(_allocated(model, kept).values()) == FROZEN[case]
    assert sum(FROZEN[case]) == kept


@pytest.mark.parametrize(
    ("name", "kept", "reused"),
    [("resnet34", 2126, 3852), ("resnet34", 2127, 3853), ("resnet50", 2347, 4159)],
)
def test_learnable_count_and_count_with_reuse(name: str, kept: int, reused: int) -> None:
    """EAST's facts: 2,126 learnable weights of ResNet-34 are 3,852 with reuse."""
    with torch.device("meta"):
        model = build(name)
        share(model)
    counts = _allocated(model, kept)
    assert sum(counts.values()) == kept
    assert sum(times * counts[layer] for layer, times in uses(model).items()) == reused


def test_sparsity_counts_on_the_network_before_sharing() -> None:
    """Pruning, a cycle and drop and grow on a shared network keep what the schedule asks for, to the weight."""
    torch.manual_seed(0)
    model = build("resnet34", width=0.125)
    share(model)
    masks = Masks(model)
    total = masks.total()
    scores = {name: torch.rand(weight.shape) for name, weight in masks.weights().items()}
    masks.set(prune_to(masks, num_kept(0.99, total), scores, "erk"))
    shapes = [tuple(weight.shape) for weight in masks.weights().values()]
    schedule = Cyclic(0.99, (12, 8), 3.0, every=3)
    for step in range(1, 25):
        if schedule.due(step):
            kept = round((1 - schedule.sparsity(step)) * total)
            masks.set(move_to(masks, kept, scores, scores, "erk"))
            assert list(masks.kept_by_layer().values()) == _erk(kept, shapes)
            assert masks.sparsity() == pytest.approx(schedule.sparsity(step), abs=0.51 / total)
        before = masks.kept_by_layer()
        masks.set(drop_and_grow(masks.masks(), 0.3, scores, scores))
        assert masks.kept_by_layer() == before
    assert masks.kept() == round(0.01 * total)


def test_more_than_exists_is_refused() -> None:
    model = build("resnet34", width=0.0625)
    share(model)
    masks = Masks(model)
    scores = {name: weight.abs() for name, weight in masks.weights().items()}
    with pytest.raises(SparseLabError, match="only"):
        prune_to(masks, masks.unique() + 1, scores, "erk")
    with pytest.raises(ValueError, match="does not fit"):
        move_to(masks, masks.unique() + 1, scores, scores, "erk")


def test_one_mask_and_one_zeroing_for_all_uses() -> None:
    """After a step with momentum and decay, shared weights and their momentum are zero where the mask is."""
    shared, _ = _pair("resnet34", 0.3)
    masks = Masks(shared)
    optimizer = torch.optim.SGD(shared.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(2):
        nn.functional.cross_entropy(shared(torch.randn(4, 3, 16, 16)), torch.arange(4)).backward()
        optimizer.step()
        masks.enforce(optimizer)
    fewer = {name: mask & (torch.rand(mask.shape) < 0.5) for name, mask in masks.masks().items()}
    fewer["fc"] = masks["fc"].clone()
    masks.set(fewer, optimizer)
    for name, weight in masks.weights().items():
        momentum = optimizer.state[weight]["momentum_buffer"]
        assert torch.equal(masks[name], fewer[name])
        assert not weight[~fewer[name]].any()
        assert not momentum[~fewer[name]].any()
        assert momentum[fewer[name]].abs().sum() > 0
    for parameter in shared.parameters():
        if parameter.dim() == 0:
            assert optimizer.state[parameter]["momentum_buffer"].item() != 0
