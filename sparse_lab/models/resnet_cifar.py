"""Small residual networks for small images: ResNet-20, 32 and 56 (He et al., CVPR 2016, section 4.2), and the ResNet-8
of MLPerf Tiny (Banbury et al., NeurIPS 2021). They are the same for images of any size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from sparse_lab.models.initialisation import initialise
from sparse_lab.models.spec import Spec
from sparse_lab.models.width import scaled

STAGES = ((16, 1), (32, 2), (64, 2))  # channels, stride of the first block

Shortcut = Callable[[int, int, int], nn.Module]


class PaddedShortcut(nn.Module):
    """Every second pixel, and zeros for the channels that are more (the paper's option A): it has no weights."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, more = stride, outputs - inputs
        self.before, self.after = more // 2, more - more // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut: (N, inputs, H, W) -> (N, outputs, H/stride, W/stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut, bias: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.downsample = nn.Identity() if (inputs, stride) == (outputs, 1) else shortcut(inputs, outputs, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.relu1(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        return self.relu2(branch + self.downsample(x))


class SmallResNet(nn.Module):
    """A 3x3 stem, three stages of equally many blocks, global average pool and a linear classifier."""

    def __init__(self, spec: Spec, blocks: int, shortcut: Shortcut, bias: bool) -> None:
        super().__init__()
        inputs = scaled(STAGES[0][0], spec.width)
        self.conv1 = nn.Conv2d(spec.channels, inputs, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        stages = []
        for channels, stride in STAGES:
            outputs = scaled(channels, spec.width)
            first = Block(inputs, outputs, stride, shortcut, bias)
            rest = (Block(outputs, outputs, 1, shortcut, bias) for _ in range(blocks - 1))
            stages.append(nn.Sequential(first, *rest))
            inputs = outputs
        self.layer1, self.layer2, self.layer3 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, spec.num_classes)
        initialise(self, linear_std=None)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) to logits (N, num_classes)."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet20(spec: Spec) -> SmallResNet:
    """ResNet-20: three blocks a stage, shortcuts without weights."""
    return SmallResNet(spec, 3, PaddedShortcut, bias=False)


def resnet32(spec: Spec) -> SmallResNet:
    """ResNet-32: five blocks a stage, shortcuts without weights."""
    return SmallResNet(spec, 5, PaddedShortcut, bias=False)


def resnet56(spec: Spec) -> SmallResNet:
    """ResNet-56: nine blocks a stage, shortcuts without weights."""
    return SmallResNet(spec, 9, PaddedShortcut, bias=False)


def resnet8(spec: Spec) -> SmallResNet:
    """MLPerf Tiny's network for image classification: one block a stage, convolutions with biases, 1x1 convolutions
    without BatchNorm as shortcuts.
    """
    return SmallResNet(spec, 1, lambda inputs, outputs, stride: nn.Conv2d(inputs, outputs, 1, stride=stride), bias=True)
