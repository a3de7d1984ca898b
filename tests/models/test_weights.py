from __future__ import annotations

import hashlib
import pickle
import sys
import urllib.error
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from sparse_lab.errors import UserError
from sparse_lab.models import build, offsets
from sparse_lab.models.pruned_state import MasksLeft
from sparse_lab.models.weights import kept_masks
from sparse_lab.sparsity.masks import Masks
from sparse_lab.training.checkpoint_io import save_network

State = dict[str, Any]


def _small(weights: Path | None = None, num_classes: int = 10) -> torch.nn.Module:
    return build("resnet34", num_classes, width=0.125, weights=None if weights is None else str(weights))


@pytest.fixture
def state() -> State:
    torch.manual_seed(11)
    return dict(_small().state_dict())


def _refused(path: Path, **arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        _small(path, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("key", [None, "state_dict", "network"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_is_loaded_from_a_file(state: State, tmp_path: Path, key: str | None, zipped: bool) -> None:
    path = tmp_path / "weights.pt"
    content = state if key is None else {"epoch": 3, key: state}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = _small(path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_half_precision_weights_become_float32(state: State, tmp_path: Path) -> None:
    torch.save({key: t.half() if t.is_floating_point() else t for key, t in state.items()}, tmp_path / "half.pt")
    loaded = _small(tmp_path / "half.pt").state_dict()
    assert loaded["conv1.weight"].dtype == torch.float32
    assert torch.equal(loaded["conv1.weight"], state["conv1.weight"].half().float())


def test_a_file_from_before_batch_counts_still_loads(state: State, tmp_path: Path) -> None:
    """The VGG16 that torchvision offers dates from 2017: no num_batches_tracked in it."""
    torch.save({key: t for key, t in state.items() if not key.endswith("num_batches_tracked")}, tmp_path / "old.pth")
    loaded = _small(tmp_path / "old.pth").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_another_number_of_classes_leaves_the_classifier_at_its_start(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "ten.pt")
    torch.manual_seed(5)
    fresh = _small(num_classes=4).state_dict()
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match=r"ten\.pt is for 10 classes.*'fc'") as caught:
        loaded = _small(tmp_path / "ten.pt", num_classes=4).state_dict()
    assert caught[0].filename.endswith("test_weights.py")
    assert torch.equal(loaded["fc.weight"], fresh["fc.weight"])
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items() if name != "fc.weight")


def test_another_number_of_classes_does_not_hide_another_difference(state: State, tmp_path: Path) -> None:
    del state["layer2.0.conv1.weight"]
    torch.save(state, tmp_path / "ten.pt")
    assert "'layer2.0.conv1.weight' is missing" in _refused(tmp_path / "ten.pt", num_classes=4)


def test_a_wider_classifier_is_a_difference(state: State, tmp_path: Path) -> None:
    state["fc.weight"] = torch.zeros(4, 65)
    torch.save(state, tmp_path / "w.pt")
    assert "'fc.weight' has shape (4, 65), not (10, 64)" in _refused(tmp_path / "w.pt")


def test_the_first_missing_key_is_named_with_one_that_is_there(state: State, tmp_path: Path) -> None:
    torch.save({f"module.{key}": tensor for key, tensor in state.items()}, tmp_path / "w.pt")
    message = _refused(tmp_path / "w.pt")
    assert "does not fit resnet34" in message
    assert "'conv1.weight' is missing (it has 'module.conv1.weight')" in message


def test_an_unexpected_key_is_named(state: State, tmp_path: Path) -> None:
    torch.save({**state, "layer5.weight": torch.zeros(1)}, tmp_path / "w.pt")
    assert "'layer5.weight' is not in the network" in _refused(tmp_path / "w.pt")


def test_the_first_wrong_shape_is_named(state: State, tmp_path: Path) -> None:
    state["bn1.weight"] = torch.zeros(9)
    torch.save(state, tmp_path / "w.pt")
    assert "'bn1.weight' has shape (9,), not (8,)" in _refused(tmp_path / "w.pt")


def test_whole_numbers_are_not_taken_for_weights(state: State, tmp_path: Path) -> None:
    state["conv1.weight"] = state["conv1.weight"].to(torch.int8)
    torch.save(state, tmp_path / "w.pt")
    assert "'conv1.weight' is of type torch.int8, not torch.float32" in _refused(tmp_path / "w.pt")


def test_an_entry_that_is_no_tensor_is_named(state: State, tmp_path: Path) -> None:
    torch.save({**state, "conv1.weight": [1.0, 2.0]}, tmp_path / "w.pt")
    assert "'conv1.weight' is not a tensor" in _refused(tmp_path / "w.pt")


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in _refused(tmp_path / "nowhere.pt")
    assert "is a folder, and no run's" in _refused(tmp_path)


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {}, {1: torch.zeros(1)}, {"state_dict": {}}])
def test_a_file_without_a_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    assert "holds no state dict" in _refused(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no file of tensors"),
        (b"not a checkpoint", "no file of tensors"),
        (b"PK\x03\x04 not a zip", "cannot be read as a state dict"),
    ],
)
def test_a_damaged_file_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    assert said in _refused(tmp_path / "w.pt")


def test_half_a_file_is_refused(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "w.pt")
    whole = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(whole[: len(whole) // 2])
    assert "cannot be read as a state dict" in _refused(tmp_path / "w.pt")


class _Trap:
    """An object whose unpickling writes a file."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"open({str(self.victim)!r}, 'w').close()",))


@pytest.mark.parametrize("kind", ["pickle", "torch", "torch_old"])
def test_nothing_in_a_file_is_ever_run(kind: str, state: State, tmp_path: Path) -> None:
    path, victim = tmp_path / "w.pt", tmp_path / "was_run"
    trap = _Trap(victim)
    pickle.loads(pickle.dumps(trap))
    assert victim.exists(), "the trap must work, or the test shows nothing"
    victim.unlink()
    if kind == "pickle":
        path.write_bytes(pickle.dumps({**state, "extra": trap}, protocol=2))
    else:
        torch.save({"state_dict": state, "extra": trap}, path, _use_new_zipfile_serialization=kind == "torch")
    assert "never unpickled" in _refused(path)
    assert not victim.exists()


def test_safetensors_without_the_package_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"{}")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "needs the package safetensors" in _refused(tmp_path / "w.safetensors")


def test_safetensors_are_loaded(state: State, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state, tmp_path / "w.safetensors")
    loaded = _small(tmp_path / "w.safetensors").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 8 + b"{" * 32)
    assert "cannot be read as safetensors" in _refused(tmp_path / "w.safetensors")


def _torchvision(**arguments: Any) -> torch.nn.Module:
    return build(**{"name": "resnet34", "num_classes": 1000, "image_size": 64, "weights": "torchvision", **arguments})


def test_torchvision_weights_are_asked_for_safely_and_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    theirs = torchvision.models.resnet34(weights=None).state_dict()
    asked: list[tuple[Any, dict[str, Any]]] = []

    def get_state_dict(entry: Any, **options: Any) -> State:
        asked.append((entry, options))
        return theirs

    monkeypatch.setattr(torchvision.models.ResNet34_Weights, "get_state_dict", get_state_dict)
    loaded = _torchvision().state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in theirs.items())
    ((entry, options),) = asked
    assert entry is torchvision.models.ResNet34_Weights.IMAGENET1K_V1
    assert options["check_hash"] is True
    assert options["weights_only"] is True
    with pytest.warns(UserWarning, match="torchvision's weights of resnet34 is for 1000 classes"):
        loaded = _torchvision(num_classes=10).state_dict()
    assert loaded["fc.weight"].shape == (10, 512)
    assert torch.equal(loaded["layer4.2.conv2.weight"], theirs["layer4.2.conv2.weight"])


def _as_if_online(state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sha256: str | None = None) -> None:
    """A file in place of torchvision's server, in the old format of its older files, with a hash in its name."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    torch.save(state, tmp_path / "served", _use_new_zipfile_serialization=False)
    sha256 = sha256 or hashlib.sha256((tmp_path / "served").read_bytes()).hexdigest()
    served = (tmp_path / "served").rename(tmp_path / f"resnet34-{sha256[:8]}.pth")
    monkeypatch.setattr(torchvision.models.ResNet34_Weights, "url", served.as_uri())


def test_a_download_goes_through_torchvisions_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = torchvision.models.resnet34(weights=None).state_dict()
    _as_if_online(theirs, tmp_path, monkeypatch)
    loaded = _torchvision().state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in theirs.items())


def test_a_download_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _as_if_online({"conv1.weight": torch.zeros(1)}, tmp_path, monkeypatch, sha256="0" * 64)
    with pytest.raises(UserError, match=r"could not be downloaded \(RuntimeError: invalid hash value"):
        _torchvision()


def test_nothing_in_a_download_is_ever_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "was_run"
    _as_if_online({"conv1.weight": _Trap(victim)}, tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"could not be downloaded \(UnpicklingError"):
        _torchvision()
    assert not victim.exists()


@pytest.mark.parametrize(
    "failure",
    [
        urllib.error.URLError("no route to host"),
        RuntimeError('invalid hash value (expected "b627a593",\n got "00000000")'),
        ConnectionResetError("reset by peer"),
    ],
)
def test_a_failed_download_names_both_ways_out(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def get_state_dict(*_: Any, **__: Any) -> State:
        raise failure

    monkeypatch.setattr(torchvision.models.ResNet34_Weights, "get_state_dict", get_state_dict)
    with pytest.raises(UserError, match=r"could not be downloaded.*local file.*network") as caught:
        _torchvision()
    assert "\n" not in str(caught.value)
    assert type(failure).__name__ in str(caught.value)


def test_no_torchvision_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(UserError, match="needs the package torchvision"):
        _torchvision()


@pytest.mark.parametrize("arguments", [{"image_size": 32}, {"width": 0.5}])
def test_torchvision_weights_are_for_full_imagenet_networks_only(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def get_state_dict(*_: Any, **__: Any) -> State:
        raise AssertionError("no download must be tried")

    monkeypatch.setattr(torchvision.models.ResNet34_Weights, "get_state_dict", get_state_dict)
    with pytest.raises(UserError, match=r"image_size >= 64, 3 channels and width 1\.0 only"):
        _torchvision(**arguments)


def _pruned(path: Path) -> tuple[torch.nn.Module, State]:
    """A network that a run left, half of it pruned."""
    network = _small()
    masks = Masks(network)
    torch.manual_seed(4)
    masks.set({name: torch.rand(weight.shape) < 0.5 for name, weight in masks.weights().items()})
    save_network(network, path, {})
    return network, dict(network.state_dict())


def test_a_pruned_network_s_weights_are_taken_zero_where_it_was_pruned(tmp_path: Path) -> None:
    _, state = _pruned(tmp_path / "best.ckpt")
    with pytest.warns(MasksLeft, match=r"best\.ckpt is of a pruned network.*model\.keep_masks=true"):
        loaded = _small(tmp_path / "best.ckpt").state_dict()
    assert loaded.keys() == {key for key in state if not key.endswith(".mask")}
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.items())
    assert 0.4 < (loaded["layer1.0.conv1.weight"] == 0).double().mean() < 0.6


def test_masked_weights_that_are_not_zero_in_the_file_are_zero_here(tmp_path: Path) -> None:
    _, state = _pruned(tmp_path / "best.ckpt")
    mask = state["conv1.mask"]
    state["conv1.weight"] = torch.where(mask, torch.full((), 2.0), torch.full((), float("nan")))
    torch.save(state, tmp_path / "w.pt")
    with pytest.warns(MasksLeft):
        loaded = _small(tmp_path / "w.pt").state_dict()
    assert torch.equal(loaded["conv1.weight"], 2.0 * mask)


@pytest.mark.parametrize("kind", ["dct", "recovered"])
def test_what_is_added_to_a_pruned_network_s_weights_is_in_them(kind: str, tmp_path: Path) -> None:
    network = build("resnet8", width=0.25).double()
    if kind == "dct":
        offsets.install_dct(network)
    masks = Masks(network)
    torch.manual_seed(4)
    for weight in masks.weights().values():
        weight.data.normal_()
    masks.set({name: torch.rand(weight.shape) < 0.5 for name, weight in masks.weights().items()})
    if kind == "recovered":
        offsets.recover(network, {name: torch.randn(len(weight)) for name, weight in masks.weights().items()})
    save_network(network, tmp_path / "best.ckpt", {})
    with pytest.warns(MasksLeft), default_dtype(torch.float64):
        plain = build("resnet8", width=0.25, weights=str(tmp_path / "best.ckpt"))
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(plain.eval()(images), network.eval()(images), rtol=1e-10)
    with pytest.raises(UserError, match="dense part beside its weights"):
        kept_masks(str(tmp_path / "best.ckpt"))


@contextmanager
def default_dtype(kind: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    yield
    torch.set_default_dtype(before)


def test_a_checkpoint_of_lightning_is_loaded_by_the_network_s_own_names(state: State, tmp_path: Path) -> None:
    content = {"pytorch-lightning_version": "2", "state_dict": {f"model.{key}": one for key, one in state.items()}}
    torch.save(content, tmp_path / "last.ckpt")
    loaded = _small(tmp_path / "last.ckpt").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_the_first_three_that_do_not_fit_are_named_and_the_rest_is_counted(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError) as caught:
        build("resnet34", width=0.25, weights=str(tmp_path / "w.pt"))
    line = str(caught.value)
    assert "'conv1.weight' has shape (8, 3, 3, 3), not (16, 3, 3, 3); 'bn1.weight'" in line
    other = build("resnet34", width=0.25).state_dict()
    wrong = sum(tensor.shape != other[key].shape for key, tensor in state.items())
    assert f"; and {wrong - 3:,} more: ask for the network that it is of" in line


@pytest.mark.parametrize("what", [torch.zeros(8, 3, 3, 3).to_sparse(), torch.zeros(8, 3, 3, 3, device="meta")])
def test_tensors_without_plain_numbers_are_named(what: torch.Tensor, state: State, tmp_path: Path) -> None:
    mask = torch.ones(8, 3, 3, 3, dtype=torch.bool)
    torch.save({**state, "conv1.weight": what, "conv1.mask": mask}, tmp_path / "w.pt")
    assert "'conv1.weight' is not a tensor of plain numbers" in _refused(tmp_path / "w.pt")
