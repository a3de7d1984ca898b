"""Normalisation, activations, residuals, pooling, dropout and dynamic ReLU against torch in float64.

Each stands behind a convolution whose outputs are its inputs, digit for digit, so that an error here is its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock, LayerNorm2d
from torchvision.ops import SqueezeExcitation, StochasticDepth

from sparse_lab.models.dyrelu import DyReLU
from sparse_lab.models.weight_sharing import SharedConv2d

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
CHANNELS = 6


def same(channels: int = CHANNELS) -> nn.Conv2d:
    """1x1, and what comes out is what went in."""
    layer = nn.Conv2d(channels, channels, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(channels)[:, :, None, None])
    return layer


def norm(**options: object) -> nn.BatchNorm2d:
    """With weights of either sign, and statistics that are not those of the batch."""
    layer = nn.BatchNorm2d(CHANNELS, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean):
            if tensor is not None:
                tensor.normal_()
        if layer.running_var is not None:
            layer.running_var.uniform_(0.5, 2.0)
    return layer


def fading(beta: float) -> DyReLU:
    layer = DyReLU(CHANNELS)
    layer.beta.fill_(beta)
    return layer


class Residual(nn.Module):
    """end(branch(x) + shortcut(x))."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module, end: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut, self.end = branch, shortcut, end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.branch(x) + self.shortcut(x))


class Shared(nn.Module):
    """A convolution, and the same one twice more with scales of their own."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.first, self.second, self.third = conv, SharedConv2d(conv), SharedConv2d(conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


def thin(module: nn.Module) -> nn.Module:
    """With one of seven weights: enough of them that nothing is cut off."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            kept = torch.arange(layer.weight.numel()).view(layer.weight.shape) % 7 == 0
            with torch.no_grad():
                layer.weight.mul_(kept)
    return module


def chain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(same(), *layers)


MAPS: dict[str, Callable[[], nn.Module]] = {
    "norm": lambda: chain(norm()),
    "norm, momentum 0.3": lambda: chain(norm(momentum=0.3)),
    "norm, cumulative average": lambda: chain(norm(momentum=None)),
    "norm, no running statistics": lambda: chain(norm(track_running_stats=False)),
    "norm, ReLU": lambda: chain(norm(), nn.ReLU()),
    "norm, ReLU6": lambda: chain(norm(), nn.ReLU6()),
    "norm, hardtanh": lambda: chain(norm(), nn.Hardtanh(-0.5, 0.75)),
    "norm, ReLU, pool": lambda: chain(norm(), nn.ReLU(), nn.MaxPool2d(2)),
    "norm, ReLU6, pool": lambda: chain(norm(), nn.ReLU6(), nn.MaxPool2d(2)),
    "norm, pool": lambda: chain(norm(), nn.MaxPool2d(2)),
    "norm, pool, ReLU": lambda: chain(norm(), nn.MaxPool2d(2), nn.ReLU()),
    "norm, ReLU, pool, pool": lambda: chain(norm(), nn.ReLU(), nn.MaxPool2d(2), nn.MaxPool2d(2)),
    "norm, ReLU, pool of 3": lambda: chain(norm(), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
    "norm, ReLU, ReLU6": lambda: chain(norm(), nn.ReLU(), nn.ReLU6()),
    "norm, ReLU, mean": lambda: chain(norm(), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
    "ReLU": lambda: chain(nn.ReLU()),
    "ReLU, pool": lambda: chain(nn.ReLU(), nn.MaxPool2d(2)),
    "pool": lambda: chain(nn.MaxPool2d(2)),
    "pool of 3 by 2": lambda: chain(nn.MaxPool2d((3, 2), (2, 1), (1, 0))),
    "overlapping pool": lambda: chain(nn.MaxPool2d(3, 1, 1)),
    "mean": lambda: chain(nn.AdaptiveAvgPool2d(1)),
    "mean, dropout": lambda: chain(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3)),
    "dropout": lambda: chain(nn.Dropout(0.3)),
    "DyReLU": lambda: chain(DyReLU(CHANNELS)),
    "norm, DyReLU": lambda: chain(norm(), DyReLU(CHANNELS)),
    "norm, DyReLU, half": lambda: chain(norm(), fading(0.5)),
    "norm, DyReLU, faded": lambda: chain(norm(), fading(0.0)),
    "norm + x, ReLU": lambda: Residual(chain(norm()), nn.Identity(), nn.ReLU()),
    "x + norm, ReLU": lambda: Residual(nn.Identity(), chain(norm()), nn.ReLU()),
    "norm + x": lambda: Residual(chain(norm()), nn.Identity(), nn.Identity()),
    "norm + norm, ReLU": lambda: Residual(chain(norm()), chain(norm()), nn.ReLU()),
    "norm + norm, ReLU, pool": lambda: nn.Sequential(
        Residual(chain(norm()), chain(norm()), nn.ReLU()), nn.MaxPool2d(2)
    ),
    "norm + x, DyReLU": lambda: Residual(chain(norm()), nn.Identity(), fading(0.7)),
    "conv + x, ReLU": lambda: Residual(same(), nn.Identity(), nn.ReLU()),
    "one norm twice": lambda: nn.Sequential(same(), Residual(norm(), nn.Identity(), nn.ReLU())),
    "GELU": lambda: chain(nn.GELU()),
    "GELU by tanh": lambda: chain(nn.GELU("tanh")),
    "norm, SiLU": lambda: chain(norm(), nn.SiLU()),
    "norm, SiLU in place, mean": lambda: chain(norm(), nn.SiLU(inplace=True), nn.AdaptiveAvgPool2d(1)),
    "norm, hard-swish": lambda: chain(norm(), nn.Hardswish()),
    "sigmoid, tanh": lambda: chain(nn.Sigmoid(), nn.Tanh()),
    "leaky ReLU, ELU": lambda: chain(nn.LeakyReLU(0.2), nn.ELU(0.7)),
    "SiLU + x, ReLU": lambda: Residual(chain(nn.SiLU()), nn.Identity(), nn.ReLU()),
    "squeeze and excite": lambda: chain(norm(), thin(SqueezeExcitation(CHANNELS, 3))),
    "squeeze and excite, hard, x": lambda: Residual(
        chain(thin(SqueezeExcitation(CHANNELS, 2, scale_activation=nn.Hardsigmoid))), nn.Identity(), nn.ReLU()
    ),
    "LayerNorm over channels": lambda: chain(LayerNorm2d(CHANNELS, eps=1e-6)),
    "LayerNorm without parameters": lambda: chain(LayerNorm2d(CHANNELS, elementwise_affine=False)),
    "ConvNeXt's block": lambda: chain(thin(CNBlock(CHANNELS, 0.5, 0.0))),
    "images dropped": lambda: chain(norm(), StochasticDepth(0.5, "row")),
    "norm of an activation": lambda: chain(nn.SiLU(), norm(), nn.ReLU()),
    "one norm, two activations": lambda: nn.Sequential(chain(norm()), Residual(nn.ReLU(), nn.ReLU6(), nn.Identity())),
}
SHAPES = ((12, CHANNELS, 8, 6), (13, CHANNELS, 7, 5))


@pytest.mark.every(3)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_a_map_its_gradients_and_its_statistics(
    twins: type, probed: type, name: str, dtype: torch.dtype, training: bool
) -> None:
    for shape in SHAPES:
        torch.manual_seed(0)
        pair = twins(probed(MAPS[name](), shape), dtype, density=None)
        pair.train(training)
        for seed in (1, 2):  # the second step finds buffers that have been used
            errors = of_the_map(pair, torch.randn(shape) + 0.3, seed)
            # dynamic ReLU's coefficients are torch's own, in whatever precision
            loose = {name: 4 * TOLERANCE[dtype] for name in errors if "reduce" in name or "expand" in name}
            assert all(error < loose.get(part, TOLERANCE[dtype]) for part, error in errors.items()), (shape, errors)
        said = {line.split(" for ")[1].split()[0] for line in pair.said}
        assert said <= {"add", "hardsigmoid"}, said  # the probe's; torch is as fast


def of_the_map(pair: Any, images: Tensor, seed: int = 5) -> dict[str, float]:
    """Errors but for the weight in front: behind it a norm takes any scale away, and what is left has no digits."""
    live = {name for name, parameter in pair.sparse.named_parameters() if parameter in pair.arithmetic.live}
    errors = {name: error for name, error in pair.step(images, seed).items() if name not in live}
    assert "outputs" in errors and any("offset" in name for name in errors)
    return errors


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_convolution_that_is_used_again_with_scales(twins: type, probed: type, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        torch.manual_seed(0)
        pair = twins(probed(Shared(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)), shape), dtype)
        errors = pair.step(torch.randn(shape))
        scales = {name: errors.pop(name) for name in list(errors) if "scale" in name}
        assert len(scales) == 2
        assert max(errors.values()) < TOLERANCE[dtype], errors
        assert not any(" for mul " in line for line in pair.said), pair.said
        # the gradient of a scale is a product of two vectors: an error is measured against their lengths
        weight, gradient = pair.dense.layer.first.weight, pair.dense.layer.first.weight.grad
        for name, error in scales.items():
            size = pair.dense.get_parameter(name.removesuffix(", dense")).grad.abs().item()
            assert error * size < TOLERANCE[dtype] * (weight.norm() * gradient.norm()).item(), name


@pytest.mark.parametrize("ratio", [1.0, 30.0, 1e3])
def test_a_mean_far_from_zero_costs_the_digits_that_it_costs_in_torch(twins: type, probed: type, ratio: float) -> None:
    shape = (24, CHANNELS, 8, 8)
    torch.manual_seed(0)
    model = nn.Sequential(same(), norm())
    images = torch.randn(shape) + ratio
    pair = twins(probed(model, shape), torch.float32, density=None)
    errors = of_the_map(pair, images)
    peer = twins(probed(model, shape), torch.float32, density=None)
    peer.arithmetic = Torch(peer.sparse)
    bounds = peer.step(images)
    for name, error in errors.items():
        assert error < max(1e-6, 3 * bounds[name]), (name, errors, bounds)
    exact = of_the_map(twins(probed(model, shape), density=None), images)
    assert max(exact.values()) < 1e-12 * max(1.0, ratio), exact


class Torch:
    """Stands where the arithmetic stands, for torch's own error in the same places."""

    live: dict = {}  # noqa: RUF012
    dense_gradients = False

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, images: Tensor) -> Tensor:
        return self._model(images)

    def density(self) -> float:
        return 0.0


def test_the_first_of_equal_values_gets_a_pools_gradient(twins: type, probed: type) -> None:
    shape = (4, CHANNELS, 6, 6)
    for layer in (nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1)):
        for before in ((), (nn.ReLU(),)):
            pair = twins(probed(chain(*before, layer), shape), density=None)
            images = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(0)).double()
            assert max(pair.step(images).values()) < 1e-12


NAN_AT = tuple(itertools.product((0, 1), (0, 1)))
ODD_MAPS = {
    "ReLU": lambda: chain(nn.ReLU()),
    "ReLU, pool": lambda: chain(nn.ReLU(), nn.MaxPool2d(2)),
    "norm, ReLU, pool": lambda: chain(norm(), nn.ReLU(), nn.MaxPool2d(2)),
    "norm, ReLU6": lambda: chain(norm(), nn.ReLU6()),
    "pool": lambda: chain(nn.MaxPool2d(2)),
    "overlapping pool": lambda: chain(nn.MaxPool2d(3, 1, 1)),
    "mean": lambda: chain(nn.AdaptiveAvgPool2d(1)),
    "norm + x, ReLU": lambda: Residual(chain(norm()), nn.Identity(), nn.ReLU()),
    "DyReLU": lambda: chain(DyReLU(CHANNELS)),  # torch writes it in another way, where infinity is NaN at times
}
ODD = tuple(ODD_MAPS)


@pytest.mark.parametrize(
    ("name", "value"), [*((name, math.nan) for name in ODD), *((name, math.inf) for name in ODD[:-1])]
)
def test_what_is_no_number_stays_none_where_torch_has_it_so(twins: type, name: str, value: float) -> None:
    torch.manual_seed(0)
    pair = twins(ODD_MAPS[name](), torch.float32, density=None)
    pair.train(False)
    for row, column in NAN_AT:
        images = torch.randn(3, CHANNELS, 4, 4)
        images[1, 2, row, column] = value
        with torch.no_grad():
            wanted, got = pair.dense(images.double())[:, 2], pair.arithmetic(images)[:, 2]
        assert torch.equal(got.isfinite(), wanted.isfinite()), (row, column)
