"""Convolutions and linear layers of live weights against torch in float64: outputs and all three gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


@dataclass(frozen=True)
class Case:
    inputs: int
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    size: tuple[int, int] = (9, 7)
    images: int = 12
    bias: bool = True

    def layer(self) -> nn.Conv2d:
        return nn.Conv2d(
            self.inputs, self.outputs, self.kernel, self.stride, self.padding, self.dilation, self.groups, self.bias
        )


CASES = {
    "1x1": Case(9, 6, (1, 1)),
    "1x1, one pixel": Case(40, 10, (1, 1), size=(1, 1)),
    "1x1 with padding": Case(6, 6, (1, 1), padding=(2, 1)),
    "1x1, stride 2, odd size": Case(6, 8, (1, 1), stride=(2, 2)),
    "3x3": Case(5, 7, (3, 3), padding=(1, 1)),
    "3x3 without bias": Case(5, 7, (3, 3), padding=(1, 1), bias=False),
    "3x3 on one pixel": Case(8, 8, (3, 3), padding=(1, 1), size=(1, 1)),
    "3x3 on one row": Case(8, 8, (3, 3), padding=(1, 1), size=(1, 6)),
    "3x3 on one column": Case(8, 8, (3, 3), padding=(1, 1), size=(6, 1)),
    "3x3 without padding": Case(5, 7, (3, 3)),
    "3x3, stride 2": Case(5, 7, (3, 3), stride=(2, 2), padding=(1, 1)),
    "3x3, stride 2, even size": Case(5, 7, (3, 3), stride=(2, 2), padding=(1, 1), size=(8, 10)),
    "3x3, stride 3 by 1": Case(5, 7, (3, 3), stride=(3, 1), padding=(1, 2)),
    "3x3, dilated": Case(5, 7, (3, 3), padding=(2, 2), dilation=(2, 2)),
    "5x5": Case(4, 6, (5, 5), padding=(2, 2)),
    "5x5 on two pixels": Case(4, 6, (5, 5), padding=(2, 2), size=(2, 2)),
    "7x7, stride 2": Case(3, 8, (7, 7), stride=(2, 2), padding=(3, 3), size=(16, 15)),
    "7x7 on two pixels": Case(3, 8, (7, 7), padding=(3, 3), size=(2, 2)),
    "3x1": Case(5, 7, (3, 1), padding=(1, 0)),
    "7x1": Case(5, 7, (7, 1), padding=(3, 0), size=(3, 5)),
    "1x3": Case(5, 7, (1, 3), padding=(0, 1)),
    "2x2, stride 2": Case(5, 7, (2, 2), stride=(2, 2)),
    "groups": Case(6, 9, (3, 3), padding=(1, 1), groups=3),
    "groups, stride 2": Case(6, 9, (3, 3), stride=(2, 2), padding=(1, 1), groups=3),
    "depthwise": Case(12, 12, (3, 3), padding=(1, 1), groups=12),
    "depthwise, stride 2": Case(12, 12, (3, 3), stride=(2, 2), padding=(1, 1), groups=12),
    "depthwise, two outputs a channel": Case(8, 16, (3, 3), padding=(1, 1), groups=8),
    "one image": Case(5, 7, (3, 3), padding=(1, 1), images=1),
    "a prime batch": Case(5, 7, (3, 3), padding=(1, 1), images=13),
    "a large prime batch": Case(3, 4, (3, 3), padding=(1, 1), size=(3, 3), images=211),
    "three blocks": Case(5, 7, (3, 3), padding=(1, 1), size=(4, 5), images=96),
    "many inputs, slice by slice": Case(96, 9, (3, 3), padding=(1, 1), images=32),
    "many outputs, slice by slice": Case(9, 96, (3, 3), padding=(1, 1), size=(5, 11), images=24),
    "large maps, piece by piece": Case(20, 20, (3, 3), padding=(1, 1), size=(16, 15), images=16),
    "slices of 5x5, a batch of one": Case(64, 16, (5, 5), padding=(2, 2), size=(7, 19), images=1),
    "the last batch of CIFAR-10": Case(5, 7, (3, 3), stride=(2, 2), padding=(1, 1), size=(4, 5), images=80),
}


def images(case: Case, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(case.images, case.inputs, *case.size, generator=generator)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_convolution_and_its_gradients(twins: type, probed: type, name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    pair = twins(probed(case.layer(), (case.images, case.inputs, *case.size)), dtype)
    pair.arithmetic.dense_gradients = True
    errors = pair.step(images(case))
    wanted = {"outputs", "offset, dense", "layer.weight", "layer.weight, dense"}
    assert set(errors) == wanted | ({"layer.bias, dense"} if case.bias else set())
    torchs = {name for name in errors if name.endswith("weight, dense")}  # its own sums over many images are less exact
    assert max(error for name, error in errors.items() if name not in torchs) < TOLERANCE[dtype], errors
    assert max(errors[name] for name in torchs) < 10 * TOLERANCE[dtype], errors


@st.composite
def cases(draw: Callable) -> Case:
    pairs = {
        name: (draw(st.integers(low, high)), draw(st.integers(low, high)))
        for name, low, high in (
            ("kernel", 1, 5),
            ("stride", 1, 3),
            ("padding", 0, 3),
            ("dilation", 1, 2),
            ("size", 1, 9),
        )
    }
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    return Case(
        inputs=groups * draw(st.integers(1, 4)),
        outputs=groups * draw(st.integers(1, 4)),
        groups=groups,
        images=draw(st.sampled_from([1, 2, 5, 7, 12, 33, 37, 64])),
        bias=draw(st.booleans()),
        **pairs,
    )


@given(case=cases(), density=st.sampled_from([0.02, 0.1, 0.25]))
def test_any_convolution_and_its_gradients(twins: type, probed: type, case: Case, density: float) -> None:
    reach = [d * (k - 1) + 1 for d, k in zip(case.dilation, case.kernel, strict=True)]
    assume(all(s + 2 * p >= r for s, p, r in zip(case.size, case.padding, reach, strict=True)))
    layer = case.layer()
    assume(layer.weight.numel() >= 4)
    pair = twins(probed(layer, (case.images, case.inputs, *case.size)), density=density)
    pair.arithmetic.dense_gradients = True
    errors = pair.step(images(case))
    assert max(errors.values()) < 1e-12, errors


class Flat(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.flatten(x, 1))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (3, 2)], ids=str)
@pytest.mark.parametrize("number", [1, 24, 31])
def test_a_linear_layer_on_a_flattened_map(
    twins: type, probed: type, number: int, size: tuple[int, int], bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    shape = (number, 20, *size)
    pair = twins(probed(Flat(nn.Linear(20 * size[0] * size[1], 7, bias)), shape), dtype)
    pair.arithmetic.dense_gradients = True
    errors = pair.step(torch.randn(shape))
    assert max(errors.values()) < TOLERANCE[dtype], errors


class Branches(nn.Module):
    """Several layers on one map: their gradients add up there."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return sum(layer(x) for layer in self.branches[1:]) + self.branches[0](x)


BRANCHES: dict[str, Callable[[], list[nn.Module]]] = {
    "two of rows": lambda: [nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)],
    "two of taps": lambda: [nn.Conv2d(6, 4, 3), nn.Conv2d(6, 4, 5, padding=1)],
    "both, and the map itself": lambda: [nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 5, padding=2), nn.Identity()],
    "the map itself twice": lambda: [nn.Identity(), nn.Identity(), nn.Conv2d(6, 6, 1)],
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", BRANCHES)
def test_gradients_of_several_uses_add_up(twins: type, probed: type, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shape = (10, 6, 7, 5)
    pair = twins(probed(Branches(*BRANCHES[name]()), shape), dtype)
    errors = pair.step(torch.randn(shape))
    assert max(errors.values()) < TOLERANCE[dtype], errors


def test_filters_without_any_weight_give_their_bias(twins: type) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 3, 3, padding=1)
    with torch.no_grad():
        layer.weight[1:] = 0.0
        layer.weight[0, 1:] = 0.0
    pair = twins(nn.Sequential(layer), density=None)
    errors = pair.step(torch.randn(5, 4, 6, 6))
    assert max(errors.values()) < 1e-12, errors
    with torch.no_grad():
        outputs = pair.arithmetic(torch.randn(5, 4, 6, 6, dtype=torch.float64))
    assert torch.equal(outputs[:, 2], pair.sparse[0].bias[2].expand(5, 6, 6))


def test_a_mask_that_keeps_nothing_leaves_biases(twins: type) -> None:
    pair = twins(nn.Sequential(nn.Conv2d(4, 3, 3, padding=1)))
    pair.set({"0": torch.zeros(3, 4, 3, 3, dtype=torch.bool)})
    outputs = pair.arithmetic(torch.randn(5, 4, 6, 6, dtype=torch.float64))
    outputs.sum().backward()
    assert torch.equal(outputs, pair.sparse[0].bias[:, None, None].expand(5, 3, 6, 6))
    assert pair.arithmetic.live[pair.sparse[0].weight].gradient.shape == (0,)
    assert torch.equal(pair.sparse[0].bias.grad, torch.full((3,), 180.0, dtype=torch.float64))


WRONG: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv2d(5, 8, 3, padding=1),
    "grouped convolution": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=4),
    "linear layer": lambda: Flat(nn.Linear(6 * 7 * 5 + 1, 4)),
    "kernel larger than the image": lambda: nn.Conv2d(6, 8, 9),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_layer_that_does_not_fit_is_refused_in_torchs_words(twins: type, name: str) -> None:
    pair = twins(nn.Sequential(WRONG[name]()))
    images = torch.randn(4, 6, 7, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError) as wanted:
        pair.dense(images)
    with pytest.raises(RuntimeError) as got:
        pair.arithmetic(images)
    assert str(got.value) == str(wanted.value)
