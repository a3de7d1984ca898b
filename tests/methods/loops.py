"""Networks of other people's making, and a plain training loop that looks at the masks after every step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import sparse_lab

CLASSES = 5
SIDE = 8


class Block(nn.Module):
    """A residual block, with ReLU modules that a surgery can find."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.second(self.relu1(self.norm1(self.first(x)))))
        return self.relu2(x + inner)


class ViT(nn.Module):
    """Patches of 4 x 4, two layers of torch's own encoder, a class token."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, (SIDE // 4) ** 2 + 1, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.places
        return self.head(self.encoder(tokens)[:, 0])


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, CLASSES),
    )  # fmt: skip


def residual() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Sequential(*(Block(8) for _ in range(4))),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 48), nn.ReLU(), nn.Linear(48, 24), nn.GELU(), nn.Linear(24, CLASSES)
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {"cnn": cnn, "mlp": mlp, "vit": ViT, "residual": residual}


def made(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETWORKS[name]()


def batches(number: int, size: int = 8, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, SIDE, SIDE, generator=source), torch.randint(0, CLASSES, (size,), generator=source))
        for _ in range(number)
    ]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda moved: torch.optim.SGD(moved, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda moved: torch.optim.SGD(moved, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda moved: torch.optim.Adam(moved, lr=3e-3, weight_decay=1e-3),
    "adamw": lambda moved: torch.optim.AdamW(moved, lr=3e-3, weight_decay=1e-2),
    "fused": lambda moved: torch.optim.AdamW(moved, lr=3e-3, weight_decay=1e-2, fused=True),
}


def train(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    accumulate: int = 1,
    precision: str = "fp32",
    skips: tuple[int, ...] = (),
    clip: float | None = None,
    first: int = 0,
    after: Callable[[int, bool], None] = lambda step, moved: None,
) -> None:
    """A loop of somebody's own, which knows nothing of masks. precision: fp32, bf16 (autocast) or scaled (GradScaler,
    whose steps at `skips` have infinite gradients). first: the number of the first step. after: told of each step, and
    whether the optimizer moved.
    """
    data = batches(accumulate * (first + steps))[accumulate * first :]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=precision == "scaled")
    context = torch.autocast("cpu", torch.bfloat16) if precision != "fp32" else nullcontext()
    for step in range(steps):
        optimizer.zero_grad()
        for images, labels in data[accumulate * step : accumulate * (step + 1)]:
            with context:
                loss = functional.cross_entropy(network(images), labels) / accumulate
            scaler.scale(loss).backward()
        if step in skips:
            next(one for one in network.parameters() if one.grad is not None).grad.fill_(torch.inf)
        if clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        after(step, step not in skips)


class Watch:
    """Looks after every step: what is alive lies in the masks, and the optimizer remembers nothing outside of them."""

    def __init__(self, handle: sparse_lab.Handle, optimizer: torch.optim.Optimizer) -> None:
        self.handle, self.optimizer = handle, optimizer
        self.kept: list[int] = []
        self.masks: list[dict[str, Tensor]] = []

    def __call__(self, step: int, moved: bool) -> None:
        masks = self.handle.masks
        for name, layer in masks.layers.items():
            outside = ~masks[name]
            state = self.optimizer.state.get(layer.weight, {}).values()
            for tensor in (layer.weight, *(one for one in state if getattr(one, "shape", None) == outside.shape)):
                assert not torch.count_nonzero(tensor[outside]), (step, name)
            assert masks[name].any(), (step, name)
        kept = masks.kept()
        assert sum(int((layer.weight != 0).sum()) for layer in masks.layers.values()) <= kept
        if not moved and self.masks:
            assert all(torch.equal(mask, self.masks[-1][name]) for name, mask in masks.masks().items()), step
        self.kept.append(kept)
        self.masks.append({name: mask.clone() for name, mask in masks.masks().items()})
