"""Wide residual networks (Zagoruyko & Komodakis, BMVC 2016) for small images: WRN-22-2 and WRN-28-10, no dropout."""

from __future__ import annotations

import torch
from torch import nn

from sparse_lab.models.initialisation import initialise
from sparse_lab.models.spec import Spec
from sparse_lab.models.width import scaled

STEM = 16
STAGES = ((16, 1), (32, 2), (64, 2))  # channels before widening, stride of the first block


class Block(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions: (N, inputs, H, W) -> (N, outputs, H/stride, W/stride).

    Where the number of channels changes, the shortcut is a 1x1 convolution behind the first ReLU.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = inputs == outputs and stride == 1
        self.downsample = None if same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = self.relu1(self.bn1(x))
        branch = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return branch + (x if self.downsample is None else self.downsample(active))


class WideResNet(nn.Module):
    """A 3x3 stem, three stages of `blocks` blocks each `widening` times as wide as a ResNet's, BatchNorm, ReLU, global
    average pool and a linear classifier.
    """

    def __init__(self, spec: Spec, blocks: int, widening: int) -> None:
        super().__init__()
        inputs = scaled(STEM, spec.width)
        self.conv1 = nn.Conv2d(spec.channels, inputs, 3, padding=1, bias=False)
        stages = []
        for channels, stride in STAGES:
            outputs = scaled(channels * widening, spec.width)
            first = Block(inputs, outputs, stride)
            stages.append(nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1))))
            inputs = outputs
        self.layer1, self.layer2, self.layer3 = stages
        self.bn = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, spec.num_classes)
        initialise(self, linear_std=None)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) to logits (N, num_classes)."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        return self.fc(torch.flatten(self.avgpool(self.relu(self.bn(x))), 1))


def wrn22_2(spec: Spec) -> WideResNet:
    """WRN-22-2: three blocks a stage, twice as wide."""
    return WideResNet(spec, 3, 2)


def wrn28_10(spec: Spec) -> WideResNet:
    """WRN-28-10: four blocks a stage, ten times as wide."""
    return WideResNet(spec, 4, 10)
