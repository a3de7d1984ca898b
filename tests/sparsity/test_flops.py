"""Multiply-adds against the paper's number, torchvision's own figures and counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models as torchvision_models

from sparse_lab.models import build
from sparse_lab.sparsity.flops import OTHER, LayerCost, derived_layers, layer_costs
from sparse_lab.sparsity.masks import Masks

OFFICIAL = {
    "vgg16": torchvision_models.VGG16_BN_Weights,
    "resnet34": torchvision_models.ResNet34_Weights,
    "resnet50": torchvision_models.ResNet50_Weights,
    "mobilenet_v2": torchvision_models.MobileNet_V2_Weights,
}


def test_vgg16_needs_313_million_multiply_adds() -> None:
    with torch.device("meta"):
        costs = layer_costs(build("vgg16"), 32)
    # inputs, outputs, side of the map
    convs = [(3, 64, 32), (64, 64, 32), (64, 128, 16), (128, 128, 16), (128, 256, 8), (256, 256, 8), (256, 256, 8)]
    convs += [(256, 512, 4), (512, 512, 4), (512, 512, 4), *[(512, 512, 2)] * 3]
    assert [cost.macs for cost in costs] == [*(i * o * 9 * side**2 for i, o, side in convs), 5120]
    assert sum(cost.macs for cost in costs) == pytest.approx(313.2e6, abs=0.05e6)
    assert all(cost.sparse_macs == cost.macs and cost.kept == cost.total for cost in costs)


@pytest.mark.parametrize("name", OFFICIAL)
def test_imagenet_networks_need_what_torchvision_says(name: str) -> None:
    """torchvision's `_ops` are billions of multiply-adds; its three decimals are cut, not rounded."""
    with torch.device("meta"):
        total = sum(cost.macs for cost in layer_costs(build(name, 1000, image_size=224), 224))
    assert total / 1e9 == pytest.approx(OFFICIAL[name].IMAGENET1K_V1.meta["_ops"], abs=0.0015)


def _tiny() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),  # 108 weights on 6x6
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, groups=2, padding=1),  # 72 weights on 3x3
        nn.Flatten(),
        nn.Linear(36, 5),  # 180 weights, once
    )


def test_tiny_network_by_hand() -> None:
    net = _tiny()
    masks = Masks(net)
    sparse = {name: torch.zeros_like(mask) for name, mask in masks.masks().items()}
    sparse["0"].flatten()[:10] = True
    sparse["3"].flatten()[3:10] = True
    sparse["5"].flatten()[::60] = True
    masks.set(sparse)
    assert layer_costs(net, 6) == [
        LayerCost("0", kept=10, total=108, macs=108 * 36, sparse_macs=360),
        LayerCost("3", kept=7, total=72, macs=72 * 9, sparse_macs=63),
        LayerCost("5", kept=3, total=180, macs=180, sparse_macs=3),
    ]


def test_a_layer_used_twice_costs_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x))

    assert layer_costs(Twice(), 4) == [LayerCost("conv", 9, 9, 9 * 32, 9 * 32)]


def test_a_network_is_left_as_it_was() -> None:
    net = _tiny()
    net.train()
    net[1].eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    layer_costs(net, 6)
    assert [module.training for module in net] == [True, False, True, True, True, True]
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(not module._forward_hooks for module in net)


ANY = {
    "torchvision mobilenet_v3_small": ("torchvision", "mobilenet_v3_small", {}),
    "torchvision swin_t": ("torchvision", "swin_t", {}),
    "timm convnext_atto": ("timm", "convnext_atto", {}),
    "timm vit_tiny": ("timm", "vit_tiny_patch16_224", {"patch_size": 4, "depth": 2}),
    "timm coat_tiny": ("timm", "coat_tiny", {}),
    "vit": ("vit", None, {}),
    "mixer": ("mixer", None, {}),
}


@pytest.mark.parametrize("name", ANY)
def test_any_network_multiplies_as_torch_counts(name: str) -> None:
    """torch's own counter sees each operation behind all modules and functions; attention is in both."""
    kind, arch, options = ANY[name]
    network = build(kind, 10, arch=arch, options=options).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.randn(1, 3, 32, 32))
    costs = layer_costs(network, 32)
    assert 2 * sum(cost.macs for cost in costs) == counter.get_total_flops()
    assert all(cost.macs for cost in costs)


def test_a_weight_that_is_computed_on_the_way_multiplies_whole() -> None:
    """Weight standardisation makes numbers of masked zeros."""

    class Standardised(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.weight - self.weight.mean(), self.bias)

    network = nn.Sequential(nn.Flatten(), Standardised(12, 4), nn.Linear(4, 2))
    Masks(network).set({"1": torch.zeros(4, 12, dtype=torch.bool), "2": torch.eye(2, 4, dtype=torch.bool)})
    assert derived_layers(network, 2) == ["1"]
    assert [(cost.macs, cost.sparse_macs) for cost in layer_costs(network, 2)] == [(48, 48), (8, 2)]


def test_products_and_weights_of_no_layer_stand_at_the_end() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.up = nn.Linear(4, 6), nn.ConvTranspose2d(3, 2, 2, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            rows = torch.nn.functional.linear(
                self.up(x).flatten(2).transpose(1, 2)[:, :5].repeat(1, 1, 2), self.fc.weight
            )
            return torch.einsum("nij,nkj->nik", rows, rows) @ rows

    # the layer 5 x 4 x 6; up 16 x 3 x 8, a product by equation 5 x 6 x 5, and one by @ 5 x 5 x 6
    assert layer_costs(Mixed(), 4) == [
        LayerCost("fc", 24, 24, 120, 120),
        LayerCost(OTHER, 0, 0, 16 * 24 + 150 + 150, 16 * 24 + 150 + 150, counted=False),
    ]
