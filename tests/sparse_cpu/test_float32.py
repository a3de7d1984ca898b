"""Whole networks in float32: no further from float64 than torch's own NCHW arithmetic is, and the same predictions."""

from __future__ import annotations

import copy
import statistics

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_lab import models
from sparse_lab.sparse_cpu.engine import SparseArithmetic

NETWORKS = {"vgg16": (32, 0.125), "resnet34": (8, 0.125)}  # image size, width
# depthwise convolutions of float64 take torch seconds whatever their size
WIDER = {"resnet34": (16, 0.25), "mobilenet_v2": (16, 0.25)}
CASES = [*NETWORKS.items(), *(pytest.param(*case, marks=pytest.mark.full) for case in WIDER.items())]
SEEDS = range(5)
CLOSE = 1e-4  # logits nearer to each other than this may change places


def gradients(model: nn.Module, call: nn.Module | SparseArithmetic, images: Tensor, labels: Tensor) -> list[Tensor]:
    """Logits, and by parameter the gradient that counts: of kept weights, and of everything that has no mask."""
    model.zero_grad()
    torch.manual_seed(0)
    logits = call(images)
    functional.cross_entropy(logits, labels).backward()
    found = [logits.detach()]
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "weight" and hasattr(module, "mask"):
                live = call.live[parameter].gradient if isinstance(call, SparseArithmetic) else None
                found.append(parameter.grad[module.mask] if live is None else torch.from_numpy(live))
            else:
                found.append(parameter.grad)
    return [one.double() for one in found]


def errors(got: list[Tensor], wanted: list[Tensor]) -> tuple[float, float]:
    """Relative, of the logits and of all gradients together."""
    logits = (got[0] - wanted[0]).norm() / wanted[0].norm()
    whole, right = (torch.cat([one.reshape(-1) for one in all_of[1:]]) for all_of in (got, wanted))
    return logits.item(), ((whole - right).norm() / right.norm()).item()


@pytest.mark.every(2)
@pytest.mark.parametrize(("name", "case"), CASES)
def test_training_is_no_further_from_float64_than_torch_is(twins: type, name: str, case: tuple[int, float]) -> None:
    size, width = case
    ours, theirs = [], []
    for seed in SEEDS:
        torch.manual_seed(seed)
        pair = twins(models.build(name, 10, width, size), torch.float32, density=0.1)
        images, labels = torch.randn(32, 3, size, size), torch.randint(0, 10, (32,))
        torchs = copy.deepcopy(pair.sparse)
        wanted = gradients(pair.dense, pair.dense, images.double(), labels)
        ours.append(errors(gradients(pair.sparse, pair.arithmetic, images, labels), wanted))
        theirs.append(errors(gradients(torchs, torchs, images, labels), wanted))
    for mine, peer in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        assert statistics.median(mine) <= 2 * statistics.median(peer), (mine, peer)
        assert statistics.median(peer) > 1e-9, "the reference is not float32"


@pytest.mark.every(2)
@pytest.mark.parametrize(("name", "case"), CASES)
def test_predictions_are_those_of_float64(twins: type, name: str, case: tuple[int, float]) -> None:
    size, width = case
    torch.manual_seed(0)
    model = models.build(name, 10, width, size)
    nn.init.normal_([module for module in model.modules() if isinstance(module, nn.Linear)][-1].weight)
    pair = twins(model, torch.float32, density=0.2)
    with torch.no_grad():
        for _ in range(4):
            pair.dense(torch.randn(48, 3, size, size, dtype=torch.float64))
    pair.sparse.load_state_dict(pair.dense.state_dict())
    pair.train(False)
    images = torch.randn(320, 3, size, size) * torch.rand(320, 1, 1, 1) + 2 * torch.randn(320, 3, 1, 1)
    with torch.no_grad():
        wanted = pair.dense(images.double())
        got = torch.cat([pair.arithmetic(batch) for batch in images.split([128, 128, 64])])
    best = wanted.topk(2).values
    clear = best[:, 0] - best[:, 1] > CLOSE
    assert clear.sum() > 200
    assert torch.equal(got.argmax(1)[clear], wanted.argmax(1)[clear])
