"""tests/compile_kernels.py: what it compiles is what networks call, and what it forgets is what has changed."""

from __future__ import annotations

import ast
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
        ("simd.py", {"conv_kernels", "inference_kernels"}),
        ("norm_kernels.py", {"norm_kernels"}),
        ("layout.py", {"layout", "sparse_weights", "conv_kernels", "norm_kernels", "op_kernels"}),
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
    assert set(stamps) == set(program.MODULES) - {"conv_kernels", "inference_kernels"}


def test_every_kernel_file_is_in_the_list(program):
    with_kernels = {path.stem for path in program.SOURCES.glob("*.py") if "@njit" in path.read_text()}
    assert with_kernels == set(program.MODULES) == set(program.CALLS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_network_in_training_finds_every_kernel_compiled(program, dtype):
    """No call with types that are not in the list: it would be compiled by every worker for itself."""
    for name, optimizer in (("resnet34", "SGD"), ("vgg16", "Adam")):
        torch.manual_seed(0)
        model = models.build(name, width=0.0625).to(dtype)
        masks = Masks(model)
        masks.set({layer: torch.rand(mask.shape) < 0.1 for layer, mask in masks.masks().items()})
        arithmetic = SparseArithmetic(model)
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
    one = njit(copy.copy(inference_kernels._pool_row.py_func))
    one(np.zeros(1, np.float32), 0, np.zeros((2, 2), np.float32)[0], 0, 0, 1)
    monkeypatch.setitem(program.CALLS, "inference_kernels", {"_pool_row": "F1 i F1 i i i"})
    monkeypatch.setattr(inference_kernels, "_pool_row", one)
    assert not foreign(program)
    one(np.zeros(1, np.float64), 0, np.zeros(2, np.float32), 0, 0, 1)
    assert set(foreign(program)) == {"_pool_row"}


def test_what_kernels_call_is_part_of_their_own_code(program):
    """Or a process that has compiled a function and its caller runs other code than one that finds the caller cached,
    and the bits of the two differ.
    """
    bodies: dict[str, tuple[str, set[str]]] = {}
    for module in program.MODULES:
        for node in ast.parse((program.SOURCES / f"{module}.py").read_text()).body:
            options = [ast.unparse(one) for one in getattr(node, "decorator_list", []) if "njit" in ast.unparse(one)]
            if options:
                calls = {one.func.id for one in ast.walk(node) if isinstance(one, ast.Call) and hasattr(one.func, "id")}
                bodies[node.name] = options[0], calls
    called = set().union(*(calls for _, calls in bodies.values())) & set(bodies)
    copying = {"_pack", "_unpack"}  # loops for several threads cannot be part of others; no sum is in them
    assert len(called) > 20
    assert {name for name in called if bodies[name][0] != "njit(**INLINED)"} == copying


COLD_OR_WARM = """
import hashlib, torch
import sparse_lab
from torch import nn
from sparse_lab import models
from sparse_lab.sparse_cpu.engine import SparseArithmetic
from sparse_lab.sparse_cpu.optimizer import LiveOptimizer
from sparse_lab.sparse_cpu.norm_kernels import norm_pool_input
from sparse_lab.sparsity.masks import Masks

torch.manual_seed(0)
model = models.build("vgg16", width=0.0625)
masks = Masks(model)
masks.set({layer: torch.rand(mask.shape) < 0.1 for layer, mask in masks.masks().items()})
arithmetic = SparseArithmetic(model)
optimizer = LiveOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), arithmetic.live)
for step in range(3):
    optimizer.zero_grad()
    nn.functional.cross_entropy(arithmetic(torch.randn(16, 3, 32, 32)), torch.arange(16) % 10).backward()
    optimizer.step()
digest = hashlib.sha256()
for value in model.state_dict().values():
    digest.update(value.numpy().tobytes())
print(sum(norm_pool_input.stats.cache_hits.values()), digest.hexdigest())
"""


@pytest.mark.full
def test_a_process_that_compiles_computes_the_bits_of_one_that_loads(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}

    def computed() -> tuple[str, str]:
        done = subprocess.run([sys.executable, "-c", COLD_OR_WARM], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        hits, digest = done.stdout.split()
        return hits, digest

    compiled, loaded = computed(), computed()
    assert (compiled[0], loaded[0]) == ("0", "1")
    assert compiled[1] == loaded[1]
