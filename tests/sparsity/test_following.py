"""Connectivity of any network against brute force: a logit is live if it moves when the image does.

The reference knows nothing of paths: the real network in float64 with its real activations, several draws of random
weights on the mask (of either sign, and positive ones for which no ReLU is closed), several images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_lab.models import build
from sparse_lab.sparsity.connectivity import connectivity
from sparse_lab.sparsity.masks import Masks, layers

NETWORKS: dict[str, tuple[str, str | None, dict[str, Any], int]] = {
    "torchvision resnet18": ("torchvision", "resnet18", {}, 32),
    "torchvision mobilenet_v3_small": ("torchvision", "mobilenet_v3_small", {}, 32),
    "torchvision efficientnet_b0": ("torchvision", "efficientnet_b0", {}, 32),
    "torchvision densenet121": ("torchvision", "densenet121", {}, 32),
    "torchvision shufflenet": ("torchvision", "shufflenet_v2_x0_5", {}, 32),
    "torchvision squeezenet": ("torchvision", "squeezenet1_1", {}, 32),
    "torchvision regnet_y_400mf": ("torchvision", "regnet_y_400mf", {}, 32),
    "torchvision googlenet": ("torchvision", "googlenet", {}, 64),
    "torchvision vit_b_16": ("torchvision", "vit_b_16", {}, 32),
    "torchvision swin_t": ("torchvision", "swin_t", {}, 32),
    "timm convnext_atto": ("timm", "convnext_atto", {}, 32),
    "timm vit_tiny": ("timm", "vit_tiny_patch16_224", {"patch_size": 4}, 32),
    "timm mixer": ("timm", "mixer_s16_224", {}, 32),
    "timm efficientnet_b0": ("timm", "efficientnet_b0", {}, 32),
    "timm poolformer_s12": ("timm", "poolformer_s12", {}, 32),
    "vit": ("vit", None, {"depth": 3}, 32),
    "mixer": ("mixer", None, {"depth": 3}, 32),
    "resnet20": ("resnet20", None, {}, 32),
    "densenet121": ("densenet121", None, {}, 32),
}
QUICK = ("torchvision mobilenet_v3_small", "mixer")
BY_DAY = ("timm convnext_atto", "torchvision shufflenet", "vit")


def _masked(network: nn.Module, sparsity: float, seed: int) -> Masks:
    source = torch.Generator().manual_seed(seed)
    masks = Masks(network)
    masks.set(
        {name: torch.rand(one.weight.shape, generator=source) > sparsity for name, one in layers(network).items()}
    )
    return masks


def moving_logits(network: nn.Module, shape: tuple[int, ...], draws: int = 6) -> Tensor:
    """Bool [classes]: does the logit differ between images, under any draw of the weights?"""
    network = copy.deepcopy(network).double().eval()
    moves = torch.zeros(0, dtype=torch.bool)
    for draw in range(draws):
        source = torch.Generator().manual_seed(draw)
        images = torch.randn(6, *shape, generator=source, dtype=torch.float64)
        _draw_weights(network, source, positive=bool(draw % 2))
        with torch.no_grad():
            logits = network(images.abs() if draw % 2 else images)
        spread = (logits - logits[:1]).abs()
        now = (spread > 1e-12 * logits.abs().max().clamp_min(1e-300)).any(0)
        moves = now if not moves.numel() else moves | now
    return moves


def _draw_weights(network: nn.Module, source: torch.Generator, positive: bool) -> None:
    masks = {id(one.weight): one.mask for one in layers(network).values()}
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            drawn = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
            if parameter.dim() < 2:
                drawn = drawn.abs() * 0.3 + (0.7 if name.endswith("weight") else 0.0)
            else:
                drawn = (drawn.abs() if positive else drawn) * masks.get(id(parameter), torch.ones(()))
                rows = drawn.flatten(1)
                size = rows.sum(1) if positive else rows.norm(dim=1) / 2
                drawn = drawn / size.clamp_min(1e-300).view(-1, *(1,) * (drawn.dim() - 1))
            parameter.copy_(drawn)


@pytest.mark.parametrize("sparsity", [0.9, 0.99, 0.999])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.full if name in BY_DAY else pytest.mark.nightly])
        for name in NETWORKS
    ],
)
@pytest.mark.filterwarnings("ignore:.*not counted")
def test_a_logit_is_live_if_and_only_if_it_moves(name: str, sparsity: float) -> None:
    kind, arch, options, side = NETWORKS[name]
    network = build(kind, 10, image_size=side, arch=arch, options=options)
    _masked(network, sparsity, seed=int(1000 * sparsity))
    found = connectivity(network, (3, side, side))
    moving = moving_logits(network, (3, side, side))
    assert found.not_known is None and found.live_logits == int(moving.sum())
    assert found.connected == bool(moving.any())


class Attending(nn.Module):
    """torch's own attention, whose last layer is called by nobody, and functions in place of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 4, stride=4)
        self.block = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True, dropout=0.0)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = functional.relu(self.embed(x)).flatten(2).permute(0, 2, 1)
        return self.head(self.block(tokens).amax(1))


class Squeezing(nn.Module):
    """Squeeze-and-excite whose gate alone links one half with the other; grouped, depthwise and transposed layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.gate, self.up = nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.stem(x))
        x = self.depth(x) * functional.hardsigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.head(functional.max_pool2d(self.up(x), 2).flatten(1).view(len(x), 8, -1).amax(2))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("kind", "shape"), [(Attending, (3, 16, 16)), (Squeezing, (1, 8, 12))])
@pytest.mark.filterwarnings("ignore:.*not counted")
def test_functions_gates_and_attention(kind: Callable[[], nn.Module], shape: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    network = kind()
    _masked(network, (0.5, 0.7, 0.8, 0.9)[seed % 4], seed)
    found = connectivity(network, shape)
    assert found.not_known is None and found.live_logits == int(moving_logits(network, shape, draws=12).sum())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.filterwarnings("ignore:.*not counted")
def test_effective_weights_are_those_whose_input_moves_and_that_move_a_logit(seed: int) -> None:
    """Another value of it must change a logit, and it must read something that differs."""
    torch.manual_seed(seed)
    network = Attending()
    _masked(network, 0.8, seed)
    found = connectivity(network, (3, 16, 16))
    real = copy.deepcopy(network).double().eval()
    _draw_weights(real, torch.Generator().manual_seed(seed + 50), positive=False)
    for module in real.modules():
        if hasattr(module, "activation"):  # no ReLU is closed
            module.activation = functional.gelu
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    inputs: dict[str, Tensor] = {}
    for name, layer in layers(real).items():
        layer.register_forward_hook(lambda _, given, made, name=name: inputs.update({name: given[0].detach()}))
    logits = real(images)
    for name in ("head", "block.linear2", "block.linear1"):
        layer = layers(real)[name]
        read = inputs[name].flatten(1, -2) if inputs[name].dim() > 2 else inputs[name][:, None]
        moving = ((read - read[:1]).abs() > 1e-12).any(0).any(0)
        (grad,) = torch.autograd.grad(logits.square().sum(), layer.weight, retain_graph=True)
        wanted = (grad.abs() > 1e-12) & layer.mask & moving
        assert found.effective_by_layer[name] == int(wanted.sum()), name


class Branching(nn.Module):
    def __init__(self, look: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.look = nn.Linear(12, 3), look

    def forward(self, x: Tensor) -> Tensor:
        return self.look(self.fc, x.flatten(1))


def _no_grad(fc: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return fc(x)


LOOKS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "branches": lambda fc, x: fc(x) if x.sum() > 0 else fc(-x),
    "reads a number": lambda fc, x: fc(x) * x.mean().item(),
    "sorts": lambda fc, x: fc(x.sort(1).values),
    "takes the largest": lambda fc, x: fc(x).topk(3).values,
    "compares": lambda fc, x: fc(x * (x > 0)),
    "no gradients": _no_grad,
    "raises": lambda fc, x: fc(x[:, :5]),
    "weight elsewhere": lambda fc, x: x @ fc.weight.t(),
    "two outputs": lambda fc, x: (fc(x), x),  # type: ignore[dict-item, return-value]
    "not finite": lambda fc, x: fc(x) / 0,
}


@pytest.mark.parametrize("what", LOOKS)
def test_what_cannot_be_followed_is_not_known(what: str) -> None:
    """And nobody is told that a mask cuts it: not even where it does."""
    network = Branching(LOOKS[what])
    Masks(network).set({"fc": torch.zeros(3, 12, dtype=torch.bool)})
    found = connectivity(network, (3, 2, 2))
    assert found.not_known and "\n" not in found.not_known
    assert (found.connected, found.effective, found.live_logits, found.dead_layers) == (None, None, None, [])
    assert found.as_dict()["not_known"] == found.not_known and found.kept == 0


class Keywords(nn.Module):
    """Convolutions called as functions, their settings by keyword and in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv2d(x, self.a.weight, self.a.bias, padding=1, stride=2)
        x = functional.conv2d(x, groups=8, weight=self.b.weight, padding=1, bias=None)
        return functional.linear(input=torch.max(x, other=-x).mean((2, 3)), weight=self.fc.weight)


@pytest.mark.parametrize("seed", range(4))
def test_settings_by_keyword(seed: int) -> None:
    network = Keywords()
    _masked(network, 0.6, seed)
    found = connectivity(network, (3, 8, 8))
    assert found.not_known is None and found.live_logits == int(moving_logits(network, (3, 8, 8)).sum())


class TokensFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.flatten(2).permute(2, 0, 1) + torch.arange(16.0).view(16, 1, 1)).mean(0))


class TwiceUsed(nn.Module):
    """Once as a layer, on a constant, and once by another function, on what matters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x.flatten(1) @ self.a.weight.t() + self.a(torch.ones(2, 12)[: len(x)]))


@pytest.mark.parametrize(
    ("kind", "shape", "said"), [(TokensFirst, (4, 4, 4), "image by image"), (TwiceUsed, (3, 2, 2), "not as a layer's")]
)
def test_rows_that_are_not_images_and_weights_used_twice_are_not_known(kind: Any, shape: Any, said: str) -> None:
    network = kind()
    _masked(network, 0.5, 1)
    found = connectivity(network, shape)
    assert said in str(found.not_known) and found.connected is None


def test_the_network_its_gradients_and_the_random_state_are_left_as_they_were() -> None:
    network = Squeezing()
    _masked(network, 0.5, 1)
    before = {name: one.clone() for name, one in network.state_dict().items()}
    torch.manual_seed(7)
    connectivity(network, (1, 8, 8))
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3)) and torch.get_default_dtype() == torch.float32
    assert all(torch.equal(one, before[name]) for name, one in network.state_dict().items())
    assert network.training and all(one.grad is None and one.requires_grad for one in network.parameters())
