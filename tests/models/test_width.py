from __future__ import annotations

import pytest
import torch
import torchvision

from sparse_lab.models import build
from sparse_lab.models.width import scaled, scaled_to_eights


def test_scaled_channels_are_whole_and_never_none() -> None:
    assert [scaled(64, width) for width in (1.0, 0.5, 0.3, 0.001, 1.5)] == [64, 32, 19, 1, 96]


def test_eights_are_never_more_than_a_tenth_too_small() -> None:
    # 24 * 0.5 = 12 lies between 8 and 16; 18 is nearest to 16, which would lose 11%, so 24
    assert [scaled_to_eights(*pair) for pair in ((32, 1.0), (24, 0.5), (24, 0.75), (16, 0.1))] == [32, 16, 24, 8]


@pytest.mark.every(3)
@pytest.mark.parametrize("width", [0.1, 0.25, 0.35, 0.5, 0.75, 1.0, 1.3, 1.4, 2.0])
@pytest.mark.parametrize("image_size", [32, 224])
def test_mobilenet_has_torchvisions_channels_at_every_width(width: float, image_size: int) -> None:
    with torch.device("meta"):
        ours = build("mobilenet_v2", 1000, width, image_size).state_dict()
        theirs = torchvision.models.mobilenet_v2(width_mult=width).state_dict()
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: tensor.shape for key, tensor in theirs.items()}
