"""VGG16 and VGG19 with batch normalisation (Simonyan & Zisserman, ICLR 2015), for small images and for ImageNet."""

from __future__ import annotations

import torch
from torch import nn

from sparse_lab.errors import UserError
from sparse_lab.models.initialisation import initialise
from sparse_lab.models.spec import Spec
from sparse_lab.models.width import scaled

STAGES = (64, 128, 256, 512, 512)  # channels; a max-pool ends each
IMAGENET_POOL = 7
HIDDEN = 4096


class VGG(nn.Module):
    """`features` (N, C, H, W) -> `avgpool` -> flattened -> `classifier` -> logits (N, classes)."""

    def __init__(self, features: nn.Sequential, avgpool: nn.Module, classifier: nn.Sequential) -> None:
        super().__init__()
        self.features = features
        self.avgpool = avgpool
        self.classifier = classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(images)), 1))


def vgg16(spec: Spec) -> VGG:
    """VGG16: 13 3x3 convolutions, otherwise as `_vgg`."""
    return _vgg((2, 2, 3, 3, 3), spec)


def vgg19(spec: Spec) -> VGG:
    """VGG19: 16 3x3 convolutions, otherwise as `_vgg`."""
    return _vgg((2, 2, 4, 4, 4), spec)


def _vgg(convolutions: tuple[int, ...], spec: Spec) -> VGG:
    """So many 3x3 convolutions a stage, with bias, each with BatchNorm and ReLU, and 5 max-pools.

    Images below 64 pixels: a linear layer on what the pools leave, 1x1 of 32 to 63 pixels. From 64 up: average pool to
    7x7 and three linear layers with dropout 0.5, named as in torchvision's vgg16_bn.
    """
    if spec.adapt_stem:
        raise UserError(f"model.adapt_stem: {spec.name} begins with a convolution of stride 1 as it is; leave it out")
    last = scaled(STAGES[-1], spec.width)
    if spec.imagenet:
        avgpool: nn.Module = nn.AdaptiveAvgPool2d(IMAGENET_POOL)
        classifier = _imagenet_classifier(last * IMAGENET_POOL**2, scaled(HIDDEN, spec.width), spec.num_classes)
    else:
        avgpool = nn.Identity()
        height, width = (side // 2 ** len(STAGES) for side in spec.image_size)
        classifier = nn.Sequential(nn.Linear(last * height * width, spec.num_classes))
    network = VGG(_features(convolutions, spec), avgpool, classifier)
    initialise(network, linear_std=0.01)
    return network


def _features(convolutions: tuple[int, ...], spec: Spec) -> nn.Sequential:
    layers: list[nn.Module] = []
    inputs = spec.channels
    for channels, count in zip(STAGES, convolutions, strict=True):
        outputs = scaled(channels, spec.width)
        for _ in range(count):
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
