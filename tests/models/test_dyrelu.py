"""DyReLU against a formula of our own in numpy, and its way into and out of a network."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparse_lab.models import build, dyrelu, weight_sharing
from sparse_lab.models.dyrelu import DyReLU
from sparse_lab.sparsity.masks import Masks

BETAS = (0.0, 0.3, 1.0)


def _tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _drawn(channels: int, beta: float = 1.0) -> DyReLU:
    """Parameters wide enough that theta covers (-1, 1) and both pieces win somewhere."""
    module = DyReLU(channels).double()
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = 1.5 * _tensor(*parameter.shape, seed=seed)
    module.beta.fill_(beta)
    return module


def _by_hand(module: DyReLU, x: Tensor, beta: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Chen et al.'s DyReLU-B with K = 2, one number at a time; coefficients blended with ReLU's (1, 0, 0, 0)."""
    w1, v1 = module.reduce.weight.detach().numpy(), module.reduce.bias.detach().numpy()
    w2, v2 = module.expand.weight.detach().numpy(), module.expand.bias.detach().numpy()
    images = x.numpy()
    result = np.empty_like(images)
    number, channels = images.shape[:2]
    for n in range(number):
        c = [images[n, j].mean() for j in range(channels)]
        hidden = [
            max(0.0, sum(w * value for w, value in zip(row, c, strict=True)) + v) for row, v in zip(w1, v1, strict=True)
        ]
        z = [sum(w * value for w, value in zip(row, hidden, strict=True)) + v for row, v in zip(w2, v2, strict=True)]
        theta = [2.0 / (1.0 + math.exp(-value)) - 1.0 for value in z]
        for j in range(channels):
            a1, a2, b1, b2 = (theta[j + channels * part] for part in range(4))
            a1, a2, b1, b2 = 1.0 + a1, a2, 0.5 * b1, 0.5 * b2
            a1, a2, b1, b2 = beta * a1 + (1.0 - beta), beta * a2, beta * b1, beta * b2
            result[n, j] = np.maximum(a1 * images[n, j] + b1, a2 * images[n, j] + b2)
    return result


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shape", [(3, 8, 4, 5), (5, 12), (1, 4, 1, 1), (2, 3, 2, 2), (2, 8, 7)])
def test_formula(shape: tuple[int, ...], beta: float) -> None:
    module = _drawn(shape[1], beta)
    x = 2.0 * _tensor(*shape, seed=9)
    answer = module(x).detach().numpy()
    assert answer.shape == shape
    np.testing.assert_allclose(answer, _by_hand(module, x, beta), rtol=1e-12, atol=1e-13)


def test_formula_sees_both_pieces() -> None:
    """The cases above would not be worth much if one line always won."""
    module, x = _drawn(8), 2.0 * _tensor(3, 8, 4, 5, seed=9)
    a1, a2, b1, b2 = (one[:, :, None, None] for one in module.coefficients(x).unbind(1))
    second = (a2 * x + b2 > a1 * x + b1).double().mean().item()
    assert 0.1 < second < 0.9
    assert a1.min().item() < 0.3
    assert a1.max().item() > 1.7


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 16, 6, 6), (4, 16)])
def test_at_zero_it_is_relu_to_the_last_bit(shape: tuple[int, ...], kind: torch.dtype) -> None:
    module = _drawn(16, beta=0.0).to(kind)
    x = (3.0 * _tensor(*shape, seed=3)).to(kind)
    x.flatten()[:5] = torch.tensor([0.0, -0.0, 1e30, -1e30, 1e-30], dtype=kind)
    assert torch.equal(module(x), torch.relu(x))


def test_new_ones_start_at_full_strength_with_torchs_own_start() -> None:
    module = DyReLU(64)
    assert float(module.beta) == 1.0
    assert [tuple(p.shape) for p in module.parameters()] == [(16, 64), (16,), (256, 16), (256,)]
    for layer, inputs in ((module.reduce, 64), (module.expand, 16)):
        for values in (layer.weight, layer.bias):
            assert values.abs().max().item() <= 1 / math.sqrt(inputs)
        assert layer.weight.std().item() == pytest.approx(1 / math.sqrt(3 * inputs), rel=0.1)


def test_fewer_channels_than_the_reduction_still_work() -> None:
    module = _drawn(2)
    assert module.reduce.out_features == 1
    x = _tensor(2, 2, 3, 3, seed=5)
    np.testing.assert_allclose(module(x).detach().numpy(), _by_hand(module, x, 1.0), rtol=1e-12)


def test_gradients_of_input_and_parameters() -> None:
    module = _drawn(4, beta=0.5)
    names = [name for name, _ in module.named_parameters()]

    def answer(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))  # type: ignore[no-any-return]

    x = _tensor(2, 4, 2, 2, seed=6).requires_grad_(True)
    assert torch.autograd.gradcheck(answer, (x, *module.parameters()))
    answer(x, *module.parameters()).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in module.parameters())


@pytest.mark.parametrize(("name", "activations", "extra"), [("resnet34", 33, 3_181_168), ("resnet50", 49, 28_394_800)])
def test_parameters_that_resnets_gain(name: str, activations: int, extra: int) -> None:
    with torch.device("meta"):
        plain = build(name)
        model = build(name)
        dyrelu.install(model, 32)
    before = sum(parameter.numel() for parameter in plain.parameters())
    assert len(dyrelu.activations(model)) == activations
    assert sum(parameter.numel() for parameter in model.parameters()) - before == extra
    assert not any(isinstance(module, nn.ReLU) for module in model.modules())
    assert Masks(model).total() == Masks(plain).total()


@pytest.mark.parametrize(("image_size", "channels"), [(32, []), (64, [256, 256])])
def test_every_activation_of_vgg16(image_size: int, channels: list[int]) -> None:
    model = build("vgg16", width=0.0625, image_size=image_size)
    was = [name for name, module in model.named_modules() if isinstance(module, nn.ReLU)]
    dyrelu.install(model, image_size)
    found = dyrelu.activations(model)
    assert list(found) == was
    by_channel = [module.expand.out_features // 4 for module in found.values()]
    assert by_channel == [4, 4, 8, 8, *[16] * 3, *[32] * 6, *channels]
    assert model(torch.randn(2, 3, image_size, image_size)).shape == (2, 10)


def test_shared_blocks_have_activations_of_their_own() -> None:
    model = build("resnet34", width=0.0625)
    weight_sharing.share(model)
    dyrelu.install(model, 32)
    found = dyrelu.activations(model)
    assert len(found) == 33
    assert len({id(p) for module in found.values() for p in module.parameters()}) == 33 * 4
    assert len({module.reduce.weight.data_ptr() for module in found.values()}) == 33
    used: list[str] = []
    for name, module in found.items():
        module.register_forward_hook(lambda *_, name=name: used.append(name))
    model(torch.randn(2, 3, 32, 32))
    assert used == list(found)


def _trained(name: str = "resnet34", kind: torch.dtype = torch.float32) -> nn.Module:
    """A narrow network whose BatchNorms have seen something, half of it in evaluation mode."""
    torch.manual_seed(1)
    model = build(name, width=0.0625).to(kind)
    model(torch.randn(8, 3, 32, 32, dtype=kind) * 2 + 1)
    for index, module in enumerate(model.modules()):
        module.training = index % 3 > 0
    return model


@pytest.mark.parametrize("name", ["resnet34", "vgg16"])
def test_installing_leaves_everything_else_alone(name: str) -> None:
    model = _trained(name, torch.float64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = {key: module.training for key, module in model.named_modules()}
    dyrelu.install(model, 32)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(model.get_submodule(key).training == mode for key, mode in modes.items())
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert [key for key, _ in model.named_modules() if key in modes] == list(modes)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", ["resnet34", "resnet50", "vgg16"])
def test_removing_changes_no_answer(name: str, train: bool) -> None:
    model = build(name, width=0.0625)
    dyrelu.install(model, 32)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        model(images)
        faded = model.train(train)(images)
        dyrelu.fade(model, 0.0)
        before = model(images)
        dyrelu.remove(model)
        assert not torch.equal(before, faded)
        assert torch.equal(model(images), before)
    assert all(module.training == train for module in model.modules())


def test_removing_returns_what_is_gone_and_leaves_the_plain_networks_order() -> None:
    plain = build("resnet34", width=0.0625)
    model = build("resnet34", width=0.0625)
    dyrelu.install(model, 32)
    everything = list(model.parameters())
    own = {id(p) for module in dyrelu.activations(model).values() for p in module.parameters()}
    gone = dyrelu.remove(model)
    assert len(gone) == 33 * 4
    assert {id(parameter) for parameter in gone} == own
    left = [parameter for parameter in everything if id(parameter) not in own]
    assert [id(parameter) for parameter in model.parameters()] == [id(parameter) for parameter in left]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert dyrelu.remove(model) == []


def test_fading_sets_all_of_them_and_is_saved() -> None:
    model = build("resnet34", width=0.0625)
    dyrelu.install(model, 32)
    dyrelu.fade(model, 0.25)
    assert {float(module.beta) for module in dyrelu.activations(model).values()} == {0.25}
    other = build("resnet34", width=0.0625)
    dyrelu.install(other, 32)
    other.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(other.eval()(images), model.eval()(images))


def test_matching_a_state_dict_from_before_and_from_after() -> None:
    model = build("vgg16", width=0.0625)
    plain_names = list(model.state_dict())
    dyrelu.install(model, 32)
    with_dyrelu = list(model.state_dict())
    dyrelu.rebuild_structure(model, with_dyrelu)
    assert len(dyrelu.activations(model)) == 13
    dyrelu.rebuild_structure(model, iter([f"network.{name}" for name in with_dyrelu]))
    assert len(dyrelu.activations(model)) == 13
    dyrelu.rebuild_structure(model, iter(plain_names))
    assert dyrelu.activations(model) == {}
    assert list(model.state_dict()) == plain_names
    dyrelu.rebuild_structure(model, plain_names)
    assert list(model.state_dict()) == plain_names


def test_networks_that_it_does_not_fit_are_left_as_they_were() -> None:
    mobile = build("mobilenet_v2", width=0.1)
    names = list(mobile.state_dict())
    with pytest.raises(ValueError, match="ReLU6"):
        dyrelu.install(mobile, 32)
    assert list(mobile.state_dict()) == names
    linear = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(2 * 16, 2))
    with pytest.raises(ValueError, match="no ReLU"):
        dyrelu.install(linear, 4)


def test_gradients_reach_every_activation_of_a_network() -> None:
    torch.manual_seed(0)
    model = build("resnet34", width=0.0625)
    weight_sharing.share(model)
    dyrelu.install(model, 32)
    nn.functional.cross_entropy(model(torch.randn(8, 3, 32, 32)), torch.arange(8)).backward()
    for name, module in dyrelu.activations(model).items():
        for parameter in module.parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all()
        # the hidden unit of a narrow one may be off; what its last bias adds is always felt
        assert module.expand.bias.grad.abs().sum() > 0, name
