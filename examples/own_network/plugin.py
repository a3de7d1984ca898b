"""A network and a data set of one's own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import sparse_lab
from sparse_lab.config import DatasetConfig

sparse_lab.register_choices(Path(__file__).with_name("conf"))


@sparse_lab.register_model(smallest=8)
def small_cnn(num_classes: int, channels: int, width: float, *, depth: int = 3) -> nn.Module:
    """So many convolutions (`model.options.depth`), each twice as wide as the one before, and a classifier."""
    widths = [max(4, round(width * 32 * 2**number)) for number in range(depth)]
    layers: list[nn.Module] = []
    for before, after in zip([channels, *widths], widths, strict=False):
        layers += [
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))


def stripes(dataset: DatasetConfig, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy stripes; the class is how they lean. 1,200 to train with and 300 to test with, the same for any seed."""
    drawn = torch.Generator().manual_seed(0)
    channels, height, width = dataset.shape
    labels = torch.arange(1500) % dataset.classes
    angle = (labels * torch.pi / dataset.classes).view(-1, 1, 1)
    across, down = (torch.arange(side, dtype=torch.float32) for side in (width, height))
    along = across.view(1, 1, -1) * angle.cos() + down.view(1, -1, 1) * angle.sin()
    phase = 2 * torch.pi * torch.rand(1500, 1, 1, generator=drawn)
    grey = 128 + 80 * (along + phase).sin() + 30 * torch.randn(along.shape, generator=drawn)
    images = grey.clamp(0, 255).to(torch.uint8).unsqueeze(1).repeat(1, channels, 1, 1)
    return images[:1200], labels[:1200], images[1200:], labels[1200:]


sparse_lab.register_dataset("stripes", stripes, files=None)  # drawn: nothing is read from below dataset.root
