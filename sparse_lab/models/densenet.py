"""DenseNet-121 (Huang et al., CVPR 2017), for small images and for ImageNet; parameter names as in torchvision."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from sparse_lab.models.initialisation import initialise
from sparse_lab.models.spec import Spec
from sparse_lab.models.width import scaled

BLOCKS = (6, 12, 24, 16)  # layers of each dense block
STEM = 64
GROWTH = 32  # channels that a layer adds
BOTTLENECK = 4  # channels between its two convolutions, in growths


class DenseLayer(nn.Module):
    """BatchNorm, ReLU and a 1x1 convolution, then a 3x3 one: (N, inputs, H, W) -> (N, inputs + growth, H, W)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, BOTTLENECK * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(BOTTLENECK * growth)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(BOTTLENECK * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        new = self.conv1(self.relu1(self.norm1(x)))
        return torch.cat([x, self.conv2(self.relu2(self.norm2(new)))], 1)


class DenseNet(nn.Module):
    """A stem, four dense blocks with transitions that halve channels and sides between them, and a linear classifier.

    The ImageNet variant has a 7x7 stem of stride 2 and a max-pool, the one for small images a 3x3 stem of stride 1.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        inputs, growth = scaled(STEM, spec.width), scaled(GROWTH, spec.width)
        kernel, stride = (7, 2) if spec.imagenet else (3, 1)
        features: OrderedDict[str, nn.Module] = OrderedDict()
        features["conv0"] = nn.Conv2d(spec.channels, inputs, kernel, stride=stride, padding=kernel // 2, bias=False)
        features["norm0"] = nn.BatchNorm2d(inputs)
        features["relu0"] = nn.ReLU()
        features["pool0"] = nn.MaxPool2d(3, stride=2, padding=1) if spec.imagenet else nn.Identity()
        for number, layers in enumerate(BLOCKS, start=1):
            block = {f"denselayer{one + 1}": DenseLayer(inputs + one * growth, growth) for one in range(layers)}
            features[f"denseblock{number}"] = nn.Sequential(OrderedDict(block))
            inputs += layers * growth
            if number < len(BLOCKS):
                features[f"transition{number}"] = _transition(inputs)
                inputs //= 2
        features["norm5"] = nn.BatchNorm2d(inputs)
        features["relu5"] = nn.ReLU()
        self.features = nn.Sequential(features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(inputs, spec.num_classes)
        initialise(self, linear_std=None)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) to logits (N, num_classes)."""
        return self.classifier(torch.flatten(self.avgpool(self.features(images)), 1))


def _transition(inputs: int) -> nn.Sequential:
    parts: list[tuple[str, nn.Module]] = [
        ("norm", nn.BatchNorm2d(inputs)),
        ("relu", nn.ReLU()),
        ("conv", nn.Conv2d(inputs, inputs // 2, 1, bias=False)),
        ("pool", nn.AvgPool2d(2)),
    ]
    return nn.Sequential(OrderedDict(parts))


def densenet121(spec: Spec) -> DenseNet:
    """DenseNet-121."""
    return DenseNet(spec)
