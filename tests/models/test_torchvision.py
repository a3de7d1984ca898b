"""The ImageNet variants against torchvision's networks, with weights handed over in a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from sparse_lab.models import build

THEIR_NAMES = {"vgg16": "vgg16_bn", "resnet34": "resnet34", "resnet50": "resnet50", "mobilenet_v2": "mobilenet_v2"}


def _random_state(network: nn.Module) -> dict[str, torch.Tensor]:
    """Random values for every entry of a state dict, with BatchNorm statistics away from 0 and 1.

    Linear weights are overlapping windows into one short random vector: VGG16's 124 M of them then take 100 kB on disk.
    """
    generator = torch.Generator().manual_seed(3)
    state = {}
    for key, tensor in network.state_dict().items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(7)
        elif tensor.ndim == 4:
            fan_in = tensor[0].numel()
            state[key] = torch.randn(tensor.shape, generator=generator) * (2 / fan_in) ** 0.5
        elif tensor.ndim == 2:
            rows, columns = tensor.shape
            base = torch.randn(7 * rows + columns, generator=generator) * (2 / columns) ** 0.5
            state[key] = base.as_strided((rows, columns), (7, 1))
        elif key.endswith("bias") or key.endswith("running_mean"):
            state[key] = 0.1 * torch.randn(tensor.shape, generator=generator)
        else:
            state[key] = 0.5 + torch.rand(tensor.shape, generator=generator)
    return state


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        pytest.param("vgg16", torch.float32, 1e-5, marks=pytest.mark.full),  # 138 M weights
        pytest.param("resnet34", torch.float64, 1e-12, marks=pytest.mark.full),
        pytest.param("resnet50", torch.float64, 1e-12, marks=pytest.mark.full),
        ("mobilenet_v2", torch.float64, 1e-12),
    ],
)
def test_same_outputs_as_torchvision_with_the_same_state_dict(
    name: str, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    with torch.device("meta"):
        theirs: nn.Module = torchvision.models.get_model(THEIR_NAMES[name], weights=None)
    state = _random_state(theirs)
    theirs.load_state_dict(state, assign=True)
    torch.save(state, tmp_path / "theirs.pth")
    ours = build(name, num_classes=1000, image_size=64, weights=str(tmp_path / "theirs.pth"))

    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(4)).to(dtype)
    for training in (False, True):  # training: batch statistics, and dropout under the same seed
        outputs = []
        for network in (ours.to(dtype), theirs.to(dtype)):
            network.train(training)
            torch.manual_seed(5)
            with torch.no_grad():
                outputs.append(network(images))
        assert outputs[1].std(dim=0).min() > 1e-3, "the images must not all look the same to the network"
        largest = outputs[1].abs().max().item()
        torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=tolerance * largest)
    after = ours.state_dict()
    for key, tensor in theirs.state_dict().items():  # the running statistics moved in the training pass
        torch.testing.assert_close(after[key], tensor, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", THEIR_NAMES)
def test_as_many_weights_as_torchvision(name: str) -> None:
    with torch.device("meta"):
        ours = build(name, num_classes=1000, image_size=224)
        theirs = torchvision.models.get_model(THEIR_NAMES[name], weights=None)

    def count(network: nn.Module) -> int:
        return sum(parameter.numel() for parameter in network.parameters() if parameter.ndim > 1)

    assert count(ours) == count(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
