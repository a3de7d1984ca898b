"""What holds for every network: counts, start weights, and one module for each use of an activation or pool."""

from __future__ import annotations

import math
import operator
from collections import Counter

import pytest
import torch
from torch import fx, nn

from sparse_lab.models import build

# Activations: VGG16 has 13 (+ 2 in ImageNet's head), a ResNet one in the stem and 2 or 3 in each of 16 blocks,
# MobileNetV2 one in the stem, one in the first block, 2 in each of 16 blocks and a last one.
ACTIVATIONS = {
    ("vgg16", 32): 13,
    ("vgg16", 64): 15,
    ("resnet34", 32): 33,
    ("resnet34", 64): 33,
    ("resnet50", 32): 49,
    ("resnet50", 64): 49,
    ("mobilenet_v2", 32): 35,
    ("mobilenet_v2", 64): 35,
}
VARIANTS = sorted(ACTIVATIONS)
CIFAR_COUNTS = {
    ("vgg16", 10): 14_715_584,
    ("resnet34", 10): 21_265_088,
    ("resnet34", 100): 21_311_168,
    ("resnet50", 10): 23_467_712,
    ("resnet50", 100): 23_652_032,
}


def _layers(network: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def _weights(network: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in _layers(network))


@pytest.mark.parametrize(("name", "classes"), CIFAR_COUNTS)
def test_weights_counted_as_the_papers_count_them(name: str, classes: int) -> None:
    with torch.device("meta"):
        assert _weights(build(name, classes)) == CIFAR_COUNTS[name, classes]


def test_resnet50_for_imagenet_has_as_many_weights_as_the_paper_says() -> None:
    with torch.device("meta"):
        assert _weights(build("resnet50", 1000, image_size=224)) == 25_502_912


@pytest.mark.parametrize(("name", "features"), [("vgg16", 512), ("resnet34", 512), ("resnet50", 2048)])
def test_a_quarter_of_the_width_has_a_sixteenth_of_the_weights(name: str, features: int) -> None:
    """Input channels and classes do not scale, so the first layer and the last shrink by 4 and all others by 16."""
    first, last = 64 * 3 * 9, features * 10
    between = CIFAR_COUNTS[name, 10] - first - last
    with torch.device("meta"):
        assert _weights(build(name, width=0.25)) == first // 4 + between // 16 + last // 4


def test_vgg16_for_imagenet_scales_its_hidden_layers_too() -> None:
    with torch.device("meta"):
        layers = [layer.weight.shape for layer in _layers(build("vgg16", 5, width=0.5, image_size=64))]
    assert layers[-3:] == [(2048, 256 * 49), (2048, 2048), (5, 2048)]


@pytest.mark.parametrize("name", ["vgg16", "resnet34", "resnet50"])
def test_no_layer_is_ever_without_channels(name: str) -> None:
    network = build(name, width=0.001)
    assert {min(layer.weight.shape[:2]) for layer in _layers(network)[1:-1]} <= {1, 2}
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(("name", "million"), [("vgg16", 313.2), ("resnet34", 1159.4)])
def test_multiply_adds_of_one_image(name: str, million: float) -> None:
    network = build(name).eval()
    counts = []
    for layer in _layers(network):
        layer.register_forward_hook(
            lambda layer, _, output: counts.append(output[0].numel() * layer.weight[0].numel())  # one per output value
        )
    network(torch.zeros(1, 3, 32, 32))
    assert sum(counts) / 1e6 == pytest.approx(million, abs=0.05)


@pytest.mark.parametrize(("name", "bias"), [("resnet34", False), ("resnet50", False), ("vgg16", True)])
def test_bias_of_the_small_classifier(name: str, bias: bool) -> None:
    with torch.device("meta"):
        network = build(name)
    assert (_layers(network)[-1].bias is not None) == bias
    convolutions_with_bias = [layer.bias is not None for layer in _layers(network)[:-1]]
    assert all(convolutions_with_bias) if name == "vgg16" else not any(convolutions_with_bias)


@pytest.mark.parametrize(
    ("name", "image_size", "maps"),
    [
        ("resnet34", 32, [32, 16, 8, 4]),
        ("resnet50", 32, [32, 16, 8, 4]),
        ("resnet50", 64, [16, 8, 4, 2]),
        ("mobilenet_v2", 32, [32, 32, 16, 8, 8, 4, 4]),
        ("mobilenet_v2", 64, [32, 16, 8, 4, 4, 2, 2]),
    ],
)
def test_where_the_images_shrink(name: str, image_size: int, maps: list[int]) -> None:
    network = build(name, width=0.0625, image_size=image_size).eval()
    ends = ["layer1", "layer2", "layer3", "layer4"]
    if name == "mobilenet_v2":
        ends = [f"features.{last}" for last in (1, 3, 6, 10, 13, 16, 17)]
    seen: list[int] = []
    for end in ends:
        network.get_submodule(end).register_forward_hook(lambda *call: seen.append(call[-1].shape[-1]))
    network(torch.zeros(1, 3, image_size, image_size))
    assert seen == maps


@pytest.mark.parametrize(("name", "image_size"), VARIANTS)
def test_each_module_runs_once_and_nothing_but_sums_is_functional(name: str, image_size: int) -> None:
    with torch.device("meta"):
        network = build(name, width=0.0625, image_size=image_size)
    nodes = fx.symbolic_trace(network).graph.nodes
    assert {node.target for node in nodes if node.op == "call_function"} <= {operator.add, torch.flatten}
    assert not [node for node in nodes if node.op == "call_method"]
    called = Counter(node.target for node in nodes if node.op == "call_module")
    leaves = {leaf for leaf, module in network.named_modules() if not list(module.children())}
    assert called == Counter(leaves)


@pytest.mark.parametrize(("name", "image_size"), VARIANTS)
def test_every_activation_is_used_exactly_once_and_not_in_place(name: str, image_size: int) -> None:
    network = build(name, width=0.0625, image_size=image_size).eval()
    uses: Counter[str] = Counter()
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for where, module in network.named_modules():
        if isinstance(module, nn.ReLU | nn.ReLU6):
            module.register_forward_pre_hook(lambda _, inputs, where=where: uses.update([where]))
            module.register_forward_pre_hook(lambda _, inputs: kept.append((inputs[0], inputs[0].clone())))
    network(torch.randn(2, 3, image_size, image_size))
    assert len(uses) == ACTIVATIONS[name, image_size]
    assert set(uses.values()) == {1}
    assert all(torch.equal(tensor, as_it_was) for tensor, as_it_was in kept)


@pytest.mark.parametrize("image_size", [32, 64])
@pytest.mark.parametrize("name", ["vgg16", "resnet34", "resnet50", "mobilenet_v2"])
def test_the_seed_decides_every_start_weight(name: str, image_size: int) -> None:
    def start(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return build(name, width=0.125, image_size=image_size).state_dict()

    first, again, other = start(1), start(1), start(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    drawn = [key for key, tensor in first.items() if key.endswith("weight") and tensor.ndim > 1]
    assert not any(torch.equal(first[key], other[key]) for key in drawn)


FOUR = ("mobilenet_v2", "resnet34", "resnet50", "vgg16")


def test_convolutions_start_kaiming_normal_over_fan_out() -> None:
    for name in FOUR:
        for layer in _layers(build(name)):
            if not isinstance(layer, nn.Conv2d) or layer.weight.numel() < 5_000:
                continue
            values = layer.weight.detach().double()
            wanted = math.sqrt(2 / (layer.weight.shape[0] * layer.weight[0, 0].numel()))
            assert values.std().item() == pytest.approx(wanted, rel=5 / math.sqrt(2 * values.numel()))
            assert abs(values.mean().item()) < 5 * wanted / math.sqrt(values.numel())
            # a normal's fourth moment is 3, a uniform's 1.8; its estimate spreads by sqrt(24 / n)
            assert ((values / values.std()) ** 4).mean().item() == pytest.approx(
                3, abs=6 * math.sqrt(24 / values.numel())
            )


def test_other_layers_start_as_in_torchvision() -> None:
    for name in FOUR:
        network = build(name, num_classes=100)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert (module.weight == 1).all()
                assert (module.bias == 0).all()
            elif isinstance(module, nn.Conv2d) and module.bias is not None:
                assert (module.bias == 0).all()
        classifier = _layers(network)[-1]
        spread = classifier.weight.std().item()
        if name.startswith("resnet"):
            assert spread == pytest.approx(1 / math.sqrt(3 * classifier.weight.shape[1]), rel=0.02)
        else:
            assert spread == pytest.approx(0.01, rel=0.02)
            assert classifier.bias is not None
            assert (classifier.bias == 0).all()


@pytest.mark.parametrize("name", ["vgg16", "resnet34", "resnet50", "mobilenet_v2"])
def test_every_parameter_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    network = build(name, width=0.125)
    nn.functional.cross_entropy(network(torch.randn(8, 3, 32, 32)), torch.arange(8)).backward()
    for parameter in network.parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
        if parameter.ndim > 1:
            assert parameter.grad.abs().sum() > 0
