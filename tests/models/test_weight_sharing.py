"""Weight sharing: the counts of EAST's paper, gradients that add up, and the plain network that it equals."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparse_lab.models import build
from sparse_lab.models.weight_sharing import SharedConv2d, share, unshared
from sparse_lab.sparsity.masks import Masks

# classes, image size, weights that exist once shared
UNIQUE = [
    ("resnet34", 10, 32, 11_164_352),
    ("resnet34", 100, 32, 11_210_432),
    ("resnet50", 10, 32, 13_928_128),
    ("resnet50", 100, 32, 14_112_448),
    ("resnet50", 1000, 224, 15_963_328),
]
CONVS = {"resnet34": ("conv1", "conv2"), "resnet50": ("conv1", "conv2", "conv3")}
BLOCKS = {"layer1": 3, "layer2": 4, "layer3": 6, "layer4": 3}


def _lenders(name: str) -> dict[str, str]:
    """Which convolution uses which other one's weight: the third block and later ones the second's."""
    return {
        f"{stage}.{block}.{conv}": f"{stage}.1.{conv}"
        for stage, blocks in BLOCKS.items()
        for block in range(2, blocks)
        for conv in CONVS[name]
    }


def _shared(name: str, seed: int = 0, **options: object) -> nn.Module:
    """A narrow one in float64, its BatchNorms no longer as new."""
    torch.manual_seed(seed)
    model = build(name, width=0.0625, **options).double()  # type: ignore[arg-type]
    share(model)
    model.double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
            nn.init.normal_(module.running_mean, 0.0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def _plain(name: str, shared: nn.Module) -> nn.Module:
    """The plain network that `shared` equals, put together by names."""
    model = build(name, width=0.0625).double()
    lenders, state = _lenders(name), shared.state_dict()
    wanted = {}
    for key in model.state_dict():
        owner = key.removesuffix(".weight")
        wanted[key] = (
            state[f"{lenders[owner]}.weight"] * state[f"{owner}.scale"] if owner in lenders else state[key]
        ).clone()
    model.load_state_dict(wanted)
    return model


@pytest.mark.parametrize(("name", "classes", "image_size", "unique"), UNIQUE)
def test_weights_that_exist(name: str, classes: int, image_size: int, unique: int) -> None:
    with torch.device("meta"):
        model = build(name, classes, image_size=image_size)
        dense = sum(p.numel() for p in model.parameters())
        plain = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
        share(model)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    uses = [module for module in model.modules() if isinstance(module, SharedConv2d)]
    assert weights == unique
    assert len(uses) == {"resnet34": 16, "resnet50": 24}[name]
    # all parameters: what is shared went, a scalar a use came, everything else stayed
    assert dense - sum(p.numel() for p in model.parameters()) == plain - unique - len(uses)


@pytest.mark.parametrize("name", CONVS)
def test_which_blocks_share(name: str) -> None:
    model = _shared(name)
    found = {key: module.shares for key, module in model.named_modules() if isinstance(module, SharedConv2d)}
    lenders = _lenders(name)
    assert list(found) == list(lenders)
    for key, conv in found.items():
        assert conv is model.get_submodule(lenders[key])
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len({id(module) for module in norms}) == len(norms) == {"resnet34": 36, "resnet50": 53}[name]


def test_scales_start_uniform_between_0_and_1() -> None:
    scales = []
    for seed in range(30):
        torch.manual_seed(seed)
        model = build("resnet50", width=0.03)
        share(model)
        scales += [module.scale.item() for module in model.modules() if isinstance(module, SharedConv2d)]
    values = torch.tensor(scales, dtype=torch.float64).sort().values
    assert len(values) == 30 * 24
    assert values[0] >= 0
    assert values[-1] < 1
    # Kolmogorov-Smirnov: beyond 1.95 / sqrt(n) once in a thousand
    assert (values - torch.arange(len(values)) / len(values)).abs().max().item() < 1.95 / len(values) ** 0.5


@pytest.mark.parametrize("name", CONVS)
def test_gradient_is_the_sum_over_all_uses(name: str) -> None:
    model = _shared(name)
    plain = _plain(name, model)
    images, labels = torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.arange(6)
    for network in (model, plain):
        nn.functional.cross_entropy(network(images), labels).backward()
    lenders = _lenders(name)
    for owner in sorted(set(lenders.values())):
        conv = model.get_submodule(owner)
        wanted = plain.get_submodule(owner).weight.grad.clone()
        for user, lender in lenders.items():
            if lender == owner:
                scale, grad = model.get_submodule(user).scale, plain.get_submodule(user).weight.grad
                wanted += scale.detach() * grad
                dot = (grad * conv.weight.detach()).sum()
                torch.testing.assert_close(scale.grad, dot, rtol=1e-9, atol=1e-13)
                assert abs(dot.item()) > 1e-12
        torch.testing.assert_close(conv.weight.grad, wanted, rtol=1e-9, atol=1e-13)
    for key, parameter in plain.named_parameters():
        owner = key.removesuffix(".weight")
        if owner not in lenders and owner not in lenders.values():
            torch.testing.assert_close(model.get_parameter(key).grad, parameter.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", CONVS)
def test_state_dict_holds_each_tensor_once(name: str) -> None:
    model = _shared(name)
    state = model.state_dict()
    plain = build(name, width=0.0625).state_dict()
    lenders = _lenders(name)
    wanted = [key if key.removesuffix(".weight") not in lenders else f"{key[:-7]}.scale" for key in plain]
    assert list(state) == wanted
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    assert len({id(parameter) for parameter in model.parameters()}) == len(list(model.parameters()))
    other = _shared(name, seed=5)
    other.load_state_dict(state)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(other.eval()(images), model.eval()(images))


def test_a_copy_shares_within_itself_only() -> None:
    model = _shared("resnet34").eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        before = model(images)
        other = copy.deepcopy(model)
        for user, lender in _lenders("resnet34").items():
            assert other.get_submodule(user).shares is other.get_submodule(lender)
            assert other.get_submodule(user).shares is not model.get_submodule(lender)
        assert torch.equal(other(images), before)
        for lender in set(_lenders("resnet34").values()):
            other.get_submodule(lender).weight.mul_(1.5)
        changed = other(images)
        assert not torch.equal(changed, before)
        assert torch.equal(model(images), before)
        torch.testing.assert_close(_plain("resnet34", other).eval()(images), changed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", CONVS)
def test_the_plain_network_that_it_equals(name: str, train: bool) -> None:
    model = _shared(name)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    plain = unshared(model)
    assert not any(isinstance(module, SharedConv2d) for module in plain.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        wanted = model.train(train)(images)
        torch.testing.assert_close(plain.train(train)(images), wanted, rtol=1e-12, atol=1e-12)
        fresh = build(name, width=0.0625).double()
        assert list(fresh.state_dict()) == list(plain.state_dict())
        fresh.load_state_dict(unshared(_shared(name)).state_dict(), strict=True)
        torch.testing.assert_close(fresh.train(train)(images), wanted, rtol=1e-12, atol=1e-12)
    pointers = [parameter.data_ptr() for parameter in plain.parameters()]
    assert len(set(pointers)) == len(pointers)
    assert set(pointers).isdisjoint(parameter.data_ptr() for parameter in model.parameters())


def test_masks_go_along() -> None:
    model = _shared("resnet34")
    masks = Masks(model)
    generator = torch.Generator().manual_seed(0)
    masks.set({name: torch.rand(mask.shape, generator=generator) < 0.3 for name, mask in masks.masks().items()})
    plain = unshared(model)
    lenders = _lenders("resnet34")
    loaded = build("resnet34", width=0.0625).double()
    Masks(loaded)
    loaded.load_state_dict(plain.state_dict(), strict=True)
    for name, mask in Masks(loaded).masks().items():
        assert torch.equal(mask, masks[lenders.get(name, name)]), name
        assert not loaded.get_submodule(name).weight[~mask].any()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(loaded.eval()(images), model.eval()(images), rtol=1e-12, atol=1e-12)


def test_a_network_without_sharing_comes_back_as_a_copy() -> None:
    model = build("vgg16", width=0.0625).eval()
    other = unshared(model)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(other(images), model(images))
    assert {p.data_ptr() for p in other.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())


@pytest.mark.parametrize("name", ["vgg16", "mobilenet_v2"])
@pytest.mark.parametrize("image_size", [32, 64])
def test_networks_without_repeats_are_left_as_they_were(name: str, image_size: int) -> None:
    model = build(name, width=0.0625, image_size=image_size)
    names = list(model.state_dict())
    with pytest.raises(ValueError, match="no stage"):
        share(model)
    assert list(model.state_dict()) == names


def test_sharing_twice_is_refused() -> None:
    model = _shared("resnet34")
    names = list(model.state_dict())
    with pytest.raises(ValueError, match="no stage"):
        share(model)
    assert list(model.state_dict()) == names


class Block(nn.Module):
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x))


def _stage(*convs: nn.Conv2d) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(conv) for conv in convs)).double()


CONV: Callable[..., nn.Conv2d] = nn.Conv2d
UNLIKE = {
    "stride": lambda: CONV(4, 4, 3, padding=1, bias=False, stride=2),
    "bias": lambda: CONV(4, 4, 3, padding=1, bias=True),
    "padding": lambda: CONV(4, 4, 3, padding=0, bias=False),
    "dilation": lambda: CONV(4, 4, 3, padding=1, bias=False, dilation=2),
    "groups": lambda: CONV(4, 8, 3, padding=1, bias=False, groups=2),
    "kernel": lambda: CONV(4, 4, 1, bias=False),
}


@pytest.mark.parametrize("what", UNLIKE)
def test_unlike_convolutions_are_not_shared(what: str) -> None:
    def like() -> nn.Conv2d:
        return CONV(4, 4, 3, padding=1, bias=False)

    stage = _stage(like(), like(), UNLIKE[what]())
    with pytest.raises(ValueError, match="no stage"):
        share(stage)
    stage = _stage(like(), like(), UNLIKE[what](), like())
    share(stage)
    assert [isinstance(block.conv, SharedConv2d) for block in stage] == [False, False, False, True]  # type: ignore[union-attr]


def test_two_blocks_are_too_few() -> None:
    with pytest.raises(ValueError, match="no stage"):
        share(_stage(*(CONV(4, 4, 3, padding=1) for _ in range(2))))


def test_convolutions_with_biases_are_scaled_whole() -> None:
    """scale * conv(x) scales the bias too, and so must the plain network that it equals."""
    stage = _stage(*(CONV(4, 4, 3, padding=1) for _ in range(3)))
    share(stage)
    images = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(unshared(stage)(images), stage(images), rtol=1e-12, atol=1e-12)
