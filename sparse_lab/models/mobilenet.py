"""MobileNetV2 (Sandler et al., CVPR 2018), for small images and for ImageNet."""

from __future__ import annotations

import torch
from torch import nn

from sparse_lab.models.initialisation import initialise
from sparse_lab.models.spec import Spec
from sparse_lab.models.width import scaled_to_eights

STEM = 32
LAST = 1280
# expansion, channels, blocks, stride of the first block (table 2 of the paper)
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
FIRST_DOWNSAMPLING = 1  # index into STAGES


class InvertedResidual(nn.Module):
    """1x1 expansion (left out where it is 1), 3x3 depthwise, 1x1 linear: (N, inputs, H, W) -> (N, outputs, H/s, W/s).

    The input is added to the output where the two have the same shape.
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = inputs * expansion
        expand = [] if expansion == 1 else [_conv_bn_relu6(inputs, inner, kernel=1)]
        self.conv = nn.Sequential(
            *expand,
            _conv_bn_relu6(inner, inner, kernel=3, stride=stride, groups=inner),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """Stem, 17 inverted residuals, a 1x1 convolution, global average pool and a linear classifier behind dropout 0.2.

    Parameter names as in torchvision. imagenet=False: the stem and the first down-sampling stage have stride 1.
    Channel counts are multiples of 8; below width 1 the last convolution keeps its 1280 channels (section 6.1 of the
    paper).
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        width, imagenet = spec.width, spec.imagenet
        inputs = scaled_to_eights(STEM, width)
        features: list[nn.Module] = [_conv_bn_relu6(spec.channels, inputs, kernel=3, stride=2 if imagenet else 1)]
        for index, (expansion, channels, blocks, first_stride) in enumerate(STAGES):
            outputs = scaled_to_eights(channels, width)
            for block in range(blocks):
                full_size = block > 0 or (index == FIRST_DOWNSAMPLING and not imagenet)
                features.append(InvertedResidual(inputs, outputs, expansion, 1 if full_size else first_stride))
                inputs = outputs
        last = scaled_to_eights(LAST, max(1.0, width))
        features.append(_conv_bn_relu6(inputs, last, kernel=1))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, spec.num_classes))
        initialise(self, linear_std=0.01)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) to logits (N, num_classes)."""
        return self.classifier(torch.flatten(self.avgpool(self.features(images)), 1))


def mobilenet_v2(spec: Spec) -> MobileNetV2:
    """MobileNetV2 with the width as its width multiplier."""
    return MobileNetV2(spec)


def _conv_bn_relu6(inputs: int, outputs: int, *, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    )
