"""Torn, cut off or changed files are found, named and set aside, and what came before them is used."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sparse_lab.callbacks.nan_guard import NanGuard
from sparse_lab.cli.status import main as status
from sparse_lab.config import Config
from sparse_lab.errors import UserError
from sparse_lab.experiment.identity import run_dir
from sparse_lab.experiment.runner import run
from sparse_lab.export.load_run import finished
from sparse_lab.records.atomic_io import verify_checksum
from sparse_lab.records.run_dir import RunLocked
from sparse_lab.training.checkpoint_io import load_checkpoint, load_network

REQUEST = ("method=static", "sparsity.target=0.9", "training.epochs=5")


@pytest.fixture(scope="module")
def twice(compose_under, tmp_path_factory) -> tuple[Path, Path]:
    """The outputs of a run that went through, and of the same run, killed in its fourth epoch."""
    whole, killed = (tmp_path_factory.mktemp(name) for name in ("whole", "killed"))
    run(compose_under(whole, *REQUEST), "x", Console(quiet=True))

    def pull_the_plug(self, trainer, *rest):
        if trainer.global_step == 7:
            raise RuntimeError("pulled the plug")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NanGuard, "on_train_batch_end", pull_the_plug)
        with pytest.raises(RuntimeError, match="pulled"):
            run(compose_under(killed, *REQUEST), "x", Console(quiet=True))
    return whole, killed


@pytest.fixture
def killed(twice, compose) -> Config:
    """The run that was killed, in this test's own outputs."""
    config = compose(*REQUEST)
    folder = run_dir(config)
    shutil.copytree(twice[1] / "runs", folder.path.parent)
    assert load_checkpoint(folder.last)["global_step"] == 6 and load_checkpoint(folder.previous)["global_step"] == 4
    return config


@pytest.fixture(scope="module")
def made(compose_under, tmp_path_factory) -> Path:
    """The outputs of a finished dense run."""
    outputs = tmp_path_factory.mktemp("made")
    run(compose_under(outputs, "method=dense"), "x", Console(quiet=True))
    return outputs


@pytest.fixture
def dense(made, compose) -> Config:
    """That run, in this test's own outputs."""
    config = compose("method=dense")
    shutil.copytree(made / "runs", run_dir(config).path.parent)
    return config


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


@pytest.mark.every(3)
@pytest.mark.parametrize("damage", [torn, cut, flipped, empty, foreign])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(damage, killed, twice, wide_console, capsys):
    folder = run_dir(killed)
    reference = twice[0] / "runs" / folder.name
    folder.last.write_bytes(damage(folder.last.read_bytes()))
    run(killed, "x", wide_console)
    said = capsys.readouterr().out
    assert f"{folder.last} is damaged" in said and "goes on from previous.ckpt" in said
    assert folder.last.with_name("last.ckpt.damaged").is_file() and verify_checksum(folder.last)
    first, second = load_network(reference / "checkpoints" / "best.ckpt"), load_network(folder.best)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (reference / "metrics.csv").read_bytes() == (folder.path / "metrics.csv").read_bytes()


def test_without_a_whole_checkpoint_the_run_starts_anew(killed, wide_console, capsys):
    folder = run_dir(killed)
    for path in (folder.last, folder.previous):
        path.write_bytes(flipped(path.read_bytes()))
    result = run(killed, "x", wide_console)
    said = capsys.readouterr().out
    assert said.count("is damaged") == 2 and ": started" in said
    assert result["levels"][0]["epochs"] == 5
    assert len((folder.path / "metrics.csv").read_text().splitlines()) == 6


def test_a_kill_between_the_two_renames_of_a_save_loses_nothing(killed, wide_console, capsys):
    folder = run_dir(killed)
    os.replace(folder.last, folder.previous)
    run(killed, "x", wide_console)
    assert "goes on from previous.ckpt" in capsys.readouterr().out
    assert not folder.previous.exists(), "a finished run keeps one checkpoint"


def test_a_finished_network_that_is_damaged_is_made_again_for_whoever_starts_from_it(
    dense, compose, wide_console, capsys
):
    first = run_dir(dense).result()
    network = load_network(run_dir(dense).best)
    path = run_dir(dense).best
    path.write_bytes(flipped(path.read_bytes()))
    run(compose("method=oneshot", "sparsity.target=0.9"), "x", wide_console)
    assert f"{path} is damaged" in capsys.readouterr().out
    again = load_network(path)
    assert all(torch.equal(network[name], again[name]) for name in network)
    assert run_dir(dense).result()["test_accuracy"] == first["test_accuracy"]


def test_a_record_that_was_edited_does_not_count(dense, quiet):
    first = run_dir(dense).result()
    path = run_dir(dense).path / "result.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "test_accuracy": 99.99}))
    assert run_dir(dense).result() is None
    assert run(dense, "x", quiet)["test_accuracy"] == first["test_accuracy"]


@pytest.mark.parametrize("content", [b"", bytes(100_000)], ids=["no bytes", "zeros"])
def test_a_network_without_a_seal_is_made_again_for_whoever_starts_from_it(
    content, dense, compose, wide_console, capsys
):
    path = run_dir(dense).best
    network = load_network(path)
    path.write_bytes(content)
    assert run_dir(dense).result() is None
    run(compose("method=oneshot", "sparsity.target=0.9"), "x", wide_console)
    assert f"{path} is damaged" in capsys.readouterr().out
    again = load_network(path)
    assert all(torch.equal(network[name], again[name]) for name in network)


def test_another_runs_network_is_not_taken_for_ones_own(dense, compose, wide_console, capsys):
    other = compose("method=dense", "seed=7")
    run(other, "x", Console(quiet=True))
    path, network = run_dir(dense).best, load_network(run_dir(dense).best)
    shutil.copy(run_dir(other).best, path)
    run(dense, "x", wide_console)
    said = capsys.readouterr().out
    assert f"{path} is not the network that this run's result was measured on: set aside as best.ckpt.foreign" in said
    assert all(torch.equal(network[name], value) for name, value in load_network(path).items())


def test_a_network_that_the_result_knows_nothing_of_is_not_exported(dense, compose):
    """small.ckpt of a run that pruned filters, in the folder of one that did not."""
    other = compose("method=dense", "seed=7")
    run(other, "x", Console(quiet=True))
    shutil.copy(run_dir(other).best, run_dir(dense).small)
    assert run_dir(dense).result() is None
    with pytest.raises(UserError, match=r"small.ckpt is not the network that .* speaks of: nothing is exported"):
        finished(run_dir(dense).path)


@pytest.mark.parametrize("request_of", ["seed=7", "method=rigl"])
def test_another_runs_checkpoint_is_set_aside_and_not_gone_on_from(
    request_of, killed, twice, compose, wide_console, capsys
):
    folder, other = run_dir(killed), compose(*REQUEST, request_of)
    run(other, "x", Console(quiet=True))
    whose = run_dir(other)
    shutil.copy(whose.last, folder.last)
    run(killed, "x", wide_console)
    said = capsys.readouterr().out
    assert f"{folder.last} is of run {whose.name}: set aside as last.ckpt.foreign" in said
    assert "goes on from previous.ckpt" in said
    reference = load_network(twice[0] / "runs" / folder.name / "checkpoints" / "best.ckpt")
    assert all(torch.equal(reference[name], value) for name, value in load_network(folder.best).items())


def test_a_record_of_another_run_does_not_count(dense, compose, quiet):
    first, other = run_dir(dense).result(), compose("method=dense", "seed=7")
    run(other, "x", quiet)
    shutil.copy(run_dir(other).path / "result.json", run_dir(dense).path / "result.json")
    assert run_dir(dense).result() is None and not run_dir(dense).has_result
    assert run(dense, "x", quiet)["test_accuracy"] == first["test_accuracy"]


@pytest.mark.parametrize("seal", ["kept", "gone"])
def test_an_edited_record_is_neither_exported_nor_said_to_be_done(seal, dense, capsys):
    folder = run_dir(dense).path
    record = json.loads((folder / "result.json").read_text())
    if seal == "gone":
        del record["checksum"]
    (folder / "result.json").write_text(json.dumps({**record, "test_accuracy": 99.9}))
    with pytest.raises(UserError, match=r"result\.json: damaged, its checksum is (wrong|gone)"):
        finished(folder)
    assert status([str(folder)]) == 0
    said = capsys.readouterr()
    assert "unreadable" in said.out and "99.90" not in said.out and "checksum" in said.err


def test_a_network_that_is_not_the_records_is_not_exported(dense, compose, quiet):
    other = compose("method=dense", "seed=7")
    run(other, "x", quiet)
    shutil.copy(run_dir(other).best, run_dir(dense).best)
    with pytest.raises(UserError, match=r"best\.ckpt is not the network that .*result\.json speaks of"):
        finished(run_dir(dense).path)
    run_dir(dense).best.write_bytes(b"")
    with pytest.raises(UserError, match=r"best\.ckpt is (not the network|missing or damaged)"):
        finished(run_dir(dense).path)


def test_a_reference_file_that_is_damaged_is_refused(dense):
    path = run_dir(dense).best
    path.write_bytes(flipped(path.read_bytes()))
    with pytest.raises(UserError, match=r"best\.ckpt is damaged"):
        load_network(path)


def test_one_process_runs_and_the_other_says_so_and_leaves(killed, quiet):
    folder = run_dir(killed)
    with folder.claim(print, wait=False), pytest.raises(RunLocked, match=f"process {os.getpid()} on .* runs it"):
        run(killed, "x", quiet)
    assert run(killed, "x", quiet)["levels"]


def test_a_status_that_a_kill_left_behind_is_mended(dense, quiet):
    path = run_dir(dense).path / "status.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "state": "running"}))
    run(dense, "x", quiet)
    assert json.loads(path.read_text())["state"] == "done"
