from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from sparse_lab import models
from sparse_lab.config import conf_dir
from sparse_lab.errors import UserError
from sparse_lab.models import build, names


def test_names_are_those_of_the_choices() -> None:
    assert names() == sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml"))
    assert {"vgg16", "resnet20", "wrn28_10", "densenet121", "vit", "mixer", "torchvision", "timm"} < set(names())
    assert models.build is build


def test_listing_the_names_and_refusing_a_bad_one_imports_no_torch() -> None:
    code = """
import sys
from sparse_lab.config import UserError
from sparse_lab.models import build, names
names()
try:
    build("vgg61")
except UserError:
    sys.exit(any(name.split(".")[0] in ("torch", "torchvision") for name in sys.modules))
sys.exit(2)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_name_brings_the_nearest_one_and_all() -> None:
    with pytest.raises(
        UserError, match=r"'resnet43'.*did you mean 'resnet34'\?.*mobilenet_v2, .*resnet34, resnet50, .*vgg16"
    ):
        build("resnet43")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_classes": 1}, "num_classes must be a whole number, 2 or more, not 1"),
        ({"num_classes": 0}, "not 0"),
        ({"num_classes": 10.0}, "not 10.0"),
        ({"num_classes": True}, "not True"),
        ({"width": 0.0}, "width must be above 0 and at most 4, not 0.0"),
        ({"width": -1.0}, "not -1.0"),
        ({"width": 4.1}, "not 4.1"),
        ({"width": float("nan")}, "width must be a number, not nan"),
        ({"width": float("inf")}, "not inf"),
        ({"width": "1"}, "not '1'"),
        ({"width": True}, "not True"),
        ({"image_size": 32.0}, "image_size must be a whole number of pixels, or height and width, not 32.0"),
        ({"image_size": True}, "not True"),
        ({"image_size": 28}, "vgg16 needs images of at least 32 pixels, not 28"),
        ({"image_size": 0}, "not 0"),
        ({"name": "resnet34", "image_size": 7}, "resnet34 needs images of at least 8 pixels, not 7"),
        ({"name": "mobilenet_v2", "image_size": 7}, "at least 8 pixels"),
    ],
)
def test_values_out_of_range_are_refused_in_one_line(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        build(**{"name": "vgg16", **arguments})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "image_size"),
    [("vgg16", 32), ("vgg16", 48), ("vgg16", 63), ("vgg16", 64), ("vgg16", 96)]
    + [(name, size) for name in ("resnet34", "resnet50", "mobilenet_v2") for size in (8, 28, 32, 63, 64, 75)],
)
def test_logits_have_one_value_per_image_and_class(name: str, image_size: int) -> None:
    network = build(name, num_classes=7, width=0.0625, image_size=image_size)
    logits = network(torch.randn(2, 3, image_size, image_size))
    assert logits.shape == (2, 7)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
