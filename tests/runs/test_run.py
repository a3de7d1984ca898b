"""Whole runs on real scans: what they leave on disk, exact counts, masks that hold, stages made once."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
import torch

from sparse_lab import data, models
from sparse_lab.callbacks import rounds
from sparse_lab.errors import UserError
from sparse_lab.experiment.identity import run_dir
from sparse_lab.experiment.runner import run
from sparse_lab.training.checkpoint_io import load_checkpoint, load_network
from sparse_lab.training.figures import Figures


@pytest.mark.full
def test_vgg16_at_98_85_keeps_the_exact_number_before_and_after_a_save_and_load(tmp_path):
    from sparse_lab.sparsity.mask_updates import prune_to
    from sparse_lab.sparsity.masks import Masks, num_kept
    from sparse_lab.sparsity.scores import View, lamp
    from sparse_lab.training.checkpoint_io import load_into, save_network

    torch.manual_seed(0)
    model = models.build("vgg16")
    masks = Masks(model)
    masks.set(prune_to(masks, num_kept(0.9885, masks.total()), lamp(View(model)), "global"))
    wanted = round((1 - 0.9885) * 14_715_584)
    assert wanted == 169_229
    assert sum(int(torch.count_nonzero(w)) for w in masks.weights().values()) == wanted
    save_network(model, tmp_path / "best.ckpt", {})
    other = models.build("vgg16")
    loaded = Masks(other)
    load_into(other, load_network(tmp_path / "best.ckpt"), "best.ckpt")
    assert loaded.kept() == wanted
    assert sum(int(torch.count_nonzero(w)) for w in loaded.weights().values()) == wanted


def test_what_a_run_leaves_on_disk(compose, quiet, with_starts):
    config = with_starts(compose("method=iterative", "sparsity.target=0.9", "schedule.iterative.share=0.6"))
    result = run(config, "sparse-lab method=iterative", quiet)
    folder = run_dir(config).path
    assert {path.name for path in folder.iterdir()} >= {"config.yaml", "status.json", "metrics.csv", "result.json"}
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert not list(folder.rglob("*.tmp"))
    on_disk = json.loads((folder / "result.json").read_text())
    assert on_disk.pop("checksum") and on_disk == result
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    levels = result["levels"]
    assert [round(level["sparsity"], 3) for level in levels] == [0.6, 0.84, 0.9]
    assert sum(level["epochs"] for level in levels) == len((folder / "metrics.csv").read_text().splitlines()) - 1
    for level in levels:
        assert level["kept"] == round((1 - level["sparsity"]) * result["total"])
        assert {"validation_accuracy", "test_accuracy", "epochs", "seconds", "effective"} <= set(level)
        assert level["effective"]["kept"] == level["kept"] and level["effective"]["connected"] in (True, False)
    assert result["command"] == "sparse-lab method=iterative"
    assert result["data"]["official"] is True and result["data"]["md5"]
    assert result["flops"]["inference_sparse"] < result["flops"]["inference_dense"]
    assert result["peak_memory_mb"] > 10 and result["versions"]["torch"] == metadata.version("torch")


def test_a_finished_run_is_not_run_again_and_what_it_starts_from_is_shared(compose, quiet, tmp_path):
    """Dense, one-way and regrown: the first start makes all three, and each of them stands alone too. The regrowth
    keeps what was alive and adds exactly the budget.
    """
    config = compose(
        "method=oneshot_regrow", "sparsity.target=0.9", "method.regrow.budget=0.02", "method.regrow.steps=2"
    )
    child = run(config, "a", quiet)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert len(before) == 3
    assert run(config, "b", quiet) == child
    one_way = compose("method=oneshot", "sparsity.target=0.94")
    parent = run(one_way, "c", quiet)
    dense = run(compose("method=dense", "sparsity.target=0.95"), "d", quiet)
    assert [child["start"], parent["start"], dense["start"]] == [parent["name"], dense["name"], None]
    run(compose("method=oneshot", "sparsity.target=0.95"), "e", quiet)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert len(after) == 4 and all(after[path] == time for path, time in before.items())
    assert [level["kept"] for level in child["levels"]] == [round(0.08 * child["total"]), round(0.1 * child["total"])]
    old, new = load_network(run_dir(one_way).best), load_network(run_dir(config).best)
    masks = [name for name in new if name.endswith(".mask")]
    assert all(bool((new[name] | ~old[name]).all()) for name in masks)
    assert sum(int(new[name].sum() - old[name].sum()) for name in masks) == child["kept"] - parent["kept"]


@pytest.mark.full
def test_two_runs_with_one_seed_are_equal_bit_for_bit_and_another_seed_is_not(compose, quiet, tmp_path):
    """From the first weight on: what they start from is made twice too."""
    states = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = compose("method=oneshot", "sparsity.target=0.9", f"seed={seed}", f"paths.outputs={tmp_path / folder}")
        run(config, "x", quiet)
        states.append(load_network(run_dir(config).best))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_masks_that_cut_the_network_are_said_aloud_or_refused(compose, with_starts, capsys):
    from rich.console import Console

    overrides = ("method=oneshot", "sparsity.target=0.9995", "method.prune.score=random")
    result = run(with_starts(compose(*overrides)), "x", Console(width=200))
    assert result["levels"][0]["effective"]["connected"] is False
    assert "CUTS THE NETWORK" in capsys.readouterr().out
    with pytest.raises(UserError, match="require_connected"):
        run(compose(*overrides, "sparsity.require_connected=true"), "x", Console(quiet=True))


def test_a_loss_that_is_no_number_fails_the_run_with_its_step(compose, quiet):
    config = compose("training.lr=1e30", "method=dense", "training.warmup=0")
    with pytest.raises(UserError, match=r"at step \d+"):
        run(config, "x", quiet)
    status = json.loads((run_dir(config).path / "status.json").read_text())
    assert status["state"] == "failed" and "step" in status["error"]


def test_a_full_disk_stops_with_one_line_and_keeps_what_was_saved(compose, quiet, monkeypatch):
    import errno

    import pytorch_lightning as pl

    save = pl.Trainer.save_checkpoint
    calls = []

    def full(self, path, *rest, **kwargs):
        calls.extend([path] if isinstance(path, Path) else [])  # what is held in memory needs no disk
        if len(calls) == 2 and path == calls[1]:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, path, *rest, **kwargs)

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", full)
    config = compose("method=dense")
    with pytest.raises(UserError, match="disk is full"):
        run(config, "x", quiet)
    last = run_dir(config).last
    assert load_checkpoint(last)["epoch"] == 0
    assert not list(run_dir(config).path.rglob("*.tmp"))


def test_a_last_step_that_breaks_the_weights_is_no_result(compose, quiet, monkeypatch):
    """The loss is computed before the step: only the validation loss can tell."""
    from sparse_lab.callbacks.rounds import Rounds

    original = Rounds.on_train_start

    def break_after_the_last_step(self, trainer, module):
        original(self, trainer, module)
        steps = self.clock.total_epochs * self.clock.steps_an_epoch

        def after(*_):
            if trainer.global_step == steps - 1:
                next(module.model.parameters()).data.fill_(float("nan"))

        trainer.optimizers[0].register_step_post_hook(after)

    monkeypatch.setattr(Rounds, "on_train_start", break_after_the_last_step)
    config = compose("method=dense")
    with pytest.raises(UserError, match="validation loss is NaN"):
        run(config, "x", quiet)
    assert not run_dir(config).best.exists() and run_dir(config).result() is None


def test_a_damaged_result_is_made_again(compose, quiet):
    config = compose("method=dense")
    first = run(config, "x", quiet)
    for content in ("{}", "[]", "\x00\xff", '{"name"'):
        (run_dir(config).path / "result.json").write_text(content)
        again = run(config, "x", quiet)
        assert again["test_accuracy"] == first["test_accuracy"] and again["levels"] == first["levels"], content


def test_a_file_that_a_run_starts_from_counts_by_its_content(compose, tmp_path):
    from sparse_lab.experiment.identity import run_name

    names = []
    for folder, content in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        (tmp_path / folder).mkdir()
        torch.save({"weight": torch.full((3,), content)}, tmp_path / folder / "w.pt")
        names.append(run_name(compose(f"model.weights={tmp_path / folder / 'w.pt'}")))
    assert names[0] == names[1] != names[2]


def test_patience_ends_a_phase_early_and_test_selection_marks_the_record(compose, quiet):
    result = run(
        compose(
            "method=dense", "training.epochs=12", "training.patience=1", "training.lr=1e-9", "training.select=test_best"
        ),
        "x",
        quiet,
    )
    assert result["levels"][0]["epochs"] < 12
    assert result["selected_on"] == "test"


@pytest.mark.parametrize(("select", "chosen"), [("validation_best", 2), ("last", 6), ("test_best", 3)])
def test_a_level_ends_with_the_weights_of_the_epoch_that_is_selected(select, chosen, compose, quiet, monkeypatch):
    """Of equals the first: by validation that is epoch 2, by the test set epoch 3."""
    validation, test = [20.0, 60.0, 40.0, 60.0, 30.0, 10.0], [10.0, 20.0, 50.0, 30.0, 50.0, 40.0]
    networks, take, accuracy = [], Figures.take, rounds.accuracy

    def scripted(self, stage):
        loss, found = take(self, stage)
        if stage == "train":
            return loss, found
        return loss, validation[len(networks)]

    def read(*which):  # the test set: at the end of the level, and where it selects after each epoch too
        return test.pop(0) if select == "test_best" and test else accuracy(*which)

    def look(self, *rest):
        networks.append({name: value.clone() for name, value in self.network.state_dict().items()})
        keep_best(self, *rest)

    keep_best = rounds.Rounds._keep_best
    monkeypatch.setattr(rounds.Rounds, "_keep_best", look)
    monkeypatch.setattr(Figures, "take", scripted)
    monkeypatch.setattr(rounds, "accuracy", read)
    config = compose("method=dense", "training.epochs=6", f"training.select={select}")
    level = run(config, "x", quiet)["levels"][0]
    assert (level["best_epoch"], level["validation_accuracy"]) == (chosen, validation[chosen - 1])
    kept = load_network(run_dir(config).best)
    same = [all(torch.equal(value, one[name]) for name, value in kept.items()) for one in networks]
    assert same == [epoch == chosen for epoch in range(1, 7)]
    network = models.build("vgg16", 10, 0.0625, 32)
    network.load_state_dict(kept)
    with torch.no_grad():
        images = data.build(config.dataset, config.training, config.seed).test
        hits = torch.cat([network.eval()(batch).argmax(1) == labels for batch, labels in images])
    assert level["test_accuracy"] == pytest.approx(100.0 * hits.double().mean().item())


def test_cubic_pruning_ends_exactly_at_the_target_and_selects_only_there(compose, quiet, with_starts):
    words = ("method=oneshot", "schedule=cubic", "schedule.cubic.every=1", "sparsity.target=0.9")
    config = with_starts(compose(*words, "training.finetune.epochs=4"))
    result = run(config, "x", quiet)
    assert result["kept"] == round(0.1 * result["total"])
    kept = [int(row.split(",")[-1]) for row in (run_dir(config).path / "metrics.csv").read_text().splitlines()[1:]]
    assert kept == sorted(kept, reverse=True) and kept[0] > result["kept"] == kept[-1]
    assert result["levels"][0]["best_epoch"] >= 3


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "choice",
    [
        "distribution=ssim",
        "score=gradient,score_on=sparse",
        "score=reference",
        "value=dense",
        "value=kaiming",
        "score=magnitude",
    ],
)
def test_each_way_to_regrow_ends_at_the_exact_count(choice, compose, quiet, with_starts):
    overrides = [f"method.regrow.{one}" for one in choice.split(",")]
    config = compose("method=oneshot_regrow", "sparsity.target=0.9", "method.regrow.budget=0.03", *overrides)
    result = run(with_starts(config), "x", quiet)
    assert result["kept"] == round(0.1 * result["total"])


def test_learning_rate_rewinding_runs_the_dense_recipe_again(compose, quiet, with_starts):
    config = compose("method=oneshot", "sparsity.target=0.9", "method.prune.rewind_lr=true", "training.warmup=0")
    run(with_starts(config), "x", quiet)
    first = (run_dir(config).path / "metrics.csv").read_text().splitlines()
    rate = dict(zip(first[0].split(","), first[1].split(","), strict=True))["learning_rate"]
    import math

    steps = 2 * 2  # two epochs of two batches: the rate written is that of step 2 of 4 (counted from 0: 1)
    assert float(rate) == pytest.approx(0.05 * 0.5 * (1 + math.cos(math.pi * 1 / steps)))


@pytest.mark.parametrize(
    "model", [pytest.param(name, marks=pytest.mark.full) for name in ("resnet34", "resnet50", "mobilenet_v2")]
)
def test_other_networks_prune_and_regrow_exactly(model, compose, quiet):
    request = (f"model={model}", "method=oneshot_regrow", "sparsity.target=0.9", "training.limit_batches=1")
    short = ("training.epochs=1", "training.finetune.epochs=1", "training.regrow.epochs=1")
    result = run(compose(*request, *short), "x", quiet)
    assert result["kept"] == round(0.1 * result["total"])
    assert sum(layer["kept"] for layer in result["layers"]) == result["kept"]
    assert min(layer["kept"] for layer in result["layers"]) >= 1


@pytest.mark.full
def test_double_precision_runs(compose, quiet):
    one_epoch = ("training.epochs=1", "training.finetune.epochs=1", "training.regrow.epochs=1")
    config = compose("method=oneshot_regrow", "sparsity.target=0.9", "trainer.precision=64-true", *one_epoch)
    run(config, "x", quiet)
    assert load_network(run_dir(config).best)["features.0.weight"].dtype == torch.float64


def test_a_new_score_is_one_function(compose, quiet, with_starts, monkeypatch):
    """The README's example: nothing else changes, and the run prunes by it."""
    from sparse_lab.sparsity import scores

    monkeypatch.setattr(scores, "SCORES", dict(scores.SCORES))

    @scores.score
    def movement(view):
        gradients = view.gradients()
        return {name: -weight * gradients[name] for name, weight in view.weights().items()}

    request = ("method=oneshot", "sparsity.target=0.9", "method.prune.score=movement")
    result = run(with_starts(compose(*request, "method.prune.distribution=uniform")), "x", quiet)
    assert result["kept"] == round(0.1 * result["total"])
    assert result["layers"][5]["kept"] / result["layers"][5]["total"] == pytest.approx(0.1, abs=0.01)
