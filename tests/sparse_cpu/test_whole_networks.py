"""Whole networks in float64 against dense masked torch: two training steps, a new mask between them, evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from sparse_lab import models
from sparse_lab.models import dyrelu, weight_sharing

BOUND = 1e-10


@dataclass(frozen=True)
class Case:
    name: str
    size: int
    images: int
    width: float = 0.125
    sharing: bool = False
    beta: float | None = None  # of dynamic ReLU
    density: float = 0.2

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        model = models.build(self.name, 10, self.width, self.size)
        if self.sharing:
            weight_sharing.share(model)
        if self.beta is not None:
            dyrelu.install(model, self.size)
            dyrelu.fade(model, self.beta)
        return model


CASES = {
    "vgg16, odd size, prime batch": Case("vgg16", 37, 7),
    "vgg16, DyReLU half faded": Case("vgg16", 32, 8, beta=0.5),
    "resnet34": Case("resnet34", 16, 12),
    "resnet34, very sparse": Case("resnet34", 16, 12, width=0.25, density=0.08),
    "resnet34, DyReLU and sharing": Case("resnet34", 17, 10, sharing=True, beta=1.0),
    "resnet34 for ImageNet": Case("resnet34", 65, 4),
    "resnet50, sharing": Case("resnet50", 17, 7, sharing=True),
}
MORE = {
    "vgg16": Case("vgg16", 32, 12),
    "vgg16, DyReLU": Case("vgg16", 33, 6, beta=1.0),
    "resnet34, odd size, prime batch": Case("resnet34", 19, 11),
    "resnet34, sharing": Case("resnet34", 15, 10, sharing=True),
    "resnet34, DyReLU": Case("resnet34", 16, 9, beta=1.0),
    "resnet34, DyReLU half faded, sharing": Case("resnet34", 16, 8, sharing=True, beta=0.5),
    "resnet50": Case("resnet50", 16, 8),
    "mobilenet_v2": Case("mobilenet_v2", 16, 12, width=0.25, density=0.25),
    "mobilenet_v2, odd size, prime batch": Case("mobilenet_v2", 15, 11, width=0.25, density=0.25),
    "resnet34, very sparse, wider": Case("resnet34", 16, 24, width=0.5, density=0.08),
    "mobilenet_v2, wider": Case("mobilenet_v2", 32, 24, width=0.5, density=0.25),
    "mobilenet_v2, wider, odd size, prime batch": Case("mobilenet_v2", 29, 23, width=0.5, density=0.25),
    "vgg16 for ImageNet": Case("vgg16", 224, 2, width=0.0625),
    "resnet50 for ImageNet": Case("resnet50", 224, 2),
    "mobilenet_v2 for ImageNet": Case("mobilenet_v2", 224, 3, width=0.25),
    "resnet34, wide": Case("resnet34", 32, 32, width=0.5, sharing=True, beta=0.5),
    "vgg16, wide": Case("vgg16", 32, 64, width=0.5),
}


def regrow(pair, density: float, seed: int) -> None:  # type: ignore[no-untyped-def]
    """New masks, and new numbers where they let something grow.

    Zeros would cut most images off: gradients of 1e9 behind norms of nothing, in which torch's layouts disagree too.
    """
    pair.draw(density, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in pair.masks[0].weights().items():
        grown = pair.masks[0][name] & (weight == 0)
        start = torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * weight.std() * grown
        with torch.no_grad():
            for masks in pair.masks:
                masks.weights()[name].add_(start)


def check(pair, case: Case) -> None:  # type: ignore[no-untyped-def]
    for seed, dense_gradients in ((1, False), (2, True)):
        pair.arithmetic.dense_gradients = dense_gradients
        images = torch.randn(case.images, 3, case.size, case.size, generator=torch.Generator().manual_seed(seed))
        errors = pair.step(images, seed)
        assert len(errors) > len(list(pair.dense.parameters()))
        assert max(errors.values()) < BOUND, {name: error for name, error in errors.items() if not error < BOUND}
        for weight in pair.arithmetic.live:
            assert (weight.grad is not None) == dense_gradients
        pair.descend()
        regrow(pair, case.density * 0.9, seed)
    assert pair.said == [], "a kernel is missing"
    pair.train(False)
    with torch.no_grad():
        wanted, got = pair.dense(images.double()), pair.arithmetic(images.double())
    assert wanted.norm() > 0
    assert (got - wanted).norm() < BOUND * wanted.norm()
    assert torch.equal(got.argmax(1), wanted.argmax(1))


@pytest.mark.every(2)
@pytest.mark.parametrize("name", CASES)
def test_a_network_computes_what_dense_masked_torch_computes(twins: type, name: str) -> None:
    check(twins(CASES[name].build(), density=CASES[name].density), CASES[name])


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.nightly if name.endswith(" wide") else pytest.mark.full) for name in MORE],
)
def test_more_networks_compute_what_dense_masked_torch_computes(twins: type, name: str) -> None:
    check(twins(MORE[name].build(), density=MORE[name].density), MORE[name])
