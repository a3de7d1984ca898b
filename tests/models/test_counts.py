"""Every network of the package has as many parameters as its paper, or the library that others count by, says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparse_lab.models import build
from sparse_lab.sparsity.flops import layer_costs

# name -> what is asked for, parameters, and where the number stands
COUNTS: list[tuple[str, dict[str, Any], int, str]] = [
    ("resnet20", {}, 269_722, "He et al., table 6: 0.27M"),
    ("resnet32", {}, 464_154, "He et al., table 6: 0.46M"),
    ("resnet56", {}, 853_018, "He et al., table 6: 0.85M"),
    # Keras' count of MLPerf Tiny's network, 78,666, less the 480 running statistics that Keras counts
    ("resnet8", {}, 78_666 - 480, "Banbury et al.: 78,666"),
    ("wrn28_10", {}, 36_479_194, "Zagoruyko & Komodakis, table 4: 36.5M"),
    ("wrn28_10", {"num_classes": 100}, 36_536_884, "the authors' code, CIFAR-100"),
    ("wrn22_2", {}, 1_079_642, "RigL's WRN-22-2: 1.08M"),
    ("vgg19", {}, 20_040_522, "GraSP, table: 20.04M"),
    ("vgg19", {"num_classes": 1000, "image_size": 224}, 143_678_248, "torchvision's vgg19_bn"),
    ("resnet18", {"num_classes": 1000, "image_size": 224}, 11_689_512, "torchvision's resnet18"),
    ("densenet121", {"num_classes": 1000, "image_size": 224}, 7_978_856, "torchvision's densenet121"),
    # the stem's 7x7 convolution becomes 3x3, and 990 classes go
    ("densenet121", {}, 7_978_856 - 64 * 3 * 40 - 990 * 1025, "the same with a 3x3 stem and ten classes: 6.96M"),
    ("vit", {"num_classes": 1000, "image_size": 224, "options": {"patch_size": 16, "depth": 12}}, 5_717_416, "DeiT-Ti"),
    (
        "mixer",
        {"num_classes": 1000, "image_size": 224, "options": {"patch_size": 16, "dim": 512, "depth": 8}},
        18_528_264,
        "Tolstikhin et al., table 1: 18M (Mixer-S/16)",
    ),
]


@pytest.mark.parametrize(("name", "asked", "count", "source"), COUNTS, ids=[f"{one[0]}-{one[3]}" for one in COUNTS])
def test_parameters(name: str, asked: dict[str, Any], count: int, source: str) -> None:
    with torch.device("meta"):
        network = build(name, **asked)
    assert sum(parameter.numel() for parameter in network.parameters()) == count, source


@pytest.mark.parametrize(
    ("name", "millions", "source"),
    [
        ("resnet20", 40.55, "41M, as others count it"),
        ("resnet8", 12.5, "MLPerf Tiny: 12.5M"),
        ("wrn28_10", 5_250, "5.25 billion (Zagoruyko's code)"),
    ],
)
def test_multiply_adds(name: str, millions: float, source: str) -> None:
    with torch.device("meta"):
        total = sum(cost.macs for cost in layer_costs(build(name), 32))
    assert total / 1e6 == pytest.approx(millions, rel=0.01), source


@pytest.mark.parametrize("name", sorted({one[0] for one in COUNTS}))
@pytest.mark.parametrize(("channels", "size"), [(1, (32, 48)), (3, 32)])
def test_logits_of_any_channels_and_shape(name: str, channels: int, size: Any) -> None:
    with torch.device("meta"):
        network = build(name, num_classes=3, channels=channels, image_size=size)
        height, width = (size, size) if isinstance(size, int) else size
        assert network(torch.randn(2, channels, height, width)).shape == (2, 3)


def test_a_state_dict_of_torchvisions_densenet_fits() -> None:
    from torchvision.models import densenet121

    torch.manual_seed(0)
    theirs = densenet121(num_classes=4).eval()
    ours = build("densenet121", 4, image_size=64).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), atol=1e-5)
