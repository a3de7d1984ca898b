"""Compactors against numpy and float64, and their way into and out of a network."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparse_lab.models import build, compactors, weight_sharing
from sparse_lab.models.compactors import Compactor
from sparse_lab.sparsity.connectivity import connectivity
from sparse_lab.sparsity.masks import Masks

NETWORKS = ("vgg16", "resnet34", "resnet50")


def _drawn(name: str, kind: torch.dtype = torch.float64) -> nn.Module:
    """A narrow network in which nothing has a special value: BatchNorm's weights of both signs, biases, statistics."""
    torch.manual_seed(4)
    model = build(name, width=0.0625)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = torch.rand_like(module.weight) + 0.5
            module.weight.data[::3] *= -1
            module.bias.data.normal_(0.1, 0.3)
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 3.0)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            module.bias.data.normal_()
    return model.to(kind)


def _convs(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is nn.Conv2d]


def _compacted(name: str, kind: torch.dtype = torch.float64) -> nn.Module:
    """Compactors behind every convolution, none of them the identity."""
    model = _drawn(name, kind)
    compactors.install(model, _convs(model))
    for compactor in compactors.compactors(model).values():
        noise = torch.randn_like(compactor.weight) / len(compactor.weight) ** 0.5
        compactor.weight.data = (0.7 * compactor.weight + 0.5 * noise).detach()
    return model


def _images(kind: torch.dtype = torch.float64, number: int = 4) -> Tensor:
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(8), dtype=torch.float64).to(kind)


def _all(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.ones_like(one.alive) for name, one in compactors.compactors(model).items()}


def _some(model: nn.Module) -> dict[str, Tensor]:
    """Two channels in three, and one at least."""
    keep = {name: torch.arange(len(one.alive)) % 3 != 1 for name, one in compactors.compactors(model).items()}
    assert all(0 < int(one.sum()) < len(one) for one in keep.values())
    return keep


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", [*NETWORKS, "mobilenet_v2"])
def test_installing_changes_no_answer(name: str, train: bool) -> None:
    model = _drawn(name, torch.float32).train(train)
    if name == "mobilenet_v2":
        model.classifier[0].eval()
    convs = [conv for conv in _convs(model) if model.get_submodule(conv).groups == 1]
    plain = copy.deepcopy(model)
    compactors.install(model, convs)
    assert list(compactors.compactors(model)) == convs
    assert torch.equal(model(_images(torch.float32)), plain(_images(torch.float32)))


@pytest.mark.parametrize("name", NETWORKS)
def test_installing_keeps_every_name_object_and_mode(name: str) -> None:
    model = _drawn(name)
    for index, module in enumerate(model.modules()):
        module.training = index % 3 > 0
    modes = {key: module.training for key, module in model.named_modules()}
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    compactors.install(model, _convs(model))
    after = dict(model.named_parameters())
    assert all(after[key] is parameter for key, parameter in parameters.items())
    assert all(dict(model.named_buffers())[key] is buffer for key, buffer in buffers.items())
    assert {key for key in model.state_dict() if key not in parameters | buffers} == {
        f"{key.removesuffix('running_mean')}compactor.{part}"
        for key in buffers
        if key.endswith("running_mean")
        for part in ("weight", "alive")
    }
    assert all(model.get_submodule(key).training == mode for key, mode in modes.items())
    assert [key for key, _ in model.named_modules() if key in modes] == list(modes)
    for key, compactor in compactors.compactors(model).items():
        conv = model.get_submodule(key)
        assert isinstance(conv, nn.Conv2d)
        channels = conv.out_channels
        assert torch.equal(compactor.weight[:, :, 0, 0], torch.eye(channels, dtype=torch.float64))
        assert compactor.bias is None
        assert compactor.alive.dtype == torch.bool
        assert compactor.alive.tolist() == [True] * channels
    other = _drawn(name)
    for parameter in other.parameters():
        parameter.data.zero_()
    missing, unexpected = model.load_state_dict(other.state_dict(), strict=False)
    assert unexpected == []
    assert all(".compactor." in key for key in missing)
    assert not any(parameter.any() for parameter in parameters.values())


def test_names_of_the_networks() -> None:
    vgg, resnet = _drawn("vgg16"), _drawn("resnet50")
    compactors.install(vgg, ["features.0", "features.40"])
    compactors.install(resnet, ["layer1.0.conv2", "layer2.0.downsample.0"])
    assert {key for key in vgg.state_dict() if "compactor" in key} == {
        f"features.{index}.compactor.{part}" for index in (1, 41) for part in ("weight", "alive")
    }
    assert {key for key, _ in resnet.named_parameters() if "compactor" in key} == {
        "layer1.0.bn2.compactor.weight",
        "layer2.0.downsample.1.compactor.weight",
    }
    assert list(compactors.compactors(resnet)) == ["layer1.0.conv2", "layer2.0.downsample.0"]


@pytest.mark.parametrize("name", NETWORKS)
def test_they_are_not_counted(name: str) -> None:
    plain, model = _drawn(name), _compacted(name)
    channels = [len(one.alive) for one in compactors.compactors(model).values()]
    more = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert more == sum(number**2 for number in channels)
    assert Masks(model).total() == Masks(plain).total()
    assert connectivity(model, 32) == connectivity(plain, 32)
    assert Compactor.recipe == {"momentum": 0.99, "weight_decay": 0.0}


def test_a_compactor_mixes_channels() -> None:
    model = _compacted("resnet34")
    norm, conv = model.get_submodule("layer1.0.bn1"), model.get_submodule("layer1.0.conv1")
    matrix = compactors.compactors(model)["layer1.0.conv1"].weight.detach().numpy()[:, :, 0, 0]
    x = torch.randn(2, conv.in_channels, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        out = norm.eval()(x).numpy()
    shape = (1, -1, 1, 1)
    mean, variance, weight, bias = (
        getattr(norm, key).detach().numpy().reshape(shape) for key in ("running_mean", "running_var", "weight", "bias")
    )
    normalised = (x.numpy() - mean) / np.sqrt(variance + norm.eps) * weight + bias
    np.testing.assert_allclose(out, np.einsum("ij,njhw->nihw", matrix, normalised), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "conv", "message"),
    [
        ("vgg16", "features.2", "features.2 is not followed by a BatchNorm"),
        ("vgg16", "classifier.0", "classifier.0 is not followed by a BatchNorm"),
        ("resnet34", "layer9.0.conv1", "layer9.0.conv1 is not followed by a BatchNorm"),
        ("mobilenet_v2", "features.2.conv.1.0", "see different inputs"),
    ],
)
def test_convolutions_that_it_does_not_fit(name: str, conv: str, message: str) -> None:
    model = _drawn(name)
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        compactors.install(model, [_convs(model)[0], conv])
    assert list(model.state_dict()) == names


def test_a_batch_norm_of_other_channels_or_behind_another_layer_is_not_the_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.PixelShuffle(2), nn.BatchNorm2d(1), nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1)
    ).append(nn.BatchNorm2d(2))
    for conv in ("0", "3"):
        with pytest.raises(ValueError, match=f"{conv} is not followed by a BatchNorm"):
            compactors.install(model, [conv])
    compactors.install(model, ["4"])
    assert list(compactors.compactors(model)) == ["4"]


def test_twice_and_shared_weights_are_refused() -> None:
    model = _drawn("resnet34")
    weight_sharing.share(model)
    with pytest.raises(ValueError, match=r"share the weight of layer1\.1\.conv1"):
        compactors.install(model, ["layer1.1.conv1"])
    compactors.install(model, ["layer1.0.conv1", "layer1.0.conv1"])
    assert list(compactors.compactors(model)) == ["layer1.0.conv1"]
    with pytest.raises(ValueError, match=r"layer1\.0\.conv1 has a compactor already"):
        compactors.install(model, ["layer1.0.conv2", "layer1.0.conv1"])
    assert list(compactors.compactors(model)) == ["layer1.0.conv1"]


def test_norms_of_rows() -> None:
    model = _compacted("vgg16")
    found = compactors.norms(model)
    assert list(found) == _convs(model)
    for name, values in found.items():
        assert not values.requires_grad
        rows = model.get_parameter(f"features.{int(name.split('.')[1]) + 1}.compactor.weight").detach().numpy()
        np.testing.assert_allclose(
            values.numpy(), [np.sqrt(sum(v * v for v in row.ravel())) for row in rows], rtol=1e-12
        )


def _loss(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(_images()), torch.arange(4))


def test_penalty_and_mask_of_the_gradient() -> None:
    """alive * task + strength * Q / ||row||; the task's gradient from autograd on a copy, the rest in numpy."""
    model = _compacted("resnet34").eval()
    found = compactors.compactors(model)
    for number, one in enumerate(found.values()):
        one.alive.copy_(torch.arange(len(one.alive)) % 4 != number % 4)
        one.weight.data[-1] = 0.0
        one.weight.data[0] *= 1e-9
    twin = copy.deepcopy(model)
    wanted = [one.weight for one in compactors.compactors(twin).values()]
    tasks = torch.autograd.grad(_loss(twin), wanted)
    _loss(model).backward()
    others = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if "compactor" not in name}
    compactors.add_penalty(model, 1e-2)
    assert len(found) == 36
    for (name, one), task in zip(found.items(), tasks, strict=True):
        matrix = one.weight.detach().numpy()[:, :, 0, 0]
        expected = np.zeros_like(matrix)
        for i, row in enumerate(matrix):
            length = np.sqrt((row**2).sum())
            expected[i] = 1e-2 * row / length if length > 0 else 0.0
            if one.alive[i]:
                expected[i] += task.numpy()[i, :, 0, 0]
        assert one.weight.grad is not None
        np.testing.assert_allclose(one.weight.grad.numpy()[:, :, 0, 0], expected, rtol=1e-9, atol=1e-14, err_msg=name)
        assert float(task.abs().sum()) > 0.0, name
    assert all(torch.equal(model.get_parameter(name).grad, grad) for name, grad in others.items())


def test_masked_rows_forget_even_a_gradient_that_is_no_number() -> None:
    model = _compacted("vgg16")
    for one in compactors.compactors(model).values():
        one.weight.grad = torch.full_like(one.weight, float("nan"))
        one.alive.zero_()
    compactors.add_penalty(model, 0.0)
    assert all(float(one.weight.grad.abs().sum()) == 0.0 for one in compactors.compactors(model).values())


def test_penalty_before_any_gradient() -> None:
    model = _compacted("vgg16")
    with pytest.raises(ValueError, match=r"compactor of features\.0 has no gradient"):
        compactors.add_penalty(model, 1e-4)


def test_penalty_drives_masked_rows_to_zero_at_its_own_pace() -> None:
    """Plain descent without a task gradient: a row of norm 1 shrinks by rate * strength a step."""
    model = _drawn("vgg16")
    compactors.install(model, ["features.0"])
    one = compactors.compactors(model)["features.0"]
    one.alive.copy_(torch.tensor([True, False, True, False]))
    optimizer = torch.optim.SGD([one.weight], lr=0.5)
    for _ in range(10):
        one.weight.grad = torch.zeros_like(one.weight)
        compactors.add_penalty(model, 0.1)
        optimizer.step()
    assert compactors.norms(model)["features.0"].tolist() == pytest.approx([0.5] * 4)


@pytest.mark.every(2)
@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("whole", [True, False])
def test_fusing_changes_no_answer(name: str, kind: torch.dtype, tolerance: float, whole: bool) -> None:
    """Where rows go, the answer is that of the network with those rows zeroed."""
    model = _compacted(name, kind).eval()
    keep = _all(model) if whole else _some(model)
    zeroed = copy.deepcopy(model)
    for conv, one in compactors.compactors(zeroed).items():
        one.weight.data[~keep[conv]] = 0.0
    with torch.no_grad():
        before = zeroed(_images(kind))
        assert before.std().item() > 0.01
        assert whole or not torch.allclose(before, model(_images(kind)), rtol=0, atol=1e-3)
        compactors.fuse(model, keep)
        after = model(_images(kind))
    assert after.dtype == kind
    assert (after - before).abs().max().item() <= tolerance * min(1.0, before.abs().max().item())


@pytest.mark.parametrize("name", NETWORKS)
def test_fused_is_the_plain_network_again(name: str) -> None:
    plain = build(name, width=0.0625).double()
    model = _compacted(name)
    for index, module in enumerate(model.modules()):
        module.training = index % 3 > 0
    modes = {key: module.training for key, module in model.named_modules()}
    own = {id(one.weight) for one in compactors.compactors(model).values()}
    everything = list(model.parameters())
    buffers = {id(buffer) for buffer in model.buffers()}
    gone = compactors.fuse(model, _some(model))
    assert {id(parameter) for parameter in gone} == own
    assert len(gone) == len(own)
    left = [id(parameter) for parameter in everything if id(parameter) not in own]
    assert [id(parameter) for parameter in model.parameters()] == left
    assert {id(buffer) for buffer in model.buffers()} <= buffers
    assert [(key, type(module)) for key, module in model.named_modules()] == [
        (key, type(module)) for key, module in plain.named_modules()
    ]
    assert all(module.training == modes[key] for key, module in model.named_modules())
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.eval()(_images()), model.eval()(_images()))
    assert compactors.fuse(model, {}) == []


def test_channels_that_go_leave_zeros_behind() -> None:
    model = _compacted("vgg16")
    keep = _some(model)
    compactors.fuse(model, keep)
    for name, kept in keep.items():
        stem, _, index = name.rpartition(".")
        conv, norm = model.get_submodule(name), model.get_submodule(f"{stem}.{int(index) + 1}")
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None and norm.running_var is not None
        assert conv.bias is not None and not conv.bias.any()
        for values in (conv.weight.flatten(1), norm.weight[:, None], norm.bias[:, None], norm.running_mean[:, None]):
            assert torch.equal(values.abs().sum(1) > 0, kept)
        assert norm.running_var[~kept].tolist() == [1.0] * int((~kept).sum())
        x = torch.randn(3, conv.in_channels, 4, 4, dtype=torch.float64)
        for train in (False, True):
            out = norm.train(train)(conv(x))
            assert torch.equal(out.abs().sum((0, 2, 3)) > 0, kept)


def test_fused_by_hand() -> None:
    """One pixel, two channels: conv 2 and -1 (bias 1, 0), BatchNorm, Q, in plain numbers."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, eps=0.0)).double()
    conv, norm = model[0], model[1]
    conv.weight.data.copy_(torch.tensor([2.0, -1.0]).reshape(2, 1, 1, 1))
    conv.bias.data.copy_(torch.tensor([1.0, 0.0]))
    norm.weight.data.copy_(torch.tensor([3.0, 0.5]))
    norm.bias.data.copy_(torch.tensor([0.25, -1.0]))
    norm.running_mean.copy_(torch.tensor([5.0, 2.0]))
    norm.running_var.copy_(torch.tensor([4.0, 0.25]))
    compactors.install(model, ["0"])
    compactors.compactors(model)["0"].weight.data.copy_(torch.tensor([[2.0, 1.0], [1.0, 1.0]]).reshape(2, 2, 1, 1))
    compactors.fuse(model, {"0": torch.tensor([True, False])})
    # first row: 2 * ((2x + 1 - 5) / 2 * 3 + 0.25) + (-x - 2) / 0.5 * 0.5 - 1 = 5x - 14.5
    for x in (-1.0, 0.0, 7.0):
        out = model.eval()(torch.full((1, 1, 1, 1), x, dtype=torch.float64))
        assert out.flatten().tolist() == pytest.approx([5.0 * x - 14.5, 0.0])
    assert conv.weight.flatten().tolist() == pytest.approx([5.0, 0.0])


def test_training_goes_on_where_it_was() -> None:
    """With batch statistics, too, the fused network is the one before: exactly where Q only scales the channels."""
    model = _drawn("resnet34")
    compactors.install(model, _convs(model))
    for one in compactors.compactors(model).values():
        factors = torch.rand(len(one.alive), dtype=torch.float64) + 0.2
        one.weight.data *= factors[:, None, None, None]
    model.train()
    images = _images(number=16)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        before = model(images)
        compactors.fuse(model, _all(model))
        after = model(images)
    assert (after - before).abs().max().item() < 1e-3 * before.abs().max().item()


def test_keep_must_know_every_compactor() -> None:
    model = _compacted("vgg16")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    keep = _all(model)
    del keep["features.24"]
    with pytest.raises(ValueError, match=r"keep says nothing of features\.24"):
        compactors.fuse(model, keep)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_fusing_only_what_was_compacted() -> None:
    model = _drawn("resnet50")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    compactors.install(model, ["layer1.0.conv1"])
    compactors.fuse(model, {"layer1.0.conv1": torch.tensor([True, False, True, True])})
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed <= {"layer1.0.conv1.weight", *(key for key in before if key.startswith("layer1.0.bn1."))}
    assert "layer1.0.conv1.weight" in changed


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(copied) -> None:  # type: ignore[no-untyped-def]
    model = _compacted("resnet34").eval()
    compactors.compactors(model)["conv1"].alive[0] = False
    twin = copied(model)
    answer = model(_images())
    assert torch.equal(twin(_images()), answer)
    assert not compactors.compactors(twin)["conv1"].alive[0]
    compactors.fuse(twin, _some(twin))
    assert len(compactors.compactors(model)) == 36
    assert torch.equal(model(_images()), answer)


def test_state_dicts_carry_compactors_and_what_is_alive() -> None:
    model = _compacted("vgg16").eval()
    compactors.compactors(model)["features.3"].alive[1] = False
    other = build("vgg16", width=0.0625).double().eval()
    compactors.install(other, _convs(other))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(_images()), model(_images()))
    assert compactors.compactors(other)["features.3"].alive.tolist() == [True, False, True, True]


def test_matching_a_state_dict_from_before_and_from_after() -> None:
    plain = build("resnet50", width=0.0625).double()
    plain_names = list(plain.state_dict())
    model = _compacted("resnet50")
    with_compactors = list(model.state_dict())
    compactors.rebuild_structure(model, with_compactors)
    assert len(compactors.compactors(model)) == 53
    compactors.rebuild_structure(model, iter([f"network.{name}" for name in with_compactors]))
    assert len(compactors.compactors(model)) == 53
    weights = {name: value.clone() for name, value in model.state_dict().items() if name in plain_names}
    compactors.rebuild_structure(model, iter(plain_names))
    assert compactors.compactors(model) == {}
    assert list(model.state_dict()) == plain_names
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model.eval()(_images()), plain.eval()(_images()))
    compactors.rebuild_structure(model, plain_names)
    assert list(model.state_dict()) == plain_names
