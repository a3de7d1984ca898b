"""Networks of torchvision and timm in float64 against dense torch: two steps, odd batches, evaluation of one image."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

BOUND = 1e-10


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
    "torchvision's mobilenet_v3_small": Case(_torchvision("mobilenet_v3_small"), frozenset({"hardsigmoid"})),
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
    "timm's mobilenetv3_small_100": Case(_timm("mobilenetv3_small_100"), frozenset({"hardsigmoid"})),
    "timm's resnet18, 99%": Case(_timm("resnet18"), density=0.01),
    "timm's vit_tiny, 99%": Case(_timm("vit_tiny_patch16_224", img_size=32, patch_size=4), ATTENTION, density=0.01),
}


def of_a_last_digit(model: nn.Module, images: torch.Tensor) -> float:
    """How far torch is off when each layer's outputs change by their last digit: what norms amplify rounding to."""
    found = []
    for digit in (0.0, torch.finfo(torch.float64).eps):
        one = copy.deepcopy(model)
        _round_outputs(one, digit)
        torch.manual_seed(5)
        outputs = one(images)
        outputs.backward(torch.randn(outputs.shape, generator=torch.Generator().manual_seed(5)).double())
        found.append([outputs.detach(), *(parameter.grad for parameter in one.parameters())])
    sizes = [one.norm().item() for one in found[0]]
    least = 1e-2 * max(sizes[1:])
    pairs = zip(*found, sizes, strict=True)
    return max(((one - other).norm() / max(size, least)).item() for one, other, size in pairs)


def _round_outputs(model: nn.Module, digit: float) -> None:
    """Change what each layer gives by up to `digit` of it, at random, in every call the same."""
    chance = torch.Generator().manual_seed(7)

    def rounded(module: nn.Module, given: Any, outcome: torch.Tensor) -> torch.Tensor:
        return outcome * (1.0 + digit * (2.0 * torch.rand(outcome.shape, generator=chance) - 1.0).double())

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(rounded)


def check(twins: type, case: Case) -> None:
    torch.manual_seed(0)
    model = case.build()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in norms:  # or a channel that nothing feeds would lie on the kink of what follows
        nn.init.normal_(module.bias)
    pair = twins(model, density=case.density)
    # norms of a few images of one pixel amplify the last digit a million times
    for training, batch in ((True, 33 if norms else 3), (True, 15 if norms else 5), (False, 1), (False, 3)):
        pair.train(training)
        pair.dense.load_state_dict(pair.sparse.state_dict())
        images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        before = copy.deepcopy(pair.dense)
        errors = pair.step(images)
        bound = BOUND if max(errors.values()) < BOUND else max(BOUND, 10 * of_a_last_digit(before, images.double()))
        assert max(errors.values()) < bound, {name: error for name, error in errors.items() if not error < bound}
        pair.descend()
    pair.dense.load_state_dict(pair.sparse.state_dict())
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
