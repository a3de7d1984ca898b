"""A run that starts from the network of a pruned run: its weights alone, or under its masks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sparse_lab.callbacks.sparsify import Sparsify
from sparse_lab.cli.main import main
from sparse_lab.errors import UserError
from sparse_lab.experiment.identity import run_dir, run_name
from sparse_lab.experiment.runner import run
from sparse_lab.experiment.validate import check_request
from sparse_lab.training.checkpoint_io import load_network

STATIC = ("method=static", "sparsity.target=0.9")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> list[Path]:
    return [tmp_path_factory.mktemp("pruned")]


@pytest.fixture
def pruned(made, compose, quiet) -> Path:
    """The folder of a finished run, of another seed than those that start from it."""
    folder = made[0] / "run"
    if not folder.is_dir():
        config = compose(*STATIC, "seed=7")
        run(config, "a start", quiet)
        shutil.copytree(run_dir(config).path, folder)
    return folder


def masks(network) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in network.items() if name.endswith(".mask")}


@pytest.fixture
def begun(monkeypatch) -> dict[str, torch.Tensor]:
    """The network as it is when the first step begins."""
    seen: dict[str, torch.Tensor] = {}
    usual = Sparsify.on_train_batch_start

    def look(self, trainer, module, *rest) -> None:
        usual(self, trainer, module, *rest)
        if not seen:
            seen.update({name: one.detach().clone() for name, one in module.model.state_dict().items()})

    monkeypatch.setattr(Sparsify, "on_train_batch_start", look)
    return seen


def test_a_run_goes_on_under_the_masks_of_another(pruned, compose, quiet, begun):
    config = compose(*STATIC, f"model.weights={pruned}", "model.keep_masks=true")
    assert config.model.weights == str(pruned / "checkpoints" / "best.ckpt")
    found = run(config, "test", quiet)
    theirs, ours = load_network(pruned / "checkpoints" / "best.ckpt"), load_network(run_dir(config).best)
    assert begun.keys() == theirs.keys() and all(torch.equal(begun[name], theirs[name]) for name in theirs)
    assert masks(ours) and all(torch.equal(mask, masks(theirs)[name]) for name, mask in masks(ours).items())
    assert all(not ours[name.replace("mask", "weight")][~mask].any() for name, mask in masks(ours).items())
    assert found["kept"] == sum(int(mask.sum()) for mask in masks(theirs).values())
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours if name.endswith("weight"))


def test_rigl_drops_and_grows_from_the_masks_of_another(pruned, compose, quiet, begun):
    words = ("method=rigl", "sparsity.target=0.9", "method.drop_and_grow.update_every=1", "training.epochs=4")
    config = compose(*words, f"model.weights={pruned}", "model.keep_masks=true")
    found = run(config, "test", quiet)
    theirs, ours = load_network(pruned / "checkpoints" / "best.ckpt"), load_network(run_dir(config).best)
    assert all(torch.equal(begun[name], mask) for name, mask in masks(theirs).items())
    assert any(not torch.equal(ours[name], mask) for name, mask in masks(theirs).items())
    assert found["kept"] == sum(int(mask.sum()) for mask in masks(theirs).values())


def test_without_its_masks_what_was_pruned_moves(pruned, compose, quiet):
    config = compose("method=dense", f"model.weights={pruned}")
    run(config, "test", quiet)
    theirs, ours = load_network(pruned / "checkpoints" / "best.ckpt"), load_network(run_dir(config).best)
    assert any(ours[name.replace("mask", "weight")][~mask].any() for name, mask in masks(theirs).items())


def test_what_it_starts_from_counts_by_its_content(pruned, compose, tmp_path):
    shutil.copytree(pruned, tmp_path / "copy")
    names = [run_name(compose(*STATIC, f"model.weights={path}")) for path in (pruned, tmp_path / "copy")]
    kept = run_name(compose(*STATIC, f"model.weights={pruned}", "model.keep_masks=true"))
    assert names[0] == names[1] and kept not in (*names, run_name(compose(*STATIC)))


REFUSED = {
    "method=dense model.keep_masks=true": "needs model.weights=FILE",
    "method=dense model.weights=RUN model.keep_masks=true": "trains every weight: method=static",
    "method=gmp sparsity.target=0.9 model.weights=RUN model.keep_masks=true": "makes masks of its own",
    "method=oneshot sparsity.target=0.9 model.weights=RUN model.keep_masks=true": "makes masks of its own",
    "method=rigl sparsity.target=0.95 model.weights=RUN model.keep_masks=true": ": sparsity.target=0.9, or leave",
    "method=static sparsity.target=0.9 sparsity.exclude=[Linear] model.weights=RUN model.keep_masks=true": "also for",
    "method=static sparsity.target=0.9 model=resnet8 model.weights=RUN": "is missing",
    "method=static sparsity.target=0.9 model.width=0.125 model.weights=RUN": "not (8, 3, 3, 3)",
    "method=oneshot_regrow method.regrow.score=reference method.regrow.reference=RUN model.width=0.125": "does not fit",
    "method=dense model.weights=RUN/net.sparse": "is a packed network",
    "method=static sparsity.target=0.9 model.weights=RUN/..": "is a folder, and no run's",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_not_go_together_is_one_line_before_training(words, pruned, compose):
    with pytest.raises(UserError, match=REFUSED[words].replace("(", r"\(").replace(")", r"\)")) as caught:
        check_request(compose(*words.replace("RUN", str(pruned)).split()))
    assert str(caught.value).isprintable()


def test_doctor_says_the_same(pruned, small, capsys):
    words = [*small, *STATIC, f"model.weights={pruned}", "model.width=0.125"]
    assert main(["doctor", *words]) == 1
    assert "'features.0.weight' has shape (4, 3, 3, 3), not (8, 3, 3, 3)" in capsys.readouterr().out


def test_what_is_left_behind_is_said(pruned, compose, capsys):
    from rich.console import Console

    run(compose("method=static", "sparsity.target=0.95", f"model.weights={pruned}"), "test", Console(width=500))
    said = [line for line in capsys.readouterr().out.splitlines() if "is of a pruned network" in line]
    assert len(said) == 1 and said[0].strip().startswith("WARNING")
