"""A network and a data set of one's own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import sparse_lab
from sparse_lab.config import DatasetConfig

sparse_lab.register_choices(Path(__file__).with_name("conf"))


@sparse_lab.register_model(smallest=8)
def small_cnn(num_classes: int, width: float, image_size: int) -> nn.Module:
    """Three convolutions and a classifier."""
    channels = [max(4, round(width * wide)) for wide in (32, 64, 128)]
    layers: list[nn.Module] = []
    for before, after in zip([3, *channels], channels, strict=False):
        layers += [
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], num_classes))


def stripes(dataset: DatasetConfig, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy stripes; the class is how they lean. 1,200 to train with and 300 to test with, the same for any seed."""
    drawn = torch.Generator().manual_seed(0)
    labels = torch.arange(1500) % dataset.num_classes
    angle = (labels * torch.pi / dataset.num_classes).view(-1, 1, 1)
    place = torch.arange(dataset.image_size, dtype=torch.float32)
    along = place.view(1, 1, -1) * angle.cos() + place.view(1, -1, 1) * angle.sin()
    phase = 2 * torch.pi * torch.rand(1500, 1, 1, generator=drawn)
    grey = 128 + 80 * (along + phase).sin() + 30 * torch.randn(along.shape, generator=drawn)
    images = grey.clamp(0, 255).to(torch.uint8).unsqueeze(1).repeat(1, 3, 1, 1)
    return images[:1200], labels[:1200], images[1200:], labels[1200:]


sparse_lab.register_dataset("stripes", stripes, files=None)  # drawn: nothing is read from below dataset.root
