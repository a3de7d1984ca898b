"""What a sparse run keeps takes the room of its live weights, and the run goes on from it as from a dense one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparse_lab import models
from sparse_lab.coding.packed_state import KIND
from sparse_lab.experiment.identity import run_dir
from sparse_lab.experiment.runner import run
from sparse_lab.training.checkpoint_io import load_checkpoint, load_network, save_checkpoint
from tests.runs.promises import End, die, interrupted, stop, tensors

OFTEN = ("method.drop_and_grow.update_every=2",)
AN_ARCHIVE = 8_192  # bytes of a zip archive's own, and of names
STATES = 3 * 5_056 + 2_048  # of python's, numpy's and torch's generators
# a request, and whether it is pruned at its very first save
REQUESTS = {
    "rigl, sgd": ("method=rigl", *OFTEN),
    "rigl, adamw": ("method=rigl", *OFTEN, "training.optimizer=adamw", "training.lr=0.003"),
    "gmp from dense, adam": ("method=gmp", "schedule.cubic.every=1", "training.optimizer=adam", "training.lr=0.003"),
    "sharing and dyrelu, adamw": (
        *("method=east", "model=resnet34", *OFTEN, "method.cycles.every=1", "method.cycles.lengths=[0.3,0.3]"),
        *("method.dyrelu.unit=epochs", "method.dyrelu.begin=1.5", "method.dyrelu.end=3.5"),
        *("training.optimizer=adamw", "training.lr=0.003"),
    ),
}
LENGTH = ("training.epochs=6", "sparsity.target=0.95")


def bound(checkpoint: dict) -> int:
    """Bytes: for each mask the entropy of its positions, for each number that one holds its own, times 1.1; and all
    that is dense as it is.
    """
    sparse, dense = 0.0, 0
    masks: dict[torch.Size, list[Tensor]] = {}
    found = [one for _, one in tensors(checkpoint)]
    for one in found:
        if one.dtype == torch.bool and 2 * int(one.sum()) <= one.numel():
            known = masks.setdefault(one.shape, [])
            if not any(torch.equal(one, other) for other in known):
                known.append(one)
                sparse += entropy(int(one.sum()), one.numel())
    for one in found:
        of_its_shape = masks.get(one.shape, [])
        if one.dtype == torch.bool and any(torch.equal(one, mask) for mask in of_its_shape):
            continue
        held = [int(mask.sum()) for mask in of_its_shape if not one[~mask].any()]
        if held:
            sparse += one.element_size() * min(held)
        else:
            dense += one.element_size() * one.numel()
    return round(1.1 * sparse) + dense


def entropy(count: int, of: int) -> float:
    """Bytes of `count` positions at random."""
    shares = (count / of, 1 - count / of)
    return -of * sum(share * math.log2(share) for share in shares if share) / 8


def is_packed(path: Path) -> bool:
    return str(torch.load(path, weights_only=True).get("format")).startswith(KIND)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name.startswith("rigl") else pytest.mark.full) for name in REQUESTS]
)
def test_it_goes_on_to_the_same_bits(name, compose, quiet, watched, check_interrupted, tmp_path):
    """Stopped within an epoch, killed within another, and gone on from a checkpoint as they were written before."""
    config = compose(*REQUESTS[name], *LENGTH, "diagnostics.gradients=true")
    whole, broken = (
        replace(config, paths=replace(config.paths, outputs=str(tmp_path / one))) for one in ("whole", "broken")
    )
    run(whole, "x", quiet)
    steps = dict(watched)
    check_interrupted(broken, [End(stop, 3), End(die, 6), End(stop, 9)], whole, steps)
    last, best = run_dir(whole).last, run_dir(whole).best
    assert is_packed(last) and is_packed(best)
    assert last.stat().st_size < bound(load_checkpoint(last)) + STATES + AN_ARCHIVE
    assert best.stat().st_size < bound(load_checkpoint(best)) + AN_ARCHIVE


def test_a_checkpoint_of_before_is_gone_on_from(compose, quiet, watched, monkeypatch, tmp_path):
    config = compose(*REQUESTS["rigl, sgd"], *LENGTH)
    whole, broken = (
        replace(config, paths=replace(config.paths, outputs=str(tmp_path / one))) for one in ("whole", "broken")
    )
    run(whole, "x", quiet)
    steps = dict(watched)
    interrupted(broken, End(stop, 5), quiet, monkeypatch)
    last = run_dir(broken).last
    small = last.stat().st_size
    save_checkpoint(load_checkpoint(last), last)
    assert not is_packed(last) and last.stat().st_size > 3 * small
    watched.clear()
    run(broken, "x", quiet)
    assert watched and all(steps[step] == found for step, found in watched.items())


def test_dense_runs_are_kept_as_ever(compose, quiet):
    config = compose("method=dense")
    run(config, "x", quiet)
    folder = run_dir(config)
    assert torch.load(folder.last, weights_only=True).keys() >= {"state_dict", "optimizer_states", "callbacks"}
    state = torch.load(folder.best, weights_only=True)["network"]
    models.build("vgg16", width=0.0625).load_state_dict(state)


FULL_WIDTH: dict[str, tuple[tuple[str, ...], int]] = {
    "resnet34": (("model=resnet34", "sparsity.target=0.9999"), 400_000),
    "vgg16": (("model=vgg16", "sparsity.target=0.99"), 3_000_000),
}


@pytest.mark.full
@pytest.mark.parametrize("model", FULL_WIDTH)
def test_full_widths_stay_below_what_was_promised(model, compose: Callable, quiet):
    words, most = FULL_WIDTH[model]
    config = compose("method=rigl", *OFTEN, *words, "model.width=1", "training.epochs=3")
    run(config, "x", quiet)
    folder = run_dir(config)
    sizes = folder.last.stat().st_size, folder.best.stat().st_size
    print(f"{model}: last.ckpt {sizes[0]:,} bytes, best.ckpt {sizes[1]:,}")
    assert max(sizes) <= most
    plain = models.build(model, width=1.0)
    state = {name: value for name, value in load_network(folder.best).items() if not name.endswith(".mask")}
    plain.load_state_dict(state, strict=True)
