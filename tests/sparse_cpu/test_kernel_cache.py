"""tests/compile_kernels.py: what it compiles is what networks call, and what it forgets is what has changed."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import njit
from torch import nn

from sparse_lab import models
from sparse_lab.sparse_cpu import inference_kernels
from sparse_lab.sparse_cpu import kernel as kernels
from sparse_lab.sparse_cpu.engine import SparseArithmetic
from sparse_lab.sparse_cpu.optimizer import LiveOptimizer
from sparse_lab.sparsity.masks import Masks

PROGRAM = Path(__file__).resolve().parents[1] / "compile_kernels.py"


@pytest.fixture
def program():
    spec = importlib.util.spec_from_file_location("compile_kernels", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def elsewhere(program, tmp_path, monkeypatch):
    """The program over a copy of the sources, with a cache of its own that it believes whole; it compiles nothing."""
    shutil.copytree(program.SOURCES, tmp_path / "compute", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(program, "SOURCES", tmp_path / "compute")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    compiled = []
    monkeypatch.setattr(program, "compile_all", compiled.extend)
    program.main([])
    assert compiled == list(program.MODULES)
    compiled.clear()
    for module in program.MODULES:
        (tmp_path / "cache" / f"{module}.some-1.py311.nbi").touch()
        (tmp_path / "cache" / f"{module}.some-1.py311.1.nbc").touch()
    return program, compiled


def cached(program) -> set[str]:
    return {path.name.split(".")[0] for path in (program.SOURCES.parent / "cache").glob("*.nb?")}


def append(program, name: str) -> None:
    with (program.SOURCES / name).open("a") as file:
        file.write("\n# changed\n")


def test_with_nothing_changed_nothing_is_done(elsewhere):
    program, compiled = elsewhere
    program.main([])
    assert not compiled and cached(program) == set(program.MODULES)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("source", "gone"),
    [
        ("simd.py", {"conv_kernels", "inference_kernels", "border_kernels"}),
        ("norm_kernels.py", {"norm_kernels"}),
        (
            "layout_kernels.py",
            {f"{name}_kernels" for name in ("layout", "conv", "norm", "op", "image", "dyrelu", "border")},
        ),
        ("ops.py", set()),
    ],
)
def test_what_is_made_from_a_changed_file_is_forgotten_and_compiled_again(elsewhere, source, gone):
    program, compiled = elsewhere
    append(program, source)
    program.main(["--forget"])
    assert not compiled and cached(program) == set(program.MODULES) - gone
    program.main([])
    assert set(compiled) == gone
    compiled.clear()
    program.main([])
    assert not compiled


def test_a_stamp_is_only_kept_for_what_was_compiled(elsewhere, monkeypatch):
    program, _ = elsewhere
    append(program, "simd.py")

    def fail(modules):
        raise SystemExit("a kernel does not compile")

    monkeypatch.setattr(program, "compile_all", fail)
    with pytest.raises(SystemExit):
        program.main([])
    stamps = json.loads(next((program.SOURCES.parent / "cache").glob("kernels-*.json")).read_text())
    assert set(stamps) == set(program.MODULES) - {"conv_kernels", "inference_kernels", "border_kernels"}


def test_every_kernel_file_is_in_the_list(program):
    with_kernels = {path.stem for path in program.SOURCES.glob("*.py") if "@kernel(" in path.read_text()}
    assert with_kernels == set(program.MODULES) == set(program.CALLS)


@pytest.mark.parametrize(
    ("dtype", "storage"), [(torch.float32, "float32"), (torch.float64, "float32"), (torch.float32, "bf16")]
)
def test_a_network_in_training_finds_every_kernel_compiled(program, dtype, storage):
    """No call with types that are not in the list: it would be compiled by every worker for itself."""
    for name, optimizer in (("resnet34", "SGD"), ("vgg16", "Adam")):
        torch.manual_seed(0)
        model = models.build(name, width=0.0625).to(dtype)
        masks = Masks(model)
        masks.set({layer: torch.rand(mask.shape) < 0.1 for layer, mask in masks.masks().items()})
        arithmetic = SparseArithmetic(model, storage=storage)
        moving = LiveOptimizer(getattr(torch.optim, optimizer)(model.parameters(), lr=0.1), arithmetic.live)
        nn.functional.cross_entropy(arithmetic(torch.randn(4, 3, 32, 32, dtype=dtype)), torch.arange(4)).backward()
        moving.step()
    assert not foreign(program)


def foreign(program) -> dict[str, set]:
    """Kernel -> types that it was called with though they are not in the list, in this process so far."""
    found = {}
    for name in program.MODULES:
        module = importlib.import_module(f"sparse_lab.sparse_cpu.{name}")
        listed = program.signatures(name)
        for kernel in program.CALLS[name]:
            called = set(getattr(module, kernel).signatures) - {types for one, types in listed if one == kernel}
            if called:
                found[kernel] = called
    return found


def test_a_call_with_other_types_is_seen(program, monkeypatch):
    one = njit(copy.copy(inference_kernels._own.py_func))
    op = np.zeros(inference_kernels.COLUMNS, np.int64)
    one(op, 0, 0, 0, np.zeros((2, 2), np.int64)[0])
    monkeypatch.setitem(program.CALLS, "inference_kernels", {"_own": "I1 i i i I1"})
    monkeypatch.setattr(inference_kernels, "_own", one)
    assert not foreign(program)
    one(op, 0, 0, 0, np.zeros(2))
    assert set(foreign(program)) == {"_own"}


SOMEBODYS = """
from numba import prange
from sparse_lab.sparse_cpu.kernel import KERNEL, kernel

@kernel(parallel=True, **KERNEL)
def total(x):
    found = 0.0
    for i in prange(x.size):
        found += x[i]
    return found
"""


@pytest.fixture
def somebodys(tmp_path, monkeypatch):
    """A module of a kernel that no cache holds."""
    (tmp_path / "somebodys.py").write_text(SOMEBODYS)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("somebodys")
    sys.modules.pop("somebodys")


def test_a_kernel_is_loaded_by_the_process_that_first_calls_it_too(somebodys, recwarn):
    for dtype in (np.float32, np.float64):
        assert somebodys.total(np.ones(7, dtype)) == 7.0
    assert list(somebodys.total.stats.cache_hits.values()) == [1, 1] and not somebodys.total.stats.cache_misses
    assert not recwarn.list


@pytest.mark.parametrize(
    ("where", "name", "value", "said"),
    [
        (kernels, "PROGRAM", "raise SystemExit('no memory')", "no memory"),
        (sys, "executable", "/nowhere/python", "No such file"),
    ],
)
def test_where_no_other_process_can_compile_it_is_compiled_here_and_that_is_said(
    where, name, value, said, somebodys, monkeypatch
):
    monkeypatch.setattr(where, name, value)
    with pytest.warns(UserWarning, match=rf"kernel total is compiled in this process, .*{said}.*last bit"):
        assert somebodys.total(np.ones(7)) == 7.0
    assert list(somebodys.total.stats.cache_misses.values()) == [1]


ONE_KERNEL = """
import hashlib
import numpy as np
import sparse_lab
from sparse_lab.sparse_cpu.norm_kernels import norm

source = np.random.default_rng(0)
z, residual, out = (source.standard_normal(8 * 16 * 9 * 9 * 8).astype(np.float32) for _ in range(3))
mean, scale, shift = (source.standard_normal(16).astype(np.float32) for _ in range(3))
affine = (mean, scale, shift, np.float32(0), np.float32(3e38))
norm(z, residual, out, (8, 8, 16, 8, 8, 8), np.arange(16), affine)
print(hashlib.sha256(out.tobytes()).hexdigest())
"""
NETWORKS = """
import hashlib, torch
import sparse_lab
from torch import nn
from sparse_lab import models
from sparse_lab.models import dyrelu
from sparse_lab.sparse_cpu.engine import SparseArithmetic
from sparse_lab.sparse_cpu.optimizer import LiveOptimizer
from sparse_lab.sparsity.masks import Masks

for name, optimizer in (("vgg16", torch.optim.SGD), ("resnet34", torch.optim.Adam)):
    torch.manual_seed(0)
    model = models.build(name, width=0.125)
    if name == "resnet34":
        dyrelu.install(model, 32)
    masks = Masks(model)
    masks.set({layer: torch.rand(mask.shape) < 0.1 for layer, mask in masks.masks().items()})
    arithmetic = SparseArithmetic(model)
    moving = LiveOptimizer(optimizer(model.parameters(), lr=0.1), arithmetic.live)
    for step in range(3):
        moving.zero_grad()
        nn.functional.cross_entropy(arithmetic(torch.randn(32, 3, 32, 32)), torch.arange(32) % 10).backward()
        moving.step()
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.numpy().tobytes())
    print(name, digest.hexdigest())
"""


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(ONE_KERNEL, id="one kernel", marks=pytest.mark.full),
        pytest.param(NETWORKS, id="networks", marks=pytest.mark.nightly),
    ],
)
def test_the_first_process_computes_the_bits_of_the_next(what, tmp_path):
    """The kernel is the one that did not, and networks call them all."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}

    def computed() -> list[str]:
        done = subprocess.run([sys.executable, "-c", what], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    first, next_one = computed(), computed()
    assert first and first == next_one


ONCE = """
import somebodys
import numpy as np
assert somebodys.total(np.ones(7)) == 7.0
print(list(somebodys.total.stats.cache_hits.values()), somebodys.total._cache.cache_path)
"""


@pytest.mark.full
def test_where_neither_package_nor_home_can_be_written_a_temporary_folder_is_used_and_that_is_said_once(tmp_path):
    (tmp_path / "somebodys.py").write_text(SOMEBODYS)
    (tmp_path / "__pycache__").touch()  # not even root makes a folder of it
    (tmp_path / "tmp").mkdir()
    path = os.pathsep.join([str(tmp_path), str(Path(kernels.__file__).parents[2])])
    environment = {**os.environ, "HOME": "/dev/null", "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": path}
    environment = {key: value for key, value in environment.items() if not key.startswith(("NUMBA", "XDG"))}
    first, second = (
        subprocess.run([sys.executable, "-c", ONCE], env=environment, capture_output=True, text=True, cwd="/")
        for _ in range(2)
    )
    [folder] = (tmp_path / "tmp").iterdir()
    for done in (first, second):
        assert done.returncode == 0 and done.stdout.startswith(f"[1] {folder}/"), done.stderr
    assert first.stderr.count(f"kernels are compiled into {folder}:") == 1 and not second.stderr
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(kernels.config, "CACHE_DIR", "")
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    return tmp_path / f"sparse_lab-kernels-{os.geteuid()}"


@pytest.mark.parametrize("how", ["link", "everybody's", "file"])
def test_a_temporary_folder_that_somebody_else_may_write_to_is_not_used(how, temporary):
    """What lies in it is unpickled."""
    if how == "link":
        temporary.symlink_to(temporary.parent)
    elif how == "file":
        temporary.touch()
    else:
        temporary.mkdir()
        temporary.chmod(0o777)
    with pytest.warns(UserWarning, match="kernels are compiled into"):
        assert kernels._use_temporary_folder()
    used = Path(os.environ["NUMBA_CACHE_DIR"])
    assert used != temporary and used.parent == temporary.parent and used.stat().st_mode & 0o777 == 0o700


def test_without_any_folder_each_process_compiles_for_itself_and_says_so(temporary, monkeypatch):
    monkeypatch.setattr(kernels.tempfile, "tempdir", "/dev/null")
    with pytest.warns(UserWarning, match="kernels are compiled anew in every process"):
        assert not kernels._use_temporary_folder()
