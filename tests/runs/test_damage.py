"""Torn, cut off or changed files are found, named and set aside, and what came before them is used."""

from __future__ import annotations

import json
import os

import pytest
import torch
from rich.console import Console

from sparse_lab.callbacks.diverged import StopWhenDiverged
from sparse_lab.config import UserError
from sparse_lab.record import Elsewhere, RunFolder
from sparse_lab.run import run
from sparse_lab.training.files import load, load_network
from sparse_lab.whole import seal_holds

REQUEST = ("method=static", "sparsity.target=0.9", "training.epochs=5")


@pytest.fixture
def wide() -> Console:
    return Console(width=400)


def killed_in_the_fourth_epoch(config, quiet, monkeypatch) -> RunFolder:
    def pull_the_plug(self, trainer, *rest):
        if trainer.global_step == 7:
            raise RuntimeError("pulled the plug")

    with monkeypatch.context() as patch:
        patch.setattr(StopWhenDiverged, "on_train_batch_end", pull_the_plug)
        with pytest.raises(RuntimeError, match="pulled"):
            run(config, "x", quiet)
    folder = RunFolder(config)
    assert load(folder.last)["global_step"] == 6 and load(folder.previous)["global_step"] == 4
    return folder


def torn(content: bytes) -> bytes:
    return content[: len(content) // 3]


def cut(content: bytes) -> bytes:
    return content[:-1]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def empty(content: bytes) -> bytes:
    return b""


def foreign(content: bytes) -> bytes:
    return b"not a checkpoint"


@pytest.mark.parametrize("damage", [torn, cut, flipped, empty, foreign])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    damage, compose, quiet, wide, monkeypatch, tmp_path, capsys
):
    reference = compose(*REQUEST, f"paths.outputs={tmp_path / 'whole'}")
    run(reference, "x", quiet)
    config = compose(*REQUEST)
    folder = killed_in_the_fourth_epoch(config, quiet, monkeypatch)
    folder.last.write_bytes(damage(folder.last.read_bytes()))
    run(config, "x", wide)
    said = capsys.readouterr().out
    assert f"{folder.last} is damaged" in said and "goes on from previous.ckpt" in said
    assert folder.last.with_name("last.ckpt.damaged").is_file() and seal_holds(folder.last)
    first, second = load_network(RunFolder(reference).best), load_network(folder.best)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (RunFolder(reference).path / "metrics.csv").read_bytes() == (folder.path / "metrics.csv").read_bytes()


def test_without_a_whole_checkpoint_the_run_starts_anew(compose, quiet, wide, monkeypatch, capsys):
    config = compose(*REQUEST)
    folder = killed_in_the_fourth_epoch(config, quiet, monkeypatch)
    for path in (folder.last, folder.previous):
        path.write_bytes(flipped(path.read_bytes()))
    result = run(config, "x", wide)
    said = capsys.readouterr().out
    assert said.count("is damaged") == 2 and ": started" in said
    assert result["levels"][0]["epochs"] == 5
    assert len((folder.path / "metrics.csv").read_text().splitlines()) == 6


def test_a_kill_between_the_two_renames_of_a_save_loses_nothing(compose, quiet, wide, monkeypatch, capsys):
    config = compose(*REQUEST)
    folder = killed_in_the_fourth_epoch(config, quiet, monkeypatch)
    os.replace(folder.last, folder.previous)
    run(config, "x", wide)
    assert "goes on from previous.ckpt" in capsys.readouterr().out
    assert not folder.previous.exists(), "a finished run keeps one checkpoint"


def test_a_finished_network_that_is_damaged_is_made_again_for_whoever_starts_from_it(compose, quiet, wide, capsys):
    dense = compose("method=dense")
    first = run(dense, "x", quiet)
    network = load_network(RunFolder(dense).best)
    path = RunFolder(dense).best
    path.write_bytes(flipped(path.read_bytes()))
    run(compose("method=oneshot", "sparsity.target=0.9"), "x", wide)
    assert f"{path} is damaged" in capsys.readouterr().out
    again = load_network(path)
    assert all(torch.equal(network[name], again[name]) for name in network)
    assert RunFolder(dense).result()["test_accuracy"] == first["test_accuracy"]


def test_a_record_that_was_edited_does_not_count(compose, quiet):
    config = compose("method=dense")
    first = run(config, "x", quiet)
    path = RunFolder(config).path / "result.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "test_accuracy": 99.99}))
    assert RunFolder(config).result() is None
    assert run(config, "x", quiet)["test_accuracy"] == first["test_accuracy"]


def test_a_reference_file_that_is_damaged_is_refused(compose, quiet):
    config = compose("method=oneshot", "sparsity.target=0.9")
    run(config, "x", quiet)
    path = RunFolder(config).best
    path.write_bytes(flipped(path.read_bytes()))
    with pytest.raises(UserError, match=r"best\.ckpt is damaged"):
        load_network(path)


def test_one_process_runs_and_the_other_says_so_and_leaves(compose, quiet):
    config = compose("method=dense")
    folder = RunFolder(config)
    with folder.claim(print, wait=False), pytest.raises(Elsewhere, match=f"process {os.getpid()} on .* runs it"):
        run(config, "x", quiet)
    assert run(config, "x", quiet)["levels"]


def test_a_status_that_a_kill_left_behind_is_mended(compose, quiet):
    config = compose("method=dense")
    run(config, "x", quiet)
    path = RunFolder(config).path / "status.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "state": "running"}))
    run(config, "x", quiet)
    assert json.loads(path.read_text())["state"] == "done"
