"""A plain DDP loop: all processes hold the same masks, whatever each has drawn. FSDP is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import sparse_lab
from tests.methods.loops import made

ROOT = Path(__file__).parents[2]


@pytest.mark.full
@pytest.mark.parametrize("method", ["rigl", "mest"])
def test_both_hold_the_same_masks_after_every_step(method, tmp_path):
    command = [sys.executable, "-m", "tests.methods.two_processes"]
    both = [subprocess.Popen([*command, str(rank), method, str(tmp_path)], cwd=ROOT) for rank in (0, 1)]
    assert [one.wait(timeout=300) for one in both] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(first["masks"]) == 12
    for here, there in zip(first["masks"], second["masks"], strict=True):
        assert all(torch.equal(mask, there[name]) for name, mask in here.items())
    weights = [name for name in first["network"] if name.endswith("weight")]
    assert all(torch.equal(first["network"][name], second["network"][name]) for name in weights)
    assert any(not torch.equal(mask, first["masks"][0][name]) for name, mask in first["masks"][-1].items())


def test_fsdp_is_refused():
    class FullyShardedDataParallel(nn.Module):  # torch's own needs a GPU and a process group
        def __init__(self) -> None:
            super().__init__()
            self.module = made("mlp")

    class Shared(torch.nn.Parameter):
        device_mesh = "of torch's DTensor"

    with pytest.raises(sparse_lab.SparseLabError, match=r"FSDP.*use DDP"):
        sparse_lab.sparsify(FullyShardedDataParallel(), "rigl", 0.9, total_steps=400)
    network = made("mlp")
    network[1].weight = Shared(network[1].weight.data)
    with pytest.raises(sparse_lab.SparseLabError, match=r"shared out over processes \(FSDP\).*use DDP"):
        sparse_lab.sparsify(network, "rigl", 0.9, total_steps=400)

    class FSDPStrategy:
        pass

    trainer = type("Trainer", (), {"strategy": FSDPStrategy(), "max_epochs": 1})()
    with pytest.raises(sparse_lab.SparseLabError, match="FSDPStrategy shares each weight out"):
        sparse_lab.callbacks.Sparsify(method="rigl", sparsity=0.9).setup(trainer, pl.LightningModule(), "fit")
