"""VGG16 with batch normalisation (Simonyan & Zisserman, ICLR 2015), for small images and for ImageNet."""

from __future__ import annotations

import torch
from torch import nn

from sparse_lab.models.initialisation import initialise
from sparse_lab.models.width import scaled

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions; a max-pool ends each
IMAGENET_POOL = 7
HIDDEN = 4096


class VGG(nn.Module):
    """`features` (N, 3, H, W) -> `avgpool` -> flattened -> `classifier` -> logits (N, classes)."""

    def __init__(self, features: nn.Sequential, avgpool: nn.Module, classifier: nn.Sequential) -> None:
        super().__init__()
        self.features = features
        self.avgpool = avgpool
        self.classifier = classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(images)), 1))


def vgg16(num_classes: int, width: float, imagenet: bool) -> VGG:
    """VGG16: 13 3x3 convolutions with bias, each with BatchNorm and ReLU, and 5 max-pools.

    imagenet=False: images of 32 to 63 pixels, one Linear(512, num_classes) on the 1x1 map that the pools leave.
    imagenet=True: average pool to 7x7 and three linear layers with dropout 0.5, named as in torchvision's vgg16_bn.
    """
    last = scaled(STAGES[-1][0], width)
    if imagenet:
        avgpool: nn.Module = nn.AdaptiveAvgPool2d(IMAGENET_POOL)
        classifier = _imagenet_classifier(last * IMAGENET_POOL**2, scaled(HIDDEN, width), num_classes)
    else:
        avgpool = nn.Identity()
        classifier = nn.Sequential(nn.Linear(last, num_classes))
    network = VGG(_features(width), avgpool, classifier)
    initialise(network, linear_std=0.01)
    return network


def _features(width: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    inputs = 3
    for channels, convolutions in STAGES:
        outputs = scaled(channels, width)
        for _ in range(convolutions):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def _imagenet_classifier(inputs: int, hidden: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(hidden, num_classes),
    )
