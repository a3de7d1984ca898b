"""Offsets against scipy's DCT of explicit patches, and against plain networks whose weights numpy fills in."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import numpy as np
import pytest
import scipy.fft
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_lab.models import build, dyrelu, offsets, weight_sharing
from sparse_lab.models.offsets import DCTConv2d, DCTLinear, RecoveredConv2d, RecoveredLinear
from sparse_lab.sparsity.flops import layer_costs
from sparse_lab.sparsity.masks import Masks, count, layers

NETWORKS = ("vgg16", "resnet34", "mobilenet_v2")
Array = np.ndarray[Any, np.dtype[np.float64]]


def _tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _images(number: int = 2, kind: torch.dtype = torch.float64) -> Tensor:
    return _tensor(number, 3, 32, 32, seed=7).to(kind)


def _with_dct(layer: nn.Module) -> Any:
    """The layer, in float64, as a DCT layer."""
    holder = nn.Sequential(layer.double())
    offsets.install_dct(holder)
    return holder[0]


def _dct(values: Array, size: int) -> Array:
    """scipy's orthonormal DCT-II along the second axis, which is filled up with zeros to `size`."""
    filled = np.zeros((values.shape[0], size, *values.shape[2:]))
    filled[:, : values.shape[1]] = values
    result: Array = scipy.fft.dct(filled, type=2, norm="ortho", axis=1)
    return result


def _coefficients(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """(N, out, H', W'): output o is coefficient o of its group's patch, read kernel position first, channel last."""
    outputs, inputs, height, width = conv.weight.shape
    padding = conv.padding
    if conv.padding_mode != "zeros":
        x = functional.pad(x, (padding[1], padding[1], padding[0], padding[0]), mode=conv.padding_mode)
        padding = (0, 0)
    parts = []
    for group, channels in enumerate(x.chunk(conv.groups, 1)):
        patches = functional.unfold(channels, (height, width), conv.dilation, padding, conv.stride)
        patches = patches.unflatten(1, (inputs, height * width)).transpose(1, 2).flatten(1, 2)
        size = max(height * width * inputs, outputs)
        each = outputs // conv.groups
        parts.append(torch.from_numpy(_dct(patches.numpy(), size)[:, group * each : (group + 1) * each]))
    side = (x.shape[2] + 2 * padding[0] - conv.dilation[0] * (height - 1) - 1) // conv.stride[0] + 1
    return torch.cat(parts, 1).unflatten(2, (side, -1))


CONVS: list[dict[str, Any]] = [
    {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1},  # 36 numbers in, 6 out
    {"in_channels": 3, "out_channels": 40, "kernel_size": 3, "stride": 2, "padding": 1},  # 27 in, 40 out
    {"in_channels": 3, "out_channels": 27, "kernel_size": 3, "bias": False},
    {"in_channels": 3, "out_channels": 5, "kernel_size": (3, 2), "padding": (2, 0), "stride": (1, 3), "dilation": 2},
    {"in_channels": 5, "out_channels": 3, "kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1, "groups": 2},
    {"in_channels": 12, "out_channels": 12, "kernel_size": 3, "padding": 1, "groups": 12, "stride": 2},
]


@pytest.mark.parametrize("settings", CONVS)
def test_a_convolution_adds_scipys_dct_of_every_patch(settings: dict[str, Any]) -> None:
    plain = nn.Conv2d(**settings).double()
    conv = _with_dct(copy.deepcopy(plain))
    assert type(conv) is DCTConv2d
    x = _tensor(2, settings["in_channels"], 9, 8)
    wanted = _coefficients(plain, x)
    bias = torch.zeros(plain.out_channels) if plain.bias is None else plain.bias.detach()
    torch.testing.assert_close(conv(x), wanted + bias.double()[:, None, None], rtol=0, atol=1e-13)
    sparse = _tensor(*plain.weight.shape, seed=1) * (_tensor(*plain.weight.shape, seed=2) > 1)
    plain.weight.data, conv.weight.data = sparse, sparse.clone()
    conv.alpha.data.fill_(-0.7)
    torch.testing.assert_close(conv(x), plain(x) - 0.7 * wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("inputs", "outputs"), [(20, 6), (6, 20), (8, 8), (1, 5), (5, 1)])
def test_a_linear_layer_adds_scipys_dct_of_its_input(inputs: int, outputs: int) -> None:
    plain = nn.Linear(inputs, outputs).double()
    layer = _with_dct(copy.deepcopy(plain))
    assert type(layer) is DCTLinear
    x = _tensor(7, inputs)
    layer.weight.data = plain.weight.data.clone()
    layer.alpha.data.fill_(0.3)
    wanted = plain(x) + 0.3 * torch.from_numpy(_dct(x.numpy(), max(inputs, outputs))[:, :outputs])
    torch.testing.assert_close(layer(x), wanted, rtol=0, atol=1e-13)


def test_one_number_of_the_basis_by_its_formula() -> None:
    conv = _with_dct(nn.Conv2d(4, 6, (3, 2)))
    place = (2 * 2 + 1) * 4 + 3  # row 2, column 1, channel 3
    assert conv.basis[5, 3, 2, 1].item() == pytest.approx(
        math.sqrt(2 / 24) * math.cos(math.pi * (2 * place + 1) * 5 / 48), abs=1e-15
    )
    assert torch.equal(conv.basis[0], torch.full((4, 3, 2), math.sqrt(1 / 24), dtype=torch.float64))


@pytest.mark.parametrize("layer", [nn.Conv2d(64, 50, 3), nn.Conv2d(4, 50, 3), nn.Linear(512, 10), nn.Linear(10, 512)])
def test_the_basis_is_orthonormal(layer: nn.Module) -> None:
    """Filters where there are fewer of them than inputs, else inputs."""
    rows = _with_dct(layer).basis.flatten(1)
    short = rows if len(rows) <= rows.shape[1] else rows.T
    torch.testing.assert_close(short @ short.T, torch.eye(len(short), dtype=torch.float64), rtol=0, atol=1e-13)


def test_a_cosine_of_zero_is_zero_to_the_last_bit() -> None:
    """Else an input that a coefficient does not depend on would pass for a link."""
    matrix = offsets.dct_matrix(36, 36, 36)
    places = {(k, j) for k in range(36) for j in range(36) if (2 * j + 1) * k % 72 == 36}
    assert places == {(k, j) for k, j in (matrix == 0).nonzero().tolist()}
    assert {(4, 4), (12, 4)} <= places  # 9 * 4 = 36, 9 * 12 = 36 + 72


def test_large_transforms_keep_their_digits() -> None:
    """The widest layer of ImageNet's VGG16: the cosine's argument would pass 10^9 quarter turns."""
    matrix = offsets.dct_matrix(25088, 4096, 3)
    pulse = np.zeros((3, 25088))
    pulse[range(3), range(3)] = 1.0
    np.testing.assert_allclose(matrix.numpy(), _dct(pulse, 25088)[:, :4096].T, rtol=0, atol=1e-16)


def test_the_gradient_of_alpha_is_the_slope_of_the_loss() -> None:
    conv = _with_dct(nn.Conv2d(3, 8, 3, padding=1))
    conv.weight.data = _tensor(*conv.weight.shape, seed=1)
    x, step = _tensor(2, 3, 6, 6), 1e-5

    def loss(alpha: float) -> Tensor:
        conv.alpha.data.fill_(alpha)
        return torch.tanh(conv(x)).square().sum()  # type: ignore[no-any-return]

    loss(0.4).backward()
    slope = (loss(0.4 + step) - loss(0.4 - step)).item() / (2 * step)
    assert conv.alpha.grad.item() == pytest.approx(slope, rel=1e-7)
    assert abs(slope) > 1.0
    assert conv.weight.grad.abs().min() > 0  # zeros and pruned ones have dense gradients to grow by


@pytest.mark.parametrize("name", NETWORKS)
def test_installing_keeps_counts_and_everything_but_the_weights(name: str) -> None:
    torch.manual_seed(0)
    model = build(name, width=0.25)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "bias", None) is not None:
                module.bias.add_(1.0)  # so that a bias that were lost would show
    model.eval()
    biases = {key: value.clone() for key, value in model.state_dict().items() if not key.endswith("weight")}
    objects = {key: id(module) for key, module in model.named_modules()}
    parameters = {key: id(parameter) for key, parameter in model.named_parameters()}
    offsets.install_dct(model)
    found = layers(model)
    assert list(found) == list(layers(plain))
    assert count(model) == count(plain)
    assert Masks(model).total() == Masks(plain).total()
    assert [one.macs for one in layer_costs(model, 32)] == [one.macs for one in layer_costs(plain, 32)]
    assert {key: id(module) for key, module in model.named_modules()} == objects
    after = dict(model.named_parameters())
    alphas = {key for key in after if key.endswith(".alpha")}
    assert {key: id(value) for key, value in after.items() if key not in alphas} == parameters
    assert alphas == {f"{key}.alpha" for key in found}
    assert all(after[key].item() == 1.0 and after[key].dim() == 0 for key in alphas)
    assert all(not module.weight.any() and hasattr(module, "offset") for module in found.values())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in biases.items())
    assert not any(module.training for module in model.modules())
    assert not any(key.endswith("basis") for key in model.state_dict())


@pytest.mark.every(2)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_learn_and_fold(name: str) -> None:
    torch.manual_seed(0)
    model = build(name, width=0.125).double()
    offsets.install_dct(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    masks = Masks(model)
    masks.set({key: torch.rand(mask.shape) < 0.1 for key, mask in masks.masks().items()}, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(model(_images(8)), torch.arange(8)).backward()
        optimizer.step()
        masks.enforce(optimizer)
    for key, module in layers(model).items():
        assert module.get_parameter("alpha").item() != 1.0, key
        assert module.weight.any() and not module.weight[~masks[key]].any(), key
    plain = offsets.folded(model)
    assert not any(hasattr(module, "offset") for module in plain.modules())
    assert {type(module) for module in layers(plain).values()} == {nn.Conv2d, nn.Linear}
    assert list(plain.state_dict()) == list(build(name, width=0.125).state_dict())
    assert not any("mask" in key or "basis" in key for key, _ in plain.named_buffers())
    torch.testing.assert_close(plain.eval()(_images()), model.eval()(_images()), rtol=1e-12, atol=1e-12)
    assert all(hasattr(module, "offset") for module in layers(model).values())


def test_full_vgg16_counts_what_papers_count() -> None:
    with torch.device("meta"):
        model = build("vgg16")
        offsets.install_dct(model)
    assert count(model) == 14_715_584
    assert sum(parameter.numel() for key, parameter in model.named_parameters() if key.endswith(".alpha")) == 14


def test_what_is_not_counted_and_what_does_not_fit_is_left_alone() -> None:
    model = build("resnet34", width=0.0625)
    dyrelu.install(model, 32)
    offsets.install_dct(model)
    own = [part for module in dyrelu.activations(model).values() for part in module.modules()]
    assert not any(hasattr(part, "offset") for part in own)
    assert all(part.weight.any() for part in own if isinstance(part, nn.Linear))
    odd = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(2, 2, 3))
    with pytest.raises(ValueError, match="1 is a Conv1d"):
        offsets.install_dct(odd)
    assert odd[0].weight.any()
    with pytest.raises(ValueError, match="is a DCTConv2d"):
        offsets.install_dct(model)
    with pytest.raises(ValueError, match="no convolution"):
        offsets.install_dct(nn.Sequential(nn.ReLU()))


def test_shared_weights_share_their_offset() -> None:
    torch.manual_seed(0)
    model = build("resnet34", width=0.0625).double()
    weight_sharing.share(model)
    offsets.install_dct(model)
    masks = Masks(model)
    assert masks.total() == count(build("resnet34", width=0.0625))
    with torch.no_grad():
        for seed, module in enumerate(masks.layers.values()):
            module.weight.copy_(0.1 * _tensor(*module.weight.shape, seed=seed))
        answer = model.eval()(_images())
        plain = weight_sharing.unshared(offsets.folded(model))
        assert list(plain.state_dict()) == list(build("resnet34", width=0.0625).state_dict())
        torch.testing.assert_close(plain(_images()), answer, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_dct_network_is_saved_and_loaded(name: str) -> None:
    model = build(name, width=0.125)
    offsets.install_dct(model)
    for seed, module in enumerate(layers(model).values()):
        module.weight.data = 0.1 * _tensor(*module.weight.shape, seed=seed).float()
        module.get_parameter("alpha").data.fill_(0.5 + 0.1 * seed)
    Masks(model)
    state = _saved(model)
    other = build(name, width=0.125)
    Masks(other)
    weights = {key: module.weight.clone() for key, module in layers(other).items()}
    offsets.match_dct(other, iter(build(name, width=0.125).state_dict()))
    assert not any(hasattr(module, "offset") for module in other.modules())
    offsets.match_dct(other, iter(state))
    assert all(torch.equal(module.weight, weights[key]) for key, module in layers(other).items())
    offsets.match_dct(other, state)  # nothing is left to do
    other.load_state_dict(state)
    assert torch.equal(other.eval()(_images(kind=torch.float32)), model.eval()(_images(kind=torch.float32)))


def _saved(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as a file gives it back."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state: dict[str, Tensor] = torch.load(file, weights_only=True)
    return state


def _pruned(name: str, density: float = 0.2) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """A pruned network, one where numpy put each filter's mean into what was pruned, and these means by layer."""
    torch.manual_seed(3)
    model = build(name, width=0.125).double()
    for module in layers(model).values():
        module.weight.data += 0.02
    full, means = copy.deepcopy(model), {}
    masks = Masks(model)
    masks.set({key: torch.rand(mask.shape) < density for key, mask in masks.masks().items()})
    for key, module in layers(full).items():
        weight, mask = module.weight.detach().numpy(), masks[key].numpy()
        mean = [row[~kept].mean() if not kept.all() else 0.0 for row, kept in zip(weight, mask, strict=True)]
        for row, kept, value in zip(weight, mask, mean, strict=True):
            row[~kept] = value
        means[key] = torch.tensor(np.array(mean))
    return model, full, means


@pytest.mark.every(2)
@pytest.mark.parametrize("name", NETWORKS)
def test_recovery_is_the_network_with_the_means_filled_in(name: str) -> None:
    model, full, means = _pruned(name)
    bare = model.eval()(_images()).detach()
    objects = {key: (id(one), id(one.weight), id(one.bias), id(one.mask)) for key, one in layers(model).items()}
    names = [key for key, _ in model.named_parameters()]
    masks = Masks(model)
    offsets.recover(model, means)
    answer = model(_images())
    torch.testing.assert_close(answer, full.eval()(_images()), rtol=1e-12, atol=1e-12)
    assert (answer - bare).abs().max() > 1e-6
    found = layers(model)
    assert {key: (id(one), id(one.weight), id(one.bias), id(one.mask)) for key, one in found.items()} == objects
    assert [key for key, _ in model.named_parameters()] == names
    assert {type(module) for module in found.values()} == {RecoveredConv2d, RecoveredLinear}
    assert all(
        torch.equal(found[key].weight + found[key].offset, module.weight) for key, module in layers(full).items()
    )
    plain = offsets.folded(model)
    assert all(torch.equal(plain.state_dict()[key], value) for key, value in full.state_dict().items())
    torch.testing.assert_close(plain(_images()), answer, rtol=1e-12, atol=1e-12)
    single = copy.deepcopy(model).float()
    images = _images(kind=torch.float32)
    torch.testing.assert_close(offsets.folded(single)(images), single(images), rtol=1e-6, atol=1e-6)
    assert masks.kept() == Masks(model).kept() == sum(int(module.weight.count_nonzero()) for module in found.values())


def test_an_optimizer_from_before_recovery_trains_what_is_kept_and_follows_the_masks() -> None:
    model, _, means = _pruned("vgg16")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    masks = Masks(model)
    mean = means["features.3"].clone()
    offsets.recover(model, {"features.3": mean})
    layer, before = masks.layers["features.3"], masks.layers["features.3"].weight.detach().clone()
    functional.cross_entropy(model(_images(4)), torch.arange(4)).backward()
    optimizer.step()
    masks.enforce(optimizer)
    moved = layer.weight != before
    assert moved.any()
    assert not moved[~masks["features.3"]].any()
    assert torch.equal(layer.get_buffer("mean"), mean)
    masks.set({"features.3": torch.zeros_like(layer.weight, dtype=torch.bool)})
    assert torch.equal(layer.offset, mean[:, None, None, None].expand_as(layer.weight))  # type: ignore[arg-type]
    mean.zero_()  # the layer has a tensor of its own
    assert layer.get_buffer("mean").any()
    offsets.recover(model, {"features.3": torch.full_like(mean, 0.5)})
    assert (layer.offset == 0.5).all()  # type: ignore[operator]


@pytest.mark.every(2)
@pytest.mark.parametrize("masks_first", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_recovered_network_is_saved_and_loaded(name: str, masks_first: bool) -> None:
    model, _, means = _pruned(name)
    some = dict(list(means.items())[1:])
    offsets.recover(model, some)
    state = _saved(model)
    assert {key for key in state if key.endswith(".mean")} == {f"{key}.mean" for key in some}
    other = build(name, width=0.125).double()
    if masks_first:
        Masks(other)
    offsets.match_recovery(other, iter(build(name, width=0.125).state_dict()))
    assert not any(hasattr(module, "offset") for module in other.modules())
    offsets.match_recovery(other, iter(state))
    assert [key for key, module in other.named_modules() if hasattr(module, "offset")] == list(some)
    masks = Masks(other)
    other.load_state_dict(state)
    assert torch.equal(other.eval()(_images()), model.eval()(_images()))
    assert masks.kept() == Masks(model).kept()


def test_recovery_that_does_not_fit_changes_nothing() -> None:
    model = build("vgg16", width=0.125)
    with pytest.raises(ValueError, match=r"features.3 has shape \(3,\), not \(8,\)"):
        offsets.recover(model, {"features.0": torch.zeros(8), "features.3": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"features.1 is a BatchNorm2d"):
        offsets.recover(model, {"features.0": torch.zeros(8), "features.1": torch.zeros(8)})
    assert not any(hasattr(module, "offset") for module in model.modules())
    assert list(model.state_dict()) == list(build("vgg16", width=0.125).state_dict())


def test_folding_a_plain_network_copies_it() -> None:
    model = build("resnet34", width=0.0625)
    masks = Masks(model)
    masks.set({key: torch.rand(mask.shape) < 0.5 for key, mask in masks.masks().items()})
    plain = offsets.folded(model)
    assert list(plain.state_dict()) == list(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in plain.state_dict().items())
    assert {id(p) for p in plain.parameters()}.isdisjoint(id(p) for p in model.parameters())
