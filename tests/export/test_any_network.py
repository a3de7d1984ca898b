"""Networks that are not this project's, in every format, against themselves in float64."""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparse_lab
from sparse_lab.errors import UserError
from sparse_lab.export import onnx, onnx_trace, packed
from sparse_lab.export.dead_channels import reduced
from sparse_lab.export.export import Network, network
from sparse_lab.export.graph import check
from sparse_lab.export.mixed import MixedNetwork
from sparse_lab.export.runtime import SparseNetwork
from sparse_lab.trace.capture import captured, state_of
from sparse_lab.trace.trace import TracedNetwork

BATCHES = (1, 3, 17)
OWN = ("functional", "reshaped", "attends")
LIBRARIES = {
    "torchvision": "resnet18 mobilenet_v3_small efficientnet_b0 convnext_tiny vit_b_16 swin_t densenet121 "
    "shufflenet_v2_x0_5 regnet_y_400mf squeezenet1_1 googlenet",
    "timm": "resnet18 convnext_atto vit_tiny_patch16_224 mixer_s16_224 efficientnet_b0 mobilenetv3_small_100 "
    "swin_tiny_patch4_window7_224",
}
ABOUT = {"network": "x", "num_classes": 5}


def _network(model: nn.Module, shape: tuple[int, ...]) -> Network:
    trace = captured(model, shape)
    return network(trace, {**state_of(trace, model.state_dict()), **trace.constants})


def _packed(found: Network, path: Path) -> SparseNetwork | MixedNetwork:
    if found.graph is None:
        packed.save_trace(found.trace, found.tensors, ABOUT, path)
    else:
        packed.save(found.graph, ABOUT, path)
    return sparse_lab.load(path)


def _onnx(found: Network, path: Path):
    if found.graph is None:
        pytest.importorskip("onnxscript")
        onnx_trace.save(found.trace, found.tensors, ABOUT, path)
    else:
        onnx.save(found.graph, ABOUT, path)
    return onnx.runner(path)


def _assert_same(run, model: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(images.double())
    assert (wanted - wanted.mean(0)).abs().max() > 5e-5 * wanted.abs().max(), "the image makes no difference"
    for count in BATCHES:
        found = run(images[:count])
        assert found.shape == (count, wanted.shape[1]) and found.dtype == torch.float32
        assert (found - wanted[:count]).abs().max() <= 1e-5 * wanted.abs().max(), count


@pytest.mark.every(3)
@pytest.mark.parametrize(
    "shape", [(3, 16, 28), *(pytest.param(s, marks=pytest.mark.nightly) for s in ((1, 16, 16), (5, 12, 8)))]
)
@pytest.mark.parametrize("name", OWN)
def test_networks_as_people_write_them(own, masked, name, shape, tmp_path) -> None:
    torch.manual_seed(1)
    more = {"size": shape[1:]} if name == "attends" else {}
    model = masked(own(name, channels=shape[0], **more), shape, 0.25)
    images = torch.randn(17, *shape)
    found = _network(model, shape)
    assert (found.graph is not None) == (name == "functional")
    _assert_same(_packed(found, tmp_path / "net.sparse"), model, images)
    if shape[0] == 3 or name == "functional":
        _assert_same(_onnx(found, tmp_path / "net.onnx"), model, images)
    network = sparse_lab.load(tmp_path / "net.sparse")
    assert network(images[:0]).shape == (0, 5) and network.about == ABOUT
    with pytest.raises(ValueError, match="images must have shape"):
        network(torch.zeros(2, shape[0], shape[1], shape[2] + 1))


@pytest.mark.parametrize("name", OWN)
def test_a_trace_computes_what_the_network_does(own, masked, name) -> None:
    torch.manual_seed(0)
    model = masked(own(name), (3, 16, 16), 0.5)
    trace = captured(model, 16)
    images = torch.randn(3, 3, 16, 16)
    again = TracedNetwork(trace, {**state_of(trace, model.state_dict()), **trace.constants})
    with torch.no_grad():
        # attention has a path of its own in torch where nothing is traced
        assert torch.allclose(again(images), model(images), rtol=1e-6, atol=1e-6 if name == "attends" else 0.0)
    assert {name for name, _ in model.named_parameters()} == set(trace.parameters)


CASES = [(library, arch) for library, archs in LIBRARIES.items() for arch in archs.split()]


@pytest.mark.parametrize("density", [0.1, pytest.param(0.01, marks=pytest.mark.nightly)])
@pytest.mark.parametrize(
    "library, arch",
    [
        pytest.param(*case, marks=[] if case == ("torchvision", "shufflenet_v2_x0_5") else pytest.mark.full)
        for case in CASES
    ],
)
def test_libraries_networks_packed(library_network, masked, library, arch, density, tmp_path) -> None:
    torch.manual_seed(0)
    model, shape = library_network(library, arch)
    model = masked(model, shape, density)
    found = _network(model, shape)
    _assert_same(_packed(found, tmp_path / "net.sparse"), model, torch.randn(17, *shape))
    kept = sum(int(torch.count_nonzero(weight)) for weight in model.parameters())
    assert (tmp_path / "net.sparse").stat().st_size < 5.2 * kept + 200 * len(found.trace.steps) + 4096


@pytest.mark.nightly
@pytest.mark.parametrize("density", [0.1, 0.01])
@pytest.mark.parametrize("library, arch", CASES)
def test_libraries_networks_in_onnx(library_network, masked, library, arch, density, tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, shape = library_network(library, arch)
    model = masked(model, shape, density)
    _assert_same(_onnx(_network(model, shape), tmp_path / "net.onnx"), model, torch.randn(17, *shape))


def test_onnx_says_what_the_file_is_and_a_missing_package_is_named(own, masked, tmp_path, monkeypatch) -> None:
    model = masked(own("reshaped"), (3, 16, 16), 0.5)
    found = _network(model, (3, 16, 16))
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(UserError, match=r"onnxscript is needed for this: pip install 'sparse_lab\[onnx\]'"):
            onnx_trace.save(found.trace, found.tensors, ABOUT, tmp_path / "net.onnx")
    pytest.importorskip("onnxscript")
    import onnx as library

    onnx_trace.save(found.trace, found.tensors, ABOUT, tmp_path / "net.onnx")
    model = library.load(tmp_path / "net.onnx")
    assert {prop.key: prop.value for prop in model.metadata_props} == {"network": "x", "num_classes": "5"}
    assert [(value.name, value.type.tensor_type.shape.dim[0].dim_value) for value in model.graph.input] == [
        ("images", 0)
    ]


class _Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.fft(x).abs().mean((2, 3)))


class _Depends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        return self.head(x if x.sum() > 0 else -x)


class _Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        return self.head(x + torch.randn_like(x))


class _OfThree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3))).reshape(3, 2)


@pytest.mark.parametrize(
    "model, said",
    [
        (_Spectral(), "aten.fft_fft"),
        (_Depends(), "depends on the numbers in an image"),
        (_Draws(), "aten.randn_like"),
        (_OfThree(), "torch.export cannot follow this network"),
    ],
)
def test_what_cannot_be_exported_is_one_line_that_names_it(model, said) -> None:
    with pytest.raises(UserError, match=said) as error:
        captured(model, 8)
    assert "\n" not in str(error.value) and "--to torch" in str(error.value) and model.training


def test_dead_channels_of_a_functional_network_go(own, masked) -> None:
    model = masked(own("functional"), (3, 16, 16), 1.0)
    with torch.no_grad():
        model.first.weight[0] = 0.0
    found = _network(model, (3, 16, 16))
    assert found.graph is not None and len(found.graph.maps[1].channels) == 7
    check(reduced(found.graph))


@pytest.fixture
def file(own, masked, tmp_path) -> Path:
    torch.manual_seed(0)
    found = _network(masked(own("attends"), (3, 16, 16), 0.3), (3, 16, 16))
    packed.save_trace(found.trace, found.tensors, ABOUT, tmp_path / "net.sparse")
    return tmp_path / "net.sparse"


def _rewritten(file: Path, change) -> None:
    """The file with another head, and the checksum that belongs to it: made by somebody who knows the format."""
    from safetensors.numpy import load
    from safetensors.numpy import save as serialise

    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    head = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["sparse_lab"])
    head["checksum"] = packed.UNKNOWN
    change(head)
    new = serialise(load(content), {"sparse_lab": json.dumps(head)})
    file.write_bytes(new.replace(packed.UNKNOWN.encode(), hashlib.sha256(new).hexdigest().encode(), 1))


def _first(head, name):
    return next(step for step in head["trace"]["steps"] if step[0] == name)


HOSTILE = {
    "an operation that is not listed": lambda head: head["trace"]["steps"].__setitem__(0, ["system", {}]),
    "one that writes": lambda head: head["trace"]["steps"].__setitem__(0, ["relu_", {"self": {"value": 0}}]),
    "python's": lambda head: _first(head, "conv2d").__setitem__(0, "__import__"),
    "one of torch": lambda head: _first(head, "conv2d").__setitem__(0, "from_file"),
    "another argument": lambda head: _first(head, "conv2d")[1].update(out={"value": 0}),
    "what comes later": lambda head: _first(head, "conv2d")[1].update(input={"value": 9}),
    "what is before the first": lambda head: _first(head, "conv2d")[1].update(input={"value": -1}),
    "a tensor that is not there": lambda head: _first(head, "conv2d")[1].update(weight={"tensor": "x"}),
    "a shape that does not fit": lambda head: _first(head, "conv2d")[1].update(stride=[3, 3]),
    "a stride of nothing": lambda head: _first(head, "conv2d")[1].update(stride=[0, 0]),
    "padding without end": lambda head: _first(head, "conv2d")[1].update(padding=[10**9, 10**9]),
    "a number beyond 64 bits": lambda head: _first(head, "conv2d")[1].update(padding=[2**70, 1]),
    "text for a number": lambda head: _first(head, "layer_norm")[1].update(eps="x" * 10**6),
    "a huge tensor": lambda head: head["tensors"][0].update(shape=[2**40]),
    "a negative one": lambda head: head["tensors"][0].update(shape=[-1]),
    "more weights than there are": lambda head: head["tensors"][0].update(weights=10**6, bits=0, bytes=8, scale=1.0),
    "an image of nothing": lambda head: head["trace"].update(images=[3, 0, 16]),
    "a huge image": lambda head: head["trace"].update(images=[3, 2**16, 2**16]),
    "no logits": lambda head: head["trace"].update(result=1),
    "a result that is not there": lambda head: head["trace"].update(result=10**6),
    "a random drop": lambda head: _first(head, "scaled_dot_product_attention")[1].update(dropout_p=0.5),
    "no trace": lambda head: head.update(trace=[]),
    "steps in steps": lambda head: head["trace"].update(steps=[[[[[["relu"]]]]]]),
    "an unknown type of numbers": lambda head: head["tensors"][0].update(type="object", size=8),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_trace_that_is_not_what_it_says_is_refused_in_one_line(what, file) -> None:
    _rewritten(file, HOSTILE[what])
    with pytest.raises(UserError, match="is not what it says it is") as error:
        sparse_lab.load(file)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_any_flipped_byte_of_a_trace_is_refused(file, tmp_path) -> None:
    content = file.read_bytes()
    damaged = tmp_path / "damaged.sparse"
    for place in range(0, len(content), 211):
        damaged.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError) as error:
            sparse_lab.load(damaged)
        assert "\n" not in str(error.value), place
    damaged.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="truncated"):
        sparse_lab.load(damaged)


def test_float16_rounds_weights_alone(own, masked, tmp_path) -> None:
    torch.manual_seed(0)
    model = masked(own("reshaped"), (3, 16, 16), 0.5)
    found = _network(model, (3, 16, 16))
    packed.save_trace(found.trace, found.tensors, ABOUT, tmp_path / "half.sparse", "fp16")
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        wanted = model(images)
    off = (sparse_lab.load(tmp_path / "half.sparse")(images) - wanted).abs().max() / wanted.abs().max()
    assert 1e-6 < off < 1e-2
