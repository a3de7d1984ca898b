"""Files on disk: whole or not at all, never unpickled, random states restored."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

from sparse_lab.errors import UserError
from sparse_lab.training import checkpoint_io


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.ckpt"
    checkpoint_io.save_checkpoint({"a": torch.ones(2)}, path)

    def torn(payload, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        checkpoint_io.save_checkpoint({"a": torch.zeros(2)}, path)
    assert torch.equal(checkpoint_io.load_checkpoint(path)["a"], torch.ones(2))
    assert os.listdir(tmp_path) == ["x.ckpt"]


def test_a_network_file_of_another_shape_or_kind_is_refused(tmp_path):
    network = torch.nn.Linear(3, 2)
    checkpoint_io.save_network(network, tmp_path / "n.ckpt", {"run": "x"})
    other = torch.nn.Linear(4, 2)
    with pytest.raises(UserError, match="does not fit"):
        checkpoint_io.load_into(other, checkpoint_io.load_network(tmp_path / "n.ckpt"), "n.ckpt")
    with pytest.raises(UserError, match="does not fit"):
        checkpoint_io.load_into(torch.nn.Conv2d(1, 1, 1), checkpoint_io.load_network(tmp_path / "n.ckpt"), "n.ckpt")
    torch.save(network.state_dict(), tmp_path / "plain.pt")
    with pytest.raises(UserError, match="not a network that sparse_lab saved"):
        checkpoint_io.load_network(tmp_path / "plain.pt")


def test_a_bit_flipped_in_the_head_is_one_line(tmp_path):
    path = tmp_path / "n.ckpt"
    checkpoint_io.save_network(torch.nn.Linear(3, 2), path, {})
    content = bytearray(path.read_bytes())
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError) as caught:
        checkpoint_io.load_checkpoint(path)
    assert "n.ckpt" in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_random_states_come_back_through_a_weights_only_file(tmp_path):
    draws = lambda: (random.random(), float(np.random.rand()), float(torch.rand(())))  # noqa: E731
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    checkpoint_io.save_checkpoint({"random": checkpoint_io.random_state()}, tmp_path / "r.ckpt")
    first = draws()
    draws()
    checkpoint_io.set_random_state(torch.load(tmp_path / "r.ckpt", weights_only=True)["random"])
    assert draws() == first
