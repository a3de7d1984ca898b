"""The same step gives the same bits: in used memory and in new, on one thread and on several."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator

import numba
import pytest
import torch
from torch import Tensor, nn

from sparse_lab import models
from sparse_lab.models import dyrelu, weight_sharing
from sparse_lab.sparse_cpu.engine import SparseArithmetic
from sparse_lab.sparsity.masks import Masks

SEVERAL = min(4, numba.config.NUMBA_NUM_THREADS)


def vgg16() -> nn.Module:
    return models.build("vgg16", 10, 0.25, 32)


def resnet34() -> nn.Module:
    model = models.build("resnet34", 10, 0.25, 15)
    weight_sharing.share(model)
    dyrelu.install(model, 15)
    return model


def mobilenet_v2() -> nn.Module:
    return models.build("mobilenet_v2", 10, 0.25, 16)


NETWORKS = {vgg16: (24, 3, 32, 32), resnet34: (22, 3, 15, 15), mobilenet_v2: (96, 3, 16, 16)}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


def masked(build) -> nn.Module:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = build()
    masks = Masks(model)
    masks.set({name: torch.rand(mask.shape) < 0.1 for name, mask in masks.masks().items()})
    return model


def step(arithmetic: SparseArithmetic, images: Tensor) -> dict[str, Tensor]:
    """Everything that a step leaves, on a network that it starts from anew."""
    model = arithmetic.model
    before = copy.deepcopy(model.state_dict())
    model.zero_grad()
    for live in arithmetic.live.values():
        live.gradient = None
    torch.manual_seed(3)
    logits = arithmetic(images)
    logits.square().sum().backward()
    left = {"logits": logits.detach()}
    for name, parameter in model.named_parameters():
        live = arithmetic.live.get(parameter)
        left[name] = parameter.grad if live is None else torch.from_numpy(live.gradient)
    left |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.load_state_dict(before)
    return left


def differences(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


@pytest.mark.every(3)
@pytest.mark.parametrize("build", NETWORKS, ids=lambda build: build.__name__)
def test_a_step_in_used_memory_gives_the_bits_of_one_in_new(build) -> None:  # type: ignore[no-untyped-def]
    model = masked(build)
    images = torch.randn(NETWORKS[build])
    arithmetic = SparseArithmetic(model)
    first = step(arithmetic, images)
    assert all(one.isfinite().all() for one in first.values())
    step(arithmetic, torch.randn_like(images) * 100)
    assert differences(first, step(arithmetic, images)) == []
    assert differences(first, step(SparseArithmetic(model), images)) == []


@pytest.mark.every(3)
@pytest.mark.skipif(SEVERAL < 2, reason="there is one thread only")
@pytest.mark.parametrize("build", NETWORKS, ids=lambda build: build.__name__)
def test_threads_change_no_bit(build) -> None:  # type: ignore[no-untyped-def]
    model = masked(build)
    images = torch.randn(NETWORKS[build])
    arithmetic = SparseArithmetic(model)
    found = []
    for number in (1, SEVERAL, 1, SEVERAL):
        numba.set_num_threads(number)
        found.append(step(arithmetic, images))
    assert [differences(found[0], one) for one in found] == [[], [], [], []]


@pytest.mark.full
def test_torch_keeps_its_threads_whatever_numba_starts():
    """In a process of its own: threads are started once. Two runs of one process would differ, and small ones crawl."""
    program = """
import numpy as np, torch
from sparse_lab import models
from sparse_lab.sparse_cpu.engine import SparseArithmetic
from sparse_lab.sparsity.masks import Masks
torch.set_num_threads(1)
model = models.build("vgg16", width=0.0625)
masks = Masks(model)
masks.set({name: torch.rand(mask.shape) < 0.1 for name, mask in masks.masks().items()})
SparseArithmetic(model)(torch.ones(4, 3, 32, 32)).sum().backward()
print(torch.get_num_threads())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.split() == ["1"], done.stdout + done.stderr
