"""Attention maps against plain loops, SSIM against scikit-image."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from sparse_lab.sparsity.similarity import attention_maps, least_similar, ssim


def _skimage(first: Tensor, second: Tensor) -> float:
    window = min(7, *(side if side % 2 else side - 1 for side in first.shape))
    a, b = first.double().numpy(), second.double().numpy()
    span = max(a.max(), b.max()) - min(a.min(), b.min())
    return float(
        structural_similarity(
            a, b, win_size=window, gaussian_weights=False, use_sample_covariance=False, data_range=span
        )
    )


@pytest.mark.parametrize("shape", [(3, 3), (4, 4), (5, 5), (6, 6), (7, 7), (8, 8), (16, 16), (32, 32), (4, 9), (12, 7)])
@pytest.mark.parametrize("noise", [0.02, 0.5])
def test_ssim_is_scikit_images(shape: tuple[int, int], noise: float) -> None:
    torch.manual_seed(sum(shape))
    first = torch.rand(shape, dtype=torch.float64)
    second = first + noise * torch.randn(shape, dtype=torch.float64)
    assert ssim(first, second) == pytest.approx(_skimage(first, second), abs=1e-6)


@pytest.mark.parametrize("side", [4, 8, 32])
def test_ssim_of_normalised_maps_with_signs(side: int) -> None:
    """What attention maps look like: tiny numbers of both signs, a few places far above the rest."""
    torch.manual_seed(side)
    maps = torch.randn(2, side, side, dtype=torch.float64) ** 3
    maps /= maps.abs().sum((1, 2), keepdim=True)
    assert ssim(maps[0], maps[1]) == pytest.approx(_skimage(maps[0], maps[1]), abs=1e-6)


def test_ssim_of_equal_maps_is_one_and_scale_does_not_matter() -> None:
    torch.manual_seed(0)
    first, second = torch.rand(2, 8, 8, dtype=torch.float64)
    assert ssim(first, first) == pytest.approx(1.0, abs=1e-12)
    assert ssim(torch.full((8, 8), 0.3), torch.full((8, 8), 0.3)) == 1.0
    assert ssim(first * 1e-4, second * 1e-4) == pytest.approx(ssim(first, second), abs=1e-9)
    assert ssim(first, second) == pytest.approx(ssim(second, first), abs=1e-12)
    assert ssim(first, second) < 0.5


class Branches(nn.Module):
    """Convs side by side, each on the image itself, so that damage to one shows in no other."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 5, 3, padding=1)
        self.two = nn.Conv2d(3, 4, 5, padding=2)
        self.three = nn.Conv2d(3, 6, 1)
        self.bn = nn.BatchNorm2d(6)
        self.small = nn.Conv2d(3, 2, 3, stride=4, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.one(x), self.two(x), self.bn(self.three(x)), self.small(x)
        return torch.stack([part.mean((1, 2, 3)) for part in parts], 1)


def _branches() -> Branches:
    torch.manual_seed(0)
    return Branches()


def _batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.rand(n, 3, 8, 8), torch.zeros(n, dtype=torch.long)) for n in (4, 3)]


def test_attention_maps_are_channel_sums_normalised_an_image_and_averaged() -> None:
    net = _branches()
    batches = _batches()
    maps = attention_maps(net, batches)
    assert list(maps) == ["one", "two", "three", "small"]
    images = torch.cat([images for images, _ in batches])
    for name, found in maps.items():
        with torch.no_grad():
            outputs = copy.deepcopy(net.get_submodule(name)).double()(images.double()).numpy()
        expected = np.zeros(outputs.shape[2:])
        for output in outputs:
            image = np.zeros_like(expected)
            for channel in output:
                image += channel
            expected += image / sum(abs(value) for value in image.flatten()) / len(outputs)
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-7)


def test_a_dead_layer_has_an_empty_map() -> None:
    net = _branches()
    nn.init.zeros_(net.one.weight)
    nn.init.zeros_(net.one.bias)
    assert torch.equal(attention_maps(net, _batches())["one"], torch.zeros(8, 8, dtype=torch.float64))


def test_attention_maps_leave_the_network_as_it_was() -> None:
    net = _branches()
    net.train()
    net.bn.eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    attention_maps(net, _batches())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [net.training, net.one.training, net.bn.training] == [True, True, False]
    assert all(not module._forward_hooks for module in net.modules())


def test_attention_maps_clean_up_after_an_error() -> None:
    net = _branches()
    with pytest.raises(RuntimeError):
        attention_maps(net, [(torch.rand(2, 5, 8, 8), torch.zeros(2))])
    assert net.training
    assert all(not module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("damaged", ["one", "two", "three"])
def test_the_damaged_layer_is_the_least_similar(damaged: str) -> None:
    net = _branches()
    hurt = copy.deepcopy(net)
    with torch.no_grad():
        weight = hurt.get_submodule(damaged).weight
        weight.mul_(torch.rand(weight.shape) < 0.3)
    ranked = least_similar(attention_maps(net, _batches()), attention_maps(hurt, _batches()))
    assert ranked[0][0] == damaged
    assert ranked[0][1] < 0.99
    assert {name: score for name, score in ranked[1:]} == pytest.approx(
        dict.fromkeys({"one", "two", "three"} - {damaged}, 1.0)
    )


def test_maps_under_three_by_three_are_left_out() -> None:
    maps = attention_maps(_branches(), _batches())
    assert maps["small"].shape == (2, 2)
    assert [name for name, _ in least_similar(maps, maps)] == ["one", "two", "three"]
    thin = {"thin": torch.rand(2, 9), "enough": torch.rand(3, 9)}
    assert [name for name, _ in least_similar(thin, thin)] == ["enough"]
