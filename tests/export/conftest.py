"""Networks whose answers depend on the image, at small width, with masks at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from sparse_lab.models import build
from sparse_lab.sparsity.masks import Masks

Make = Callable[..., tuple[nn.Module, Tensor]]


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Small layers on a shared machine: threads would wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make() -> Make:
    return _made


@torch.no_grad()
def _made(
    name: str, width: float, size: int, density: float, seed: int = 0, images: int = 5
) -> tuple[nn.Module, Tensor]:
    """A float64 network in evaluation mode with `density` of its weights, and images for it.

    BatchNorm's statistics are those of the images, disturbed; weights, shifts and biases are at random, so that a
    channel without inputs carries a constant that others see.
    """
    torch.manual_seed(seed)
    model = build(name, width=width, image_size=size).double()
    masks = Masks(model)
    masks.set({layer: torch.rand(weight.shape) < density for layer, weight in masks.weights().items()})
    shown = torch.randn(images, 3, size, size, dtype=torch.float64)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.momentum = 1.0
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            nn.init.normal_(module.bias, 0.0, 0.5)
    model.train()(shown)
    for norm in norms:
        norm.running_mean += 0.2 * torch.randn_like(norm.running_mean)
        norm.running_var.clamp_min_(1e-3).mul_(torch.empty_like(norm.running_var).uniform_(0.5, 1.5))
    return model.eval(), shown
