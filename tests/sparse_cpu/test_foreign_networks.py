"""Networks of torchvision and timm, in float64, against dense torch: two steps, an odd batch, evaluation of one image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

BOUND = 1e-10
RATE = 1e-4


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return pytest.importorskip("timm").create_model(name, num_classes=10, **options)

    return build


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision.models, name)(num_classes=10, **options)


def _vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 3, 48, 96, num_classes=10)


def _swin() -> nn.Module:
    return torchvision.models.SwinTransformer([2, 2], 24, [2, 2], [2, 4], [4, 4], num_classes=10)


def _mixer() -> nn.Module:
    mixer = pytest.importorskip("timm").models.mlp_mixer.MlpMixer
    return mixer(10, img_size=32, patch_size=8, num_blocks=2, embed_dim=48)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0, batch_first=True, activation="gelu")
    body = nn.TransformerEncoder(layer, 2)
    return nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.Flatten(2), body, nn.Flatten(1), nn.Linear(16 * 64, 10))


@dataclass(frozen=True)
class Case:
    """said: the functions without a kernel, as far as they are known; None where torch computes a good deal."""

    build: Callable[[], nn.Module]
    said: frozenset[str] = frozenset()
    density: float = 0.1


ATTENTION = frozenset({"cat", "add", "layer_norm", "scaled_dot_product_attention"})
SMALL = {
    "torchvision's ViT": Case(_vit, frozenset({"cat", "add", "layer_norm", "multi_head_attention_forward"})),
    "torchvision's Swin": Case(
        _swin,
        frozenset({"pad", "mul", "matmul", "add", "softmax", "roll", "cat", "layer_norm", "adaptive_avg_pool2d"}),
    ),
    "torch's TransformerEncoder": Case(_encoder, frozenset({"multi_head_attention_forward", "layer_norm"})),
    "timm's MLP-Mixer": Case(_mixer, frozenset()),
    "torchvision's mobilenet_v3_small": Case(_torchvision("mobilenet_v3_small")),
    "timm's convnext_atto": Case(_timm("convnext_atto", depths=(1, 1, 2, 1))),
}
MORE = {
    "torchvision's resnet18": Case(_torchvision("resnet18")),
    "torchvision's efficientnet_b0": Case(_torchvision("efficientnet_b0")),
    "torchvision's convnext_tiny": Case(_torchvision("convnext_tiny")),
    "torchvision's densenet121": Case(
        _torchvision("densenet121"), frozenset({"avg_pool2d", "cat", "batch_norm", "relu", "adaptive_avg_pool2d"})
    ),
    "torchvision's shufflenet_v2_x0_5": Case(_torchvision("shufflenet_v2_x0_5"), frozenset({"cat"})),
    "timm's resnet18": Case(_timm("resnet18")),
    "timm's convnext_atto, whole": Case(_timm("convnext_atto")),
    "timm's vit_tiny": Case(_timm("vit_tiny_patch16_224", img_size=32, patch_size=4), ATTENTION),
    "timm's efficientnet_b0": Case(_timm("efficientnet_b0")),
    "timm's mobilenetv3_small_100": Case(_timm("mobilenetv3_small_100")),
    "timm's resnet18, 99%": Case(_timm("resnet18"), density=0.01),
    "timm's vit_tiny, 99%": Case(_timm("vit_tiny_patch16_224", img_size=32, patch_size=4), ATTENTION, density=0.01),
    "torchvision's efficientnet_b0, 98%": Case(_torchvision("efficientnet_b0"), density=0.02),
}


def descend(pair) -> None:  # type: ignore[no-untyped-def]
    """One step of gradient descent for both: what is masked stays where it is."""
    with torch.no_grad():
        for weight, twin in zip(pair.sparse.parameters(), pair.dense.parameters(), strict=True):
            live = pair.arithmetic.live.get(weight)
            if live is None:
                weight -= RATE * weight.grad
            else:
                weight.view(-1)[torch.from_numpy(live.positions)] -= RATE * torch.from_numpy(live.gradient)
            twin -= RATE * twin.grad
    for masks in pair.masks:
        masks.enforce()


def check(twins: type, case: Case) -> None:
    torch.manual_seed(0)
    pair = twins(case.build(), density=case.density)
    for training, batch in ((True, 3), (True, 5), (False, 1)):
        pair.train(training)
        errors = pair.step(torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch)))
        assert max(errors.values()) < BOUND, {name: error for name, error in errors.items() if not error < BOUND}
        descend(pair)
    with torch.no_grad():
        images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        wanted, got = pair.dense(images), pair.arithmetic(images)
        assert (got - wanted).norm() <= BOUND * wanted.norm()
    said = [line.split(" for ")[1].split()[0] for line in pair.said]
    assert len(said) == len(set(said)) and set(said) == case.said
    assert not any(line != "" and "densely" not in line for line in pair.said)


@pytest.mark.parametrize("name", SMALL)
def test_a_network_of_others_computes_what_torch_computes(twins: type, name: str) -> None:
    check(twins, SMALL[name])


@pytest.mark.full
@pytest.mark.parametrize("name", MORE)
def test_more_networks_of_others_compute_what_torch_computes(twins: type, name: str) -> None:
    check(twins, MORE[name])


@pytest.mark.full
@pytest.mark.parametrize("name", ["timm's mobilenetv3_small_100", "timm's vit_tiny", "torchvision's resnet18"])
def test_a_batch_of_a_block_and_one_image(twins: type, name: str) -> None:
    torch.manual_seed(0)
    pair = twins(MORE[name].build(), density=0.05)
    assert max(pair.step(torch.randn(33, 3, 32, 32)).values()) < BOUND
