"""ResNet-18, 34 and 50 (He et al., CVPR 2016), for small images and for ImageNet."""

from __future__ import annotations

import torch
from torch import nn

from sparse_lab.models.initialisation import initialise
from sparse_lab.models.spec import Spec
from sparse_lab.models.width import scaled

STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))  # channels, stride of the first block


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: (N, inputs, H, W) -> (N, outputs, H/stride, W/stride)."""

    EXPANSION = 1

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(inner, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.relu1(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        return self.relu2(branch + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut: (N, inputs, H, W) -> (N, outputs, H/stride, W/stride).

    The stride is on the 3x3 convolution (the "v1.5" of torchvision), not on the first 1x1 as in the paper.
    """

    EXPANSION = 4

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu3 = nn.ReLU()
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.relu1(self.bn1(self.conv1(x)))
        branch = self.relu2(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        return self.relu3(branch + self.downsample(x))


class ResNet(nn.Module):
    """A stem, four stages of blocks, global average pool and a linear classifier; parameter names as in torchvision.

    imagenet=False: 3x3 stride-1 stem, no max-pool, classifier without bias. imagenet=True: 7x7 stride-2 stem, max-pool,
    classifier with bias.
    """

    def __init__(self, block: type[BasicBlock | Bottleneck], blocks: tuple[int, int, int, int], spec: Spec) -> None:
        super().__init__()
        width, imagenet = spec.width, spec.imagenet
        stem = scaled(64, width)
        if imagenet:
            self.conv1 = nn.Conv2d(spec.channels, stem, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(spec.channels, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if imagenet else nn.Identity()
        stages = []
        inputs = stem
        for (channels, stride), count in zip(STAGES, blocks, strict=True):
            inner, outputs = scaled(channels, width), scaled(channels * block.EXPANSION, width)
            first = block(inputs, inner, outputs, stride)
            stages.append(nn.Sequential(first, *(block(outputs, inner, outputs, 1) for _ in range(count - 1))))
            inputs = outputs
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, spec.num_classes, bias=imagenet)
        initialise(self, linear_std=None)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) to logits (N, num_classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(spec: Spec) -> ResNet:
    """ResNet-18: 2, 2, 2 and 2 basic blocks."""
    return ResNet(BasicBlock, (2, 2, 2, 2), spec)


def resnet34(spec: Spec) -> ResNet:
    """ResNet-34: 3, 4, 6 and 3 basic blocks."""
    return ResNet(BasicBlock, (3, 4, 6, 3), spec)


def resnet50(spec: Spec) -> ResNet:
    """ResNet-50: 3, 4, 6 and 3 bottlenecks."""
    return ResNet(Bottleneck, (3, 4, 6, 3), spec)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
