"""Networks whose answers depend on the image, at small width, with masks at random; and networks that are written as
people write them, or that libraries offer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

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


@pytest.fixture(scope="session")
def own() -> Callable[..., nn.Module]:
    """own(name, ...): a network with functional calls ("functional"), reshapes ("reshaped"), attention ("attends")."""
    return lambda name, **more: _OWN[name](**more)


@pytest.fixture(scope="session")
def library_network() -> Callable[[str, str], tuple[nn.Module, tuple[int, int, int]]]:
    """library_network("timm", arch): the network, and the shape of an image."""
    return lambda library, arch: {"timm": _timm, "torchvision": _torchvision}[library](arch)


@pytest.fixture(scope="session")
def masked() -> Callable[..., nn.Module]:
    return _masked


class Functional(nn.Module):
    """F.relu, torch.relu, x.relu() and one nn.ReLU used twice, in place and not; a sum with itself changed later."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.third = nn.Conv2d(8, 8, 1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.first(x)), inplace=True)
        y = self.act(self.second(x))
        y += x
        x = torch.relu(self.third(y)) + y
        x = functional.max_pool2d(self.act(x), 2).relu()
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Reshaped(nn.Module):
    """chunk, cat, permute, reshape, channel shuffle, a mean, hard-swish and squeeze-and-excite."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 12, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.right = nn.Conv2d(6, 6, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.tokens = nn.Linear(12, 10)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.hardswish(self.norm(self.stem(x)))
        left, right = x.chunk(2, dim=1)
        x = torch.cat([left, self.right(right)], dim=1)
        count, channels, height, width = x.shape
        x = x.view(count, 2, channels // 2, height, width).transpose(1, 2).reshape(count, channels, height, width)
        x = x * torch.sigmoid(self.excite(functional.silu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = functional.gelu(self.tokens(x.permute(0, 2, 3, 1)))
        return self.head(x.reshape(count, -1, 10).mean(1))


class Attends(nn.Module):
    """A class token, positions, torch's own attention, LayerNorm, and an attention mask made as it goes."""

    def __init__(self, channels: int = 3, size: tuple[int, int] = (16, 16)) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, 16, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.places = nn.Parameter(torch.randn(1, 1 + size[0] * size[1] // 16, 16))
        self.norm, self.after = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        mask = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        mask[1:, 0] = -1.0
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False, attn_mask=mask.to(x.dtype))[0]
        x = x + self.down(functional.gelu(self.up(self.after(x))))
        return self.head(x[:, 0])


_OWN: dict[str, Callable[..., nn.Module]] = {"functional": Functional, "reshaped": Reshaped, "attends": Attends}

_LARGE = 64  # of 32 pixels, nets with narrow depthwise layers leave one, most of whose kernels see padding alone
_SMALL = (
    "resnet18",
    "vit_b_16",
    "convnext_tiny",
    "vit_tiny_patch16_224",
    "mixer_s16_224",
    "swin_tiny_patch4_window7_224",
)


_TIMM: dict[str, dict[str, object]] = {
    "resnet18": {}, "convnext_atto": {}, "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 4},
    "mixer_s16_224": {"img_size": 32}, "efficientnet_b0": {}, "mobilenetv3_small_100": {},
    "swin_tiny_patch4_window7_224": {"img_size": 32, "window_size": 2},
}  # fmt: skip


def _torchvision(arch: str) -> tuple[nn.Module, tuple[int, int, int]]:
    torchvision = pytest.importorskip("torchvision")

    size = 32 if arch in _SMALL else _LARGE
    more = {"googlenet": {"aux_logits": False, "init_weights": False}, "vit_b_16": {"image_size": 32}}.get(arch, {})
    return getattr(torchvision.models, arch)(num_classes=10, **more), (3, size, size)


def _timm(arch: str) -> tuple[nn.Module, tuple[int, int, int]]:
    timm = pytest.importorskip("timm")
    size = 32 if arch in _SMALL else _LARGE

    return timm.create_model(arch, num_classes=10, **_TIMM[arch]), (3, size, size)


@torch.no_grad()
def _masked(model: nn.Module, shape: tuple[int, ...], density: float) -> nn.Module:
    """Random weights on random masks, three an output at least, or narrow layers cut the network. BatchNorm has the
    statistics of random images.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            chance = torch.rand_like(module.weight).flatten(1)
            kept = chance < density
            kept.scatter_(1, chance.argsort(1)[:, :3], True)
            spread = kept.sum(1, keepdim=True) ** -0.5
            module.weight.copy_((torch.randn_like(chance) * kept * spread).view_as(module.weight))
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.momentum = 1.0
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            nn.init.normal_(module.bias, 0.0, 0.5)
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        model.train()(torch.randn(16, *shape))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.clamp_min_(1e-2)
    return model.eval()
