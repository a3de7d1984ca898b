"""A packed network where torch is not installed, or is not wanted: numpy arrays in and out, the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sparse_lab
from sparse_lab.export.dead_channels import reduced
from sparse_lab.export.lowering import traced
from sparse_lab.export.packed import save, save_trace
from sparse_lab.trace.capture import captured, state_of

ABOUT = {"name": "a run", "num_classes": 10, "image_size": 21, "normalise": {"mean": [0.5] * 3, "std": [0.25] * 3}}
HEAD = """
import sys
class Missing:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
import numpy as np
import sparse_lab
"""
TORCH = ("torch", "torchvision", "pytorch_lightning", "hydra", "pandas", "rich")


def process(program: str, *words: object, missing: tuple[str, ...] = TORCH, **environment: str) -> str:
    """What a process prints in which these packages cannot be imported."""
    done = subprocess.run(
        [sys.executable, "-c", HEAD.format(missing=missing) + program, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert not done.returncode, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def files(make, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("packed")
    for name, network in {"residual": "resnet8", "relu6": "mobilenet_v2", "pools": "vgg16"}.items():
        size = 32 if network == "vgg16" else 21
        model, _ = make(network, 0.125, size, 0.1)
        save(reduced(traced(model, size)), ABOUT, folder / f"{name}.sparse", "fp16" if name == "relu6" else "fp32")
    return sorted(folder.iterdir())


def test_it_answers_without_torch_to_the_bit(files, tmp_path) -> None:
    """None, one image, several and more than the kernels compute each by itself, with any number of threads."""
    for file in files:
        network = sparse_lab.load(file)
        images = torch.randn(70, *network._execute.shape, generator=torch.Generator().manual_seed(0))
        np.save(tmp_path / f"{file.stem}.npy", images.numpy())
        for count in (0, 1, 2, 70):
            torch.save(network(images[:count]), tmp_path / f"{file.stem}-{count}.pt")
    program = """
for file, images in zip(sys.argv[2::2], sys.argv[3::2]):
    network, shown = sparse_lab.load(file), np.load(images)
    for count in (0, 1, 2, 70):
        np.save(images.replace(".npy", f"-{count}.npy"), network(shown[:count]))
assert "torch" not in sys.modules
"""
    pairs = [part for file in files for part in (file, tmp_path / f"{file.stem}.npy")]
    process(program, "", *pairs)
    for file in files:
        for count in (0, 1, 2, 70):
            wanted = torch.load(tmp_path / f"{file.stem}-{count}.pt", weights_only=True)
            found = np.load(tmp_path / f"{file.stem}-{count}.npy")
            assert found.dtype == np.float32 and found.shape == wanted.shape == (count, 10)
            assert found.tobytes() == wanted.numpy().tobytes()


def test_arrays_of_any_kind_are_taken(files) -> None:
    network = sparse_lab.load(files[0])
    images = np.random.default_rng(0).standard_normal((3, *network._execute.shape)).astype(np.float32)
    wanted = network(torch.from_numpy(images))
    assert isinstance(wanted, torch.Tensor)
    still = images.copy()
    still.flags.writeable = False
    swapped = images.astype(">f4")
    strided = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    for shown in (images, still, swapped, strided, images.astype(np.float64)):
        assert np.array_equal(network(shown), wanted.numpy())
    for wrong in (images[0], images[:, :2], images[:, :, 1:]):
        lines = []
        for shown in (wrong, torch.from_numpy(wrong)):
            with pytest.raises(ValueError, match=r"images must have shape \(N, 3, \d+, \d+\), not") as caught:
                network(shown)
            lines.append(str(caught.value))
        assert lines[0] == lines[1]


def test_a_network_of_steps_says_that_it_needs_torch(own, masked, files, tmp_path) -> None:
    torch.manual_seed(0)
    model = masked(own("attends"), (3, 16, 16), 0.3)
    trace = captured(model, (3, 16, 16))
    save_trace(trace, {**state_of(trace, model.state_dict()), **trace.constants}, ABOUT, tmp_path / "steps.sparse")
    images = torch.randn(2, 3, 16, 16)
    network = sparse_lab.load(tmp_path / "steps.sparse")
    assert np.array_equal(network(images.numpy()), network(images).numpy())
    program = """
try:
    sparse_lab.load(sys.argv[1])
except sparse_lab.UserError as error:
    print(error)
"""
    for file, lacking in ((tmp_path / "steps.sparse", "torch"), (files[0], "numba"), (files[0], "safetensors")):
        line = process(program, file, missing=(lacking,))
        assert line == f"the network in {file} needs the package {lacking}, which is not here: install it"


def test_torch_that_comes_later_has_its_own_number_of_threads(files) -> None:
    program = """
network = sparse_lab.load(sys.argv[1])
network(np.zeros((5, *network._execute.shape), np.float32))
import torch
print(torch.get_num_threads())
"""
    assert process(program, files[0], missing=(), OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="2") == "1"
