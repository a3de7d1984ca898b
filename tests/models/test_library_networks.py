"""Networks of torchvision and timm: options, channels, sizes, stems; and what is refused, in one line."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from sparse_lab.errors import UserError
from sparse_lab.models import build
from sparse_lab.sparsity.state import load_state

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "torchvision resnet18": ("torchvision", "resnet18", {}),
    "torchvision mobilenet_v3_small": ("torchvision", "mobilenet_v3_small", {}),
    "torchvision efficientnet_b0": ("torchvision", "efficientnet_b0", {}),
    "timm resnet18": ("timm", "resnet18", {}),
    "timm convnext_atto": ("timm", "convnext_atto", {}),
    "timm vit_tiny": ("timm", "vit_tiny_patch16_224", {"patch_size": 4, "depth": 2}),
    "timm mixer": ("timm", "mixer_s16_224", {}),
}
PATCHES = ("timm vit_tiny", "timm mixer")


def _build(case: str, **asked: Any) -> nn.Module:
    library, arch, options = CASES[case]
    return build(library, arch=arch, options=options, **asked)


@pytest.mark.every(4)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, (32, 48)), (4, (64, 32))])
def test_images_of_any_channels_and_shape(case: str, channels: int, size: Any) -> None:
    network = _build(case, num_classes=7, channels=channels, image_size=size).eval()
    height, width = (size, size) if isinstance(size, int) else size
    with torch.no_grad():
        assert network(torch.randn(2, channels, height, width)).shape == (2, 7)
    assert not any(getattr(module, "inplace", False) for module in network.modules())


def test_the_network_is_the_librarys_own() -> None:
    """Same seed, same weights, same logits: nothing is changed unless it is asked for."""
    torch.manual_seed(3)
    ours = _build("torchvision resnet18", num_classes=5).eval()
    torch.manual_seed(3)
    theirs = torchvision.models.resnet18(num_classes=5).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("case", [case for case in CASES if case not in PATCHES])
def test_an_adapted_stem_is_3x3_of_stride_1_without_pooling(case: str) -> None:
    sides: list[int] = []
    network = _build(case, adapt_stem=True, image_size=32).eval()
    convs = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert (convs[0].kernel_size, convs[0].stride, convs[0].padding) == ((3, 3), (1, 1), (1, 1))
    assert not any(isinstance(module, nn.MaxPool2d) for module in network.modules())
    convs[1].register_forward_pre_hook(lambda module, inputs: sides.append(inputs[0].shape[2]))
    network(torch.randn(2, 3, 32, 32))
    assert sides == [32]  # what the stem makes is as large as the image
    plain = _build(case, image_size=32)
    assert sum(p.numel() for p in network.parameters()) <= sum(p.numel() for p in plain.parameters())


def test_a_cifar_resnet18_is_torchvisions_with_an_adapted_stem() -> None:
    """The count of the literature: 11.17 M with the 3x3 stem (11,173,962 with the classifier's biases)."""
    with torch.device("meta"):
        adapted, ours = _build("torchvision resnet18", adapt_stem=True), build("resnet18")
    assert sum(p.numel() for p in adapted.parameters()) == 11_173_962
    assert sum(p.numel() for p in ours.parameters()) == 11_173_952


@pytest.mark.parametrize("case", PATCHES)
def test_a_network_of_patches_has_no_stem_to_adapt(case: str) -> None:
    with pytest.raises(UserError, match=r"cuts images into patches.*model\.options\.patch_size=4"):
        _build(case, adapt_stem=True, image_size=32)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"name": "torchvision"}, "needs the name of a network there: model.arch=resnet18"),
        ({"name": "torchvision", "arch": "resnet19"}, "did you mean 'resnet18'?"),
        ({"name": "timm", "arch": "convnext_ato"}, "did you mean 'convnext_atto'?"),
        ({"name": "resnet34", "arch": "resnet18"}, "model.arch=resnet18: for model=torchvision and model=timm only"),
        ({"name": "torchvision", "arch": "resnet18", "width": 0.5}, "has one width"),
        ({"name": "torchvision", "arch": "vit_b_16", "image_size": (32, 48)}, "reads square images, not 32x48"),
        ({"name": "torchvision", "arch": "vit_b_16", "image_size": 33}, "cannot be made as it was asked for"),
        (
            {"name": "torchvision", "arch": "resnet18", "options": {"progress": True}},
            "model.options.progress: no option",
        ),
        ({"name": "torchvision", "arch": "resnet18", "options": {"groups": "two"}}, "takes a number there"),
        ({"name": "timm", "arch": "resnet18", "options": {"checkpoint_path": "x"}}, "no option of timm resnet18"),
        ({"name": "timm", "arch": "resnet18", "options": {"pretrained": True}}, "no option of timm resnet18"),
        ({"name": "timm", "arch": "resnet18", "options": {"kwargs": 1}}, "no option of timm resnet18"),
        ({"name": "vit", "options": {"deth": 3}}, "did you mean 'depth'?"),
        ({"name": "vit", "options": {"depth": 2.5}}, "vit takes a whole number there"),
        ({"name": "vit", "options": {"depth": True}}, "vit takes a whole number there"),
        ({"name": "vit", "options": {"patch_size": 5}}, "patch_size=5 does not divide images of 32x32"),
        ({"name": "vit", "options": {"heads": 0}}, "model.options.heads=0 must be 1 or more"),
        ({"name": "vgg16", "options": {"depth": 3}}, "vgg16 has no options"),
        ({"name": "vgg16", "adapt_stem": True}, "begins with a convolution of stride 1 as it is"),
        ({"name": "vgg16", "channels": 0}, "channels must be a whole number, 1 or more, not 0"),
        ({"name": "resnet18", "image_size": (32, 7)}, "at least 8 pixels, not 32x7"),
    ],
)
def test_what_is_refused_in_one_line(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        build(**asked)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_timm_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'sparse_lab\[timm\]'"):
        build("timm", arch="resnet18")


def test_weights_of_a_file_and_of_no_network(tmp_path: Any) -> None:
    """A file's weights are loaded before the stem is changed, and what is new is said."""
    torch.manual_seed(0)
    state = _build("timm resnet18", num_classes=1000).state_dict()
    torch.save(state, tmp_path / "imagenet.pt")
    with pytest.warns(UserWarning) as said:
        network = _build("timm resnet18", adapt_stem=True, weights=str(tmp_path / "imagenet.pt"))
    assert any("first convolution of timm resnet18 is new" in str(one.message) for one in said)
    assert any("is for 1000 classes" in str(one.message) for one in said)
    loaded = network.state_dict()
    assert torch.equal(loaded["layer1.0.conv1.weight"], state["layer1.0.conv1.weight"])
    assert loaded["conv1.weight"].shape == (64, 3, 3, 3)


def test_colour_weights_for_grey_images(tmp_path: Any) -> None:
    torch.manual_seed(0)
    for channels in (3, 1):
        torch.save(_build("timm resnet18", channels=channels).state_dict(), tmp_path / f"{channels}.pt")
    with pytest.warns(UserWarning, match="first convolution of timm resnet18 is new"):
        assert _build("timm resnet18", channels=1, weights=str(tmp_path / "3.pt")).conv1.weight.shape[1] == 1
    loaded = _build("timm resnet18", channels=1, weights=str(tmp_path / "1.pt")).state_dict()
    assert torch.equal(loaded["conv1.weight"], torch.load(tmp_path / "1.pt", weights_only=True)["conv1.weight"])


@pytest.mark.parametrize("arch", ["regnet_y_400mf", "regnet_x_400mf", "mnasnet0_5"])
def test_networks_that_look_at_tensors_while_they_are_made(arch: str) -> None:
    """On the device "meta" a tensor has no value to look at."""
    with torch.device("meta"):
        hollow = build("torchvision", 7, arch=arch)
    real = build("torchvision", 7, arch=arch)
    assert all(one.is_meta for one in hollow.parameters())
    assert [one.shape for one in hollow.state_dict().values()] == [one.shape for one in real.state_dict().values()]


def test_a_state_dict_that_lost_its_versions_is_loaded_all_the_same() -> None:
    """MNASNet asks for one, as few modules do."""
    network = build("torchvision", 7, arch="mnasnet0_5")
    state = {name: torch.full_like(one, 0.5) for name, one in network.state_dict().items()}
    load_state(network, state)
    assert all(bool((one == 0.5).all()) for one in network.parameters())


def test_a_download_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    real = timm.create_model

    def create(model_name: str, pretrained: bool = False, **rest: Any) -> nn.Module:
        if pretrained:
            raise OSError("no network\nhere")
        return real(model_name, **rest)

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(UserError, match=r"timm's weights of resnet18 could not be had \(OSError: no network here\)"):
        _build("timm resnet18", weights="timm")
