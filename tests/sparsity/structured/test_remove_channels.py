"""Thin networks against the masked ones on real images, their sizes against closed forms."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from sparse_lab.models import build
from sparse_lab.sparsity.masks import Masks, layers
from sparse_lab.sparsity.structured.channels import groups, masks_of
from sparse_lab.sparsity.structured.remove_channels import rebuild, thin

# name, width, image size
NETWORKS = [
    ("vgg16", 0.25, 32),
    ("vgg16", 0.125, 64),
    ("resnet34", 0.25, 32),
    pytest.param("resnet50", 0.25, 32, marks=pytest.mark.full),
    ("resnet50", 0.125, 64),
    ("mobilenet_v2", 0.5, 32),
]


def _images(size: int) -> Tensor:
    digits = torch.tensor(load_digits().images[:8] / 16.0, dtype=torch.float32)
    return functional.interpolate(digits[:, None], (size, size), mode="bilinear").expand(-1, 3, -1, -1)


def _built(name: str, width: float, size: int) -> nn.Module:
    torch.manual_seed(0)
    model = build(name, width=width, image_size=size)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return model


@torch.no_grad()
def _enliven(model: nn.Module, size: int) -> nn.Module:
    """Biases and BatchNorm at random, so that a dead channel carries a constant, and yet every layer passes images on:
    statistics are those of the images, disturbed.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in model.modules():
        if module in norms:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.momentum = 1.0
        if getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias, 0.0, 0.5)
    model.train()(_images(size))
    for norm in norms:
        norm.momentum = 0.1
        norm.running_mean += 0.2 * torch.randn_like(norm.running_mean)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.5, 1.5)
    return model.eval()


def _masked(model: nn.Module, size: int, share: float, coupled: bool = True) -> dict[str, Tensor]:
    """Masks at random all but `share` of every group's channels, at least one; returns which stay."""
    found, masks = groups(model, size, coupled), Masks(model)
    alive = {group.name: torch.rand(group.channels) < share for group in found}
    for stays in alive.values():
        stays[int(torch.randint(len(stays), ()))] = True
    masks.set(masks_of(found, alive, {name: weight.shape for name, weight in masks.weights().items()}))
    return alive


def _outputs(model: nn.Module, size: int) -> Tensor:
    with torch.no_grad():
        return model(_images(size))


def _assert_same(smaller: nn.Module, model: nn.Module, size: int) -> None:
    wanted = _outputs(model, size)
    assert wanted.std(0).max() > 0.01, "the images must make a difference"
    assert (_outputs(smaller, size) - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp_min(1.0)


@pytest.mark.every(2)
@pytest.mark.parametrize("name, width, size", NETWORKS)
def test_a_thin_network_has_the_masked_ones_outputs_and_none_of_its_zeros(name: str, width: float, size: int) -> None:
    model = _built(name, width, size)
    _masked(model, size, 0.4)
    _enliven(model, size)
    before = copy.deepcopy(model.state_dict())
    smaller = thin(model, size)
    _assert_same(smaller, model, size)
    kept = {name: int(module.mask.sum()) for name, module in layers(model).items()}
    assert {name: module.weight.numel() for name, module in layers(smaller).items()} == kept
    assert not any(key.endswith("mask") for key in smaller.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for module in smaller.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.weight) == len(module.bias) == len(module.running_mean)


@pytest.mark.parametrize("width, size", [(0.25, 32), (0.125, 64)])
def test_parameters_of_a_thin_vgg16_in_closed_form(width: float, size: int) -> None:
    model = _built("vgg16", width, size)
    left = [int(stays.sum()) for stays in _masked(model, size, 0.3).values()]
    convs, hidden = left[:13], left[13:]
    inputs = [3, *convs[:-1]]
    wanted = sum(made * read * 9 + 3 * made for made, read in zip(convs, inputs, strict=True))
    features = convs[-1] * (49 if size == 64 else 1)
    for outputs in [*hidden, 10]:
        wanted += features * outputs + outputs
        features = outputs
    assert sum(parameter.numel() for parameter in thin(model, size).parameters()) == wanted


def test_parameters_of_a_thin_resnet34_in_closed_form() -> None:
    model = _built("resnet34", 0.25, 32)
    left = {name: int(stays.sum()) for name, stays in _masked(model, 32, 0.3).items()}
    reads = trunk = left["conv1"]
    wanted = 27 * trunk + 2 * trunk
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        if stage > 1:
            trunk = left[f"layer{stage}.0.conv2"]
            wanted += reads * trunk + 2 * trunk
        for block in range(blocks):
            inner = left[f"layer{stage}.{block}.conv1"]
            wanted += 9 * inner * (reads + trunk) + 2 * (inner + trunk)
            reads = trunk
    assert sum(parameter.numel() for parameter in thin(model, 32).parameters()) == wanted + 10 * trunk


@pytest.mark.every(2)
@pytest.mark.parametrize("name, width, size", NETWORKS)
def test_single_weights_at_random_leave_channels_that_nobody_reads(name: str, width: float, size: int) -> None:
    model = _built(name, width, size)
    masks = Masks(model)
    masks.set({layer: torch.rand(weight.shape) < 0.002 for layer, weight in masks.weights().items()})
    _enliven(model, size)
    smaller = thin(model, size)
    assert sum(p.numel() for p in smaller.parameters()) < 0.9 * sum(p.numel() for p in model.parameters())
    wanted = _outputs(model, size)
    assert (_outputs(smaller, size) - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp_min(1.0)


def test_what_only_unread_channels_read_goes_too() -> None:
    model = _enliven(_built("resnet34", 0.25, 32), 32)
    with torch.no_grad():
        model.fc.weight[:, 3:] = 0.0
    smaller = thin(model, 32)
    _assert_same(smaller, model, 32)
    # later blocks of the stage still read the other channels of the trunk: nothing can go
    assert smaller.fc.in_features == model.fc.in_features
    for block in list(model.layer4)[1:]:
        block.conv1.weight.data[:, 3:] = 0.0
    model.layer4[2].conv2.weight.data[:3, 5] = 0.0
    smaller = thin(model, 32)
    _assert_same(smaller, model, 32)
    assert smaller.fc.in_features == smaller.layer4[0].downsample[0].out_channels == 3
    assert smaller.layer4[2].conv1.out_channels == model.layer4[2].conv1.out_channels - 1


def test_a_constant_that_is_read_stays() -> None:
    model = _enliven(_built("vgg16", 0.25, 32), 32)
    with torch.no_grad():
        model.features[0].weight[2:] = 0.0
    smaller = thin(model, 32)
    assert smaller.features[0].out_channels == 16
    _assert_same(smaller, model, 32)


@pytest.mark.parametrize("size", [32, 64])
def test_a_network_that_is_cut_keeps_one_channel_and_its_constant(size: int) -> None:
    model = _enliven(_built("vgg16", 0.125, size), size)
    with torch.no_grad():
        model.features[24].weight.zero_()
    smaller = thin(model, size)
    # all that comes before the cut
    assert [smaller.features[index].out_channels for index in (0, 3, 7, 10, 14, 17, 20)] == [1] * 7
    assert smaller.features[24].out_channels == 64
    torch.testing.assert_close(_outputs(smaller, size), _outputs(model, size), rtol=1e-5, atol=1e-5)


def test_modes_stay_and_a_thin_network_trains() -> None:
    model = _built("mobilenet_v2", 0.5, 32)
    _masked(model, 32, 0.5, coupled=False)
    model.requires_grad_(False).train()
    model.features[3].eval()
    with torch.no_grad():
        smaller = thin(model, 32)
    assert [module.training for module in smaller.modules()] == [module.training for module in model.modules()]
    smaller.requires_grad_(True)(_images(32)).sum().backward()
    assert all(parameter.grad is not None for parameter in smaller.parameters())


@pytest.mark.every(2)
@pytest.mark.parametrize("name, width, size", NETWORKS)
def test_a_thin_network_is_built_again_from_its_state(name: str, width: float, size: int) -> None:
    model = _built(name, width, size)
    _masked(model, size, 0.3)
    _enliven(model, size)
    smaller = thin(model, size)
    file = io.BytesIO()
    torch.save(smaller.state_dict(), file)
    file.seek(0)
    again = rebuild(build(name, width=width, image_size=size), torch.load(file, weights_only=True)).eval()
    assert str(again) == str(smaller)
    assert torch.equal(_outputs(again, size), _outputs(smaller, size))


def test_a_state_of_another_network_is_refused() -> None:
    plain = build("vgg16", width=0.25)
    for other in (build("vgg16", width=0.5), build("resnet34", width=0.25), build("vgg16", width=0.05, image_size=64)):
        with pytest.raises(RuntimeError):
            rebuild(copy.deepcopy(plain), other.state_dict())
