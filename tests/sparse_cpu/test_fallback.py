"""What the kernels do not know is computed by torch: as exactly, and said once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_lab import models
from sparse_lab.models import offsets

WIDTH = 6


class Uncounted(nn.Conv2d):
    counted = False


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.rand(1, WIDTH, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors


class TwoNorms(nn.Module):
    """One convolution read by a norm and by others: its bias has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm(x) + x


class ScaledAndNot(nn.Module):
    """One convolution, times a learned number and as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.factor = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.factor * x + x


# what stands in the middle of the network, and the function that torch computes
UNKNOWN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "Softplus": (nn.Softplus, "softplus"),
    "AvgPool2d": (lambda: nn.AvgPool2d(2), "avg_pool2d"),
    "AdaptiveAvgPool2d of 2": (lambda: nn.AdaptiveAvgPool2d(2), "adaptive_avg_pool2d"),
    "GroupNorm": (lambda: nn.GroupNorm(2, WIDTH), "group_norm"),
    "SELU in place": (
        lambda: nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH), nn.SELU(inplace=True)),
        "selu",
    ),
    "reflected padding": (lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, padding_mode="reflect"), "pad"),
    "padding same": (lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding="same"), "conv2d"),
    "a convolution without a mask": (lambda: Uncounted(WIDTH, WIDTH, 3, padding=1), "conv2d"),
    "norm without parameters": (lambda: nn.BatchNorm2d(WIDTH, affine=False), "batch_norm"),
    "square": (lambda: Function(lambda x: x * x), "mul"),
    "max pool that rounds up": (lambda: nn.MaxPool2d(2, ceil_mode=True), "max_pool2d"),
    "interpolation": (lambda: nn.Upsample(scale_factor=2), "interpolate"),
}
KNOWN: dict[str, Callable[[], nn.Module]] = {
    "norm without a convolution": lambda: nn.BatchNorm2d(WIDTH),
    "factors by channel": Scale,
    "maps side by side": lambda: nn.Sequential(
        Function(lambda x: torch.cat([x, x.relu()], 1)), nn.Conv2d(2 * WIDTH, WIDTH, 1)
    ),
    "a number added": lambda: Function(lambda x: x + 0.5),
    "numbers multiplied": lambda: Function(lambda x: 2 * (x * 0.5 + 1)),
    "GELU": nn.GELU,
    "LeakyReLU in place": lambda: nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.LeakyReLU(0.1, inplace=True)),
    "a convolution read by a norm and by others": TwoNorms,
    "a convolution with a scale and without": ScaledAndNot,
}


def network(middle: nn.Module) -> nn.Module:
    """Without biases of zero in a norm: a channel that nothing feeds would lie on the kink of what follows."""
    model = nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU(),
        middle,
        nn.Conv2d(WIDTH, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.bias)
    return model


def check(pair, images: Tensor) -> None:  # type: ignore[no-untyped-def]
    for training in (True, True, False):
        pair.train(training)
        errors = pair.step(images)
        assert max(errors.values()) < 1e-11, errors
    with torch.no_grad():
        assert (pair.arithmetic(images) - pair.dense(images)).norm() < 1e-11 * pair.dense(images).norm()


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_layer_is_exact_and_said_once(twins: type, name: str) -> None:
    build, function = UNKNOWN[name]
    torch.manual_seed(0)
    pair = twins(network(build()))
    check(pair, torch.randn(6, 3, 8, 8, dtype=torch.float64))
    assert len(pair.said) == 1
    assert f" {function} " in pair.said[0] and "densely" in pair.said[0]


def test_two_of_a_kind_are_said_once_and_two_kinds_twice(twins: type) -> None:
    torch.manual_seed(0)
    pair = twins(network(nn.Sequential(nn.Softplus(), nn.GroupNorm(2, WIDTH), nn.Softplus())))
    check(pair, torch.randn(6, 3, 8, 8, dtype=torch.float64))
    assert len(pair.said) == 2


@pytest.mark.parametrize("name", KNOWN)
def test_unusual_wiring_is_exact(twins: type, name: str) -> None:
    torch.manual_seed(0)
    pair = twins(network(KNOWN[name]()))
    check(pair, torch.randn(6, 3, 8, 8, dtype=torch.float64))
    assert pair.said == [], "a kernel is missing"


def with_dct() -> nn.Module:
    model = network(nn.Identity())
    offsets.install_dct(model)
    for module in model.modules():
        if hasattr(module, "alpha"):
            nn.init.normal_(module.weight, std=0.3)
    return model


def recovered() -> nn.Module:
    model = network(nn.Identity())
    offsets.recover(model, {name: torch.randn(len(model[int(name)].weight)) for name in ("0", "4", "9")})
    return model


@pytest.mark.parametrize("build", [with_dct, recovered], ids=lambda build: build.__name__)
def test_layers_with_an_offset_are_torchs_and_have_live_gradients(twins: type, build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    pair = twins(build())
    check(pair, torch.randn(6, 3, 8, 8, dtype=torch.float64))
    said = {line.split(" for ")[1].split()[0] for line in pair.said}
    assert said == {"adaptive_avg_pool2d", "add", "batch_norm", "conv2d", "linear", "relu"}
    assert all(live.gradient is not None and weight.grad is None for weight, live in pair.arithmetic.live.items())


NETWORKS = {"training": True, "evaluation": False}


@pytest.mark.parametrize("mode", NETWORKS)
def test_nan_in_an_image_reaches_the_loss(twins: type, mode: str) -> None:
    torch.manual_seed(0)
    for name, size in (("vgg16", 32), ("resnet34", 16), ("mobilenet_v2", 16)):
        pair = twins(models.build(name, 10, 0.25, size), torch.float32)
        pair.train(NETWORKS[mode])
        images = torch.randn(4, 3, size, size)
        assert functional.cross_entropy(pair.arithmetic(images), torch.arange(4)).isfinite()
        images[2, :, 5, 6] = float("nan")
        loss = functional.cross_entropy(pair.arithmetic(images), torch.arange(4))
        assert loss.isnan(), name
        loss.backward()
        assert all(
            parameter.grad.isnan().any()
            for name, parameter in pair.sparse.named_parameters()
            if name.endswith("bn1.weight")
        )


def test_nan_in_a_weight_reaches_the_loss(twins: type) -> None:
    torch.manual_seed(0)
    pair = twins(network(nn.Identity()), torch.float32)
    layer = pair.sparse[4]
    with torch.no_grad():
        layer.weight[layer.mask] = float("nan")
    assert pair.arithmetic(torch.randn(4, 3, 8, 8)).isnan().any(1).all()
