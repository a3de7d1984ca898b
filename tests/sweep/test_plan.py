"""The command line: good requests compose, bad ones get one clear line and a non-zero exit before anything trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from sparse_lab.cli.main import main
from sparse_lab.errors import SparseLabError, UserError
from sparse_lab.experiment.compose import places
from sparse_lab.experiment.validate import check
from sparse_lab.sweep.plan import Request


def composed(*argv: str):
    request = Request.read(list(argv))
    return request.compose([]).config()


RESREP = ("method=resrep", "training.finetune.optimizer=sgd")
BAD = {
    "unknown method": (["method=onesht"], "unknown method 'onesht'; did you mean 'oneshot'?"),
    "unknown method in a sweep": (["-m", "method=dense,rigll"], "unknown method 'rigll'"),
    "unknown model": (["model=vgg61"], "unknown model 'vgg61'; did you mean 'vgg19'?"),
    "unknown model by key": (["model.name=vgg61"], "unknown model 'vgg61'; did you mean 'vgg19'?"),
    "unknown key": (["training.epoch=3"], "did you mean 'epochs'?"),
    "old key": (
        ["method=rigl", "method.rewire.every=5"],
        "method.rewire.every is method.drop_and_grow.update_every since",
    ),
    "old group of keys": (
        ["method=rigl", "method.rewire={every: 5}"],
        "method.rewire is method.drop_and_grow since 0.2",
    ),
    "old key in a sweep": (
        ["-m", "sparsity.connect=true,false"],
        "sparsity.connect is sparsity.connected_init since 0.2",
    ),
    "old parts": (
        ["method=rigl", "method.parts=[prune,rewire]"],
        "method.parts is gone since 0.2: what a method is made",
    ),
    "old switch": (["method=rigl", "method.sharing=true"], "method.sharing={} or method.sharing=null"),
    "old switch of cycles": (["method=east", "method.cyclic=false"], "method.cycles={} or method.cycles=null"),
    "old key of a schedule": (["method=gmp", "schedule.every=5"], "schedule.every is schedule.cubic.every since 0.2"),
    "old key of two schedules": (
        ["method=lth", "schedule.round_epochs=5"],
        "schedule.iterative.round_epochs and schedule.layerwise.round_epochs",
    ),
    "old schedule": (["method=gmp", "schedule.name=one_shot"], "a schedule is chosen: schedule=NAME"),
    "old unit": (["method=oneshot", "method.prune.unit=filters"], "method.filters={} or null"),
    "alias": (["method=lamp_oneshot"], "method=lamp_oneshot is method=oneshot since 0.2"),
    "a part that is a number": (["method=rigl", "method.cycles=3"], "method.cycles={} or method.cycles=null"),
    "a part that is null and set": (
        ["method=east", "method.cycles=null", "method.cycles.every=5"],
        "method.cycles.every=5 and method.cycles=null do not go together",
    ),
    "an unknown key of a part": (["method=east", "method.cycles={evry: 5}"], "evry"),
    "a part without what it stands on": (["method=oneshot_regrow", "method.prune=null"], "needs method.prune"),
    "two schedules": (["method=oneshot", "schedule.cubic={}"], "a run has one schedule, not one_shot, cubic"),
    "no schedule": (["method=oneshot", "schedule.one_shot=null"], "a run has one schedule, not nothing"),
    "drop and grow twice": (["method=rigl", "method.elastic_mutation={}"], "does not go with method.elastic_mutation"),
    "a regrowth of nothing": (["method=oneshot_regrow", "method.regrow.start=target"], "leaves nothing to regrow"),
    "unknown group": (["methd=dense"], "did you mean 'method'?"),
    "unknown score": (["method=oneshot", "method.prune.score=magnitde"], "did you mean 'magnitude'?"),
    "unknown regrow score": (["method=oneshot_regrow", "method.regrow.score=tailor"], "did you mean 'taylor'?"),
    "unknown distribution": (["method=oneshot", "method.prune.distribution=erkk"], "did you mean 'erk'?"),
    "unknown layer": (
        [
            "method=oneshot_regrow",
            "method.regrow.distribution=given",
            "method.regrow.given=[feature.0]",
            "sparsity=s90",
        ],
        "unknown layer 'feature.0'; did you mean 'features.0'?",
    ),
    "sparsity 1": (["method=oneshot", "sparsity.target=1.0"], "outside [0, 1)"),
    "sparsity below 0": (["method=oneshot", "sparsity.target=-0.1"], "outside [0, 1)"),
    "sparsity in a sweep": (["-m", "method=oneshot", "sparsity.target=0.9,1.5"], "outside [0, 1)"),
    "wrong type": (["seed=one"], "seed"),
    "no number": (["training.lr=nan"], "training.lr"),
    "empties a layer": (["method=oneshot", "sparsity.target=0.9999999"], "empties some of the network's 14 layers"),
    "regrowth above the start": (["method=oneshot_regrow", "method.regrow.budget=0.02"], "would have to start at 1.01"),
    "negative regrowth": (["method=oneshot_regrow", "method.regrow.budget=-0.01"], "outside [0, 1]"),
    "taylor on the sparse network": (
        ["method=oneshot_regrow", "sparsity=s90", "method.regrow.score_on=sparse"],
        "scores every pruned weight 0",
    ),
    "a sweep without -m": (["seed=1,2"], "add -m"),
    "a key added that is there": (["+seed=3"], "An item is already at 'seed'"),
    "a key of a part added that is there": (["method=rigl", "+method.cycles.every=3"], "An item is already at"),
    "an added key that is none": (["+foo=1"], "unknown key 'foo'"),
    "a key taken out": (["~seed"], "nothing can be taken out"),
    "no key": (["=3"], "nothing can be taken out"),
    "no choice": (["experiment=null"], "experiment=null: null is no choice: name one, or leave experiment out; known:"),
    "no choice in a sweep": (["-m", "method=null,dense"], "method=null,dense: null is no choice"),
    "no launcher": (["hydra/launcher=null"], "null is no choice"),
    "an empty range": (["-m", "seed=range(1,1)"], "seed=range(1,1) gives seed no value"),
    "a glob that nothing matches": (["-m", "method=glob(zz*)"], "method=glob(zz*) gives method no value"),
    "a sweep's keys below hydra": (["-m", "+hydra.sweeper.params.seed=1"], "a sweep's keys stand by themselves"),
    "an unknown resolver": (["logger.project=${foo:x}"], "full_key: logger.project"),
    "a variable that is not set": (["logger.project=${oc.env:NOT_SET}"], "full_key: logger.project"),
    "a key that is not there": (["training.lr=${nowhere}"], "full_key: training.lr"),
    "joblib's places": (
        ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=foo", "seed=1,2"],
        "hydra.launcher.n_jobs=foo: it takes a whole number above 0, or -1",
    ),
    "no place": (["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=0", "seed=1,2"], "n_jobs=0: it takes"),
    "what a launcher has not": (["-m", "+hydra.launcher.foo=1", "seed=1,2"], "hydra.launcher: "),
    "batches of nothing": (["-m", "hydra.sweeper.max_batch_size=0", "seed=1,2"], "it takes a whole number above 0"),
    "unknown flag": (["--nonsense"], "cannot read the command line"),
    "another config": (["--config-name", "x"], "--config-dir"),
    "a bad last corner of a sweep": (["-m", "method=dense,oneshot", "sparsity.target=0.9,0.9999999"], "empties some"),
    "unknown start": (["method=oneshot_regrow", "method.init_from=bogus"], "method.init_from=bogus"),
    "pruning from elsewhere": (["method=oneshot", "method.init_from=iterative"], "pruning starts from dense"),
    "dense that prunes": (["method=dense", "method.prune={}"], "a method.name of its own"),
    "unknown profiler": (["trainer.profiler=foo"], "known: advanced, simple"),
    "too small for the regrowth": (
        [
            "method=oneshot_regrow",
            "sparsity=s90",
            "method.regrow.distribution=given",
            "method.regrow.given=[features.0]",
        ],
        "are to regrow",
    ),
    "sharing without repeated blocks": (
        ["method=east", "model=vgg16"],
        "method.sharing does not fit vgg16: no stage of it has blocks that repeat the second one",
    ),
    "dyrelu without relu": (
        ["method=east", "model=mobilenet_v2", "method.sharing=null"],
        "method.dyrelu does not fit mobilenet_v2: its activations are ReLU6",
    ),
    "phasing to the very end": (
        ["method=east", "model=resnet34", "method.dyrelu.end=1"],
        "must be ReLU before the training ends",
    ),
    "phasing after the training": (
        ["method=east", "model=resnet34", "method.dyrelu.unit=epochs", "method.dyrelu.end=200"],
        "must be ReLU before the training ends (160 epochs)",
    ),
    "phasing backwards": (["method=east", "model=resnet34", "method.dyrelu.begin=0.6"], "must lie before"),
    "cycles longer than training": (
        ["method=east", "model=resnet34", "method.cycles.lengths=[0.5,0.5]"],
        "together as long as the training (160 epochs) or longer",
    ),
    "cycles longer than training in epochs": (
        ["method=east", "model=resnet34", "method.cycles.unit=epochs", "method.cycles.lengths=[100,100]"],
        "method.cycles.lengths=[100.0, 100.0] (epochs)",
    ),
    "no cycles": (["method=east", "model=resnet34", "method.cycles.lengths=[]"], "give the length of each cycle"),
    "multiplier below 1": (["method=east", "model=resnet34", "method.cycles.multiplier=0.9"], "outside [1, 1000000]"),
    "density above 1": (
        ["method=east", "model=resnet34", "sparsity.target=0.8"],
        "density would pass 1.0 (12,759,053 weights of 11,164,352): use at most 2.625",
    ),
    "more weights than sharing leaves": (
        ["method=east", "model=resnet34", "method.cycles=null", "sparsity.target=0.4"],
        "the lowest sparsity here is 0.474992",
    ),
    "cycles by a global ranking": (
        ["method=east", "model=resnet34", "method.prune.distribution=global"],
        "method.prune.distribution=global must be one of uniform, er, erk",
    ),
    "cycles on a pruning schedule": (
        ["method=east", "model=resnet34", "schedule=cubic"],
        "works with schedule=constant, not cubic",
    ),
    "drop and grow in rounds": (["method=rigl", "schedule=iterative"], "not iterative"),
    "drop and grow on a trained network": (["method=rigl", "method.init_from=dense"], "for training from scratch"),
    "sharing in a trained network": (["method=oneshot", "model=resnet34", "method.sharing={}"], "from scratch"),
    "dense with sharing": (
        ["method=static", "method.prune=null", "method.sharing={}"],
        "method.sharing needs method.prune",
    ),
    "dense with compactors": (
        ["method=dense", "method.name=mine", "method.compactors={}"],
        "method.compactors needs method.prune",
    ),
    "dense with dyrelu": (["method=dense", "method.dyrelu={}"], "a method.name of its own"),
    "a connected start where nothing starts": (
        ["method=oneshot", "sparsity.connected_init=true"],
        "for methods that start sparse",
    ),
    "growth that scores nothing": (["method=rigl", "method.drop_and_grow.grow=taylor"], "scores every pruned weight 0"),
    "growth by a reference": (["method=rigl", "method.drop_and_grow.grow=reference"], "another score than reference"),
    "unknown growth": (["method=rigl", "method.drop_and_grow.grow=gradiant"], "did you mean 'gradient'?"),
    "unknown shape": (["method=east", "model=resnet34", "method.cycles.shape=sine"], "did you mean 'cosine'?"),
    "nothing exchanged": (["method=set", "method.drop_and_grow.drop_fraction=0"], "outside (0, 1]"),
    "unknown filter score": (["method=l1_filters", "method.prune.score=l3"], "unknown filter score 'l3'"),
    "a weight's score for filters": (["method=l1_filters", "method.prune.score=lamp"], "unknown filter score 'lamp'"),
    "a filter's score for weights": (["method=oneshot", "method.prune.score=rank"], "unknown score 'rank'"),
    "no compactors to score": (
        ["method=l1_filters", "method.prune.score=compactor"],
        "needs method.compactors: use method=resrep",
    ),
    "compactors scored by norms": ([*RESREP, "method.prune.score=l1"], "compactors score filters themselves"),
    "compactors of weights": (
        [*RESREP, "method.filters=null", "method.prune.score=magnitude"],
        "method.compactors needs method.filters",
    ),
    "compactors by adamw": (["method=resrep", "training=digits"], "not by adamw: training.finetune.optimizer=sgd"),
    "compactors behind trunks": ([*RESREP, "model=resnet34", "method.filters.coupled=true"], "behind single layers"),
    "compactors while training": ([*RESREP, "schedule=one_shot"], "method.compactors works with schedule=at_end"),
    "compactors in a network that keeps more": (
        [*RESREP, "model=resnet34", "sparsity.target=0.9999"],
        "by filters the highest sparsity here is 0.9",
    ),
    "a sphere while training": (
        ["method=prune_on_the_fly", "schedule=constant"],
        "works with schedule=at_end, not constant",
    ),
    "a sphere from a trained network": (["method=prune_on_the_fly", "method.init_from=dense"], "from scratch"),
    "a sphere and sharing": (
        ["method=prune_on_the_fly", "model=resnet34", "method.sharing={}"],
        "method.sharing does not go with method.hypersphere",
    ),
    "a sphere and a transform": (
        ["method=prune_on_the_fly", "method.dct={}"],
        "method.dct does not go with method.hypersphere",
    ),
    "a sphere and drop and grow": (
        ["method=prune_on_the_fly", "method.drop_and_grow={}"],
        "does not go with method.drop_and_grow",
    ),
    "a transform and flow": (["method=dctps", "method.prune.score=synflow"], "method.prune.score=synflow"),
    "a transform and magnitudes": (["method=dctps", "method.prune.score=magnitude"], "method.prune.score=magnitude"),
    "a transform and a connected start": (
        ["method=dctps", "sparsity.connected_init=true"],
        "sparsity.connected_init=true",
    ),
    "a transform of nothing": (["method=dctps", "method.prune=null"], "method.dct needs method.prune"),
    "soft weights": (["method=oneshot", "schedule=soft"], "schedule=soft is for whole filters"),
    "weights layer by layer": (["method=oneshot", "schedule=layerwise"], "schedule=layerwise is for whole filters"),
    "layer by layer without rates": (["method=hrank", "schedule=layerwise"], "one number a layer: give them"),
    "rates and another target": (["method=hrank", "method.filters.rates=[0.5]", "sparsity=s90"], "beside them"),
    "more rates than layers": (
        ["method=hrank", f"method.filters.rates=[{','.join(['0.5'] * 14)}]"],
        "14 rates for 13 groups of channels",
    ),
    "a rate above 1": (["method=hrank", "method.filters.rates=[1.5]"], "outside [0, 1]"),
    "rates in rounds": (["method=hrank", "schedule=iterative", "method.filters.rates=[0.5]"], "say all by themselves"),
    "rates that are soft": (["method=sfp", "method.filters.rates=[0.5]"], "say all by themselves"),
    "rates and multiply-adds": (
        ["method=hrank", "method.filters.rates=[0.5]", "method.filters.flops=0.5"],
        "say all by themselves",
    ),
    "more multiply-adds than can go": (["method=l1_filters", "method.filters.flops=0.99999"], "can go here"),
    "filters that regrow": (
        ["method=oneshot_regrow", "sparsity=s90", "method.filters={}", "method.prune.score=l1"],
        "method.filters does not go with method.regrow",
    ),
    "filters that are exchanged": (
        ["method=rigl", "method.filters={}", "method.prune.score=l1"],
        "method.filters does not go with method.drop_and_grow",
    ),
    "filters by erk": (["method=l1_filters", "method.prune.distribution=erk"], "filters go by uniform"),
    "filters by turns": (["method=l1_filters", "schedule=alternating"], "not alternating"),
    "filters in steps": (["method=l1_filters", "method.prune.iterations=3"], "iterations=1"),
    "filters and sharing": (
        ["method=l1_filters", "model=resnet34", "method.sharing={}"],
        "method.sharing does not go with method.filters",
    ),
    "filters and a transform": (["method=sfp", "method.dct={}"], "method.dct does not go with"),
    "a layer's last filter": (
        ["method=l1_filters", "model=resnet34", "sparsity.target=0.9999"],
        "by filters the highest sparsity here is 0.9",
    ),
    "rewinding nothing": (["method=oneshot", "method.prune.rewind_weights=0"], "needs method.prune.rewind_lr=true"),
    "rewinding beyond the training": (["method=lth", "method.prune.rewind_weights=160"], "no epoch is left of a round"),
    "rewinding beyond a round": (
        ["method=lth", "method.prune.rewind_weights=20", "schedule.iterative.round_epochs=20"],
        "no epoch is left of a round",
    ),
    "turns backwards": (
        ["method=acdc", "schedule.alternating.begin=0.8"],
        "must lie before schedule.alternating.end=0.85",
    ),
    "turns to the very end": (["method=acdc", "schedule.alternating.end=1"], "the end before 1"),
    "turns and regrowth": (["method=oneshot_regrow", "sparsity=s90", "schedule=alternating"], "not alternating"),
    "a dropped and grown network by turns": (["method=rigl", "schedule=alternating"], "not alternating"),
    "bounds of another length": (
        ["method=mest", "method.elastic_mutation.low=[0.8,1.0]"],
        "need a number for each stage",
    ),
    "bounds upside down": (["method=mest", "method.elastic_mutation.low=[1.1,0.9,1.0]"], "nowhere above"),
    "bounds of nothing": (["method=mest", "method.elastic_mutation.low=[0,0.9,1.0]"], "must lie above 0"),
    "bounds beside the target": (["method=mest", "method.elastic_mutation.high=[1,1,1.1]"], "must end with 1"),
    "milestones backwards": (["method=mest", "method.elastic_mutation.milestones=[0.8,0.5]"], "below 1 and rising"),
    "milestones beyond the end": (
        ["method=mest", "method.elastic_mutation.milestones=[0.5,1.0]"],
        "below 1 and rising",
    ),
    "bounds and gradual pruning": (["method=mest", "schedule=cubic"], "works with schedule=constant, not cubic"),
    "bounds by a ranking": (
        ["method=mest", "method.elastic_mutation.distribution=global"],
        "distribution=global: one of",
    ),
    "bounds that empty a layer": (
        ["method=mest", "sparsity.target=0.999999", "method.elastic_mutation.low=[0.5,0.9,1.0]"],
        "empties a layer",
    ),
    "bounds above what there is": (["method=mest_soft", "sparsity.target=0.2"], "is more than there is"),
    "exchange by a score that needs batches": (["method=rigl", "method.drop_and_grow.drop=grasp"], "needs more"),
    "growth by flow": (["method=rigl", "method.drop_and_grow.grow=synflow"], "method.drop_and_grow"),
    "stopping another method": (["method=static", "training.stop_after=3"], "is for method=dense"),
    "stopping after the end": (["method=dense", "training.stop_after=161"], "training.epochs=160"),
    "no gradual pruning": (["method=gmp", "schedule.cubic.begin=0.5"], "must lie before schedule.cubic.end=0.5"),
    "statistics": (["dataset.std=[0,1,1]"], "dataset.std"),
    "grammar": (["seed=[1"], "cannot read seed=[1: seed takes a whole number"),
    "no such config dir": (["--config-dir", "nowhere"], "no such folder"),
    "DDP in a sweep": (["-m", "trainer=ddp", "seed=1,2"], "trainer.devices=2 (DDP) starts the command again"),
    "DDP in a sweep of one": (["-m", "trainer=ddp"], "run its lines one by one without -m"),
    "DDP in one choice": (["-m", "trainer=cpu,ddp"], "trainer.devices=2 (DDP) starts the command again"),
    "DDP in an experiment's sweep": (["experiment=demo", "trainer.devices=2"], "hydra/launcher=ray"),
    "unknown launcher": (["-m", "hydra/launcher=rai", "seed=1,2"], "did you mean 'ray'?"),
    "unknown sweeper": (["-m", "hydra/sweeper=optunas", "seed=1,2"], "did you mean 'optuna'?"),
    "a sweep over launchers": (["-m", "hydra/launcher=basic,joblib"], "a sweep cannot go over hydra/launcher"),
    "a sweep over Hydra": (["-m", "hydra.launcher.n_jobs=1,2"], "a sweep cannot go over hydra.launcher.n_jobs"),
    "sweeps in a swept choice": (["-m", "experiment=demo,gallery"], "run experiment=demo by itself"),
    "a mapping for what is null": (["hydra.sweeper.params={seed:1}"], "full_key: hydra.sweeper.params"),
    "a sweep that only shows": (["-m", "--cfg", "job"], "--cfg and --multirun do not go together"),
    "unknown logger in a list": (["logger=[wandb,tensorbord]"], "did you mean 'tensorboard'?"),
    "unknown logger in a sweep of lists": (["-m", "logger=[csv],[wandbb]"], "did you mean 'wandb'?"),
    "missing checkpoint": (["model.weights=nowhere.pt"], "model.weights=nowhere.pt: cannot be read (No such file"),
}


# all that this process composes of good and bad values: Hydra puts the same choices together once
COMPOSER = Request.read([]).composer()
BY_THE_COMMAND = [name for number, name in enumerate(BAD) if number % 8 == 0 or "-m" in BAD[name][0] or "sweep" in name]


def check_refused_by_the_command(name, tmp_path, monkeypatch, capsys) -> None:
    argv, wanted = BAD[name]
    monkeypatch.chdir(tmp_path)
    assert main([*argv, "dataset=digits", "paths.outputs=out"]) == 2
    error = capsys.readouterr().err
    assert wanted in error
    assert error.startswith("sparse-lab: ") and len(error.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("status.json"))


@pytest.mark.every(3)
@pytest.mark.parametrize("name", BY_THE_COMMAND)
def test_bad_input_gets_one_line_and_a_non_zero_exit(name, tmp_path, monkeypatch, capsys):
    check_refused_by_the_command(name, tmp_path, monkeypatch, capsys)


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(BAD.keys() - set(BY_THE_COMMAND)))
def test_so_does_all_other_bad_input(name, tmp_path, monkeypatch, capsys):
    check_refused_by_the_command(name, tmp_path, monkeypatch, capsys)


@pytest.mark.every(4)
@pytest.mark.parametrize("name", sorted(BAD.keys() - set(BY_THE_COMMAND)))
def test_what_is_wrong_is_said_in_one_line(name, tmp_path, monkeypatch):
    """The steps of the command one by one."""
    argv, wanted = BAD[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SparseLabError) as refused:
        request = Request.read([*argv, "dataset=digits", "paths.outputs=out"])
        config = COMPOSER.config(dict(one.split("=", 1) for one in request.fixed))
        request.check_job(config)
        check(config)
    assert wanted in str(refused.value) and len(str(refused.value).splitlines()) == 1


class Payload:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


@pytest.mark.parametrize("content", ["pickle", "text", "list"])
def test_foreign_checkpoints_are_refused_and_never_unpickled(content, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if content == "pickle":
        torch.save({"x": Payload()}, "foreign.pt")
    elif content == "list":
        torch.save([1, 2], "foreign.pt")
    else:
        Path("foreign.pt").write_text("no checkpoint")
    for key in ("model.weights", "method.regrow.reference"):
        argv = ["method=oneshot_regrow", "sparsity=s90", "method.regrow.score=reference", f"{key}=foreign.pt"]
        assert main([*argv, "dataset=digits", "paths.outputs=out"]) == 2
        error = capsys.readouterr().err
        assert "foreign.pt" in error and len(error.strip().splitlines()) == 1
    assert not Path("pwned").exists()


def test_missing_data_names_the_folder_and_both_ways_out(tmp_path, capsys):
    assert main(["dataset=cifar10", f"paths.data={tmp_path / 'here'}", f"paths.outputs={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "here") in error and "dataset.download=true" in error and "paths.data" in error


def test_a_folder_that_links_lead_nowhere_for_is_said(tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for words in (
        [f"paths.outputs={tmp_path / 'loop' / 'x'}"],
        ["--config-dir", str(tmp_path / "loop")],
        ["paths.outputs=${foo:x}"],
    ):
        assert main(["dataset=digits", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words[0].partition("=")[0] in line


def test_a_text_without_end_is_cut_in_the_middle(capsys):
    for key in ("method", "method.name", "model.name", "seed", "training.lr", "paths.outputs"):
        assert main(["dataset=digits", f"{key}={'y' * 100_000}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert key in line and len(line) < 2200


def test_a_folder_that_cannot_be_written_is_said_before_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["dataset=digits", f"paths.outputs={tmp_path / 'file' / 'out'}"]) == 2
    assert "paths.outputs" in capsys.readouterr().err


def test_the_first_days_names_all_mean_something():
    config = composed(
        "method=oneshot", "model=resnet34", "dataset=digits", "sparsity=s99", "sparsity.target=0.9885", "seed=7",
        "training=bidirectional", "training.epochs=3", "model.width=0.25", "trainer=cpu",
        "paths.data=d", "paths.outputs=o",
    )  # fmt: skip
    assert (config.method.name, config.model.name, config.dataset.name) == ("oneshot", "resnet34", "digits")
    assert (config.sparsity.target, config.seed, config.training.epochs, config.model.width) == (0.9885, 7, 3, 0.25)
    assert config.dataset.root == "d" and config.paths.outputs == "o" and config.trainer.accelerator == "cpu"


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("preset", "target"),
    [("s90", 0.9), ("s95", 0.95), ("s98", 0.98), ("s98_85", 0.9885), ("s99", 0.99), ("s99_5", 0.995), ("s99_9", 0.999),
     ("s99_95", 0.9995), ("s99_99", 0.9999), ("s96_85", 0.9685)],
)  # fmt: skip
def test_sparsity_presets(preset, target):
    assert composed(f"sparsity={preset}").sparsity.target == target


def test_the_papers_points():
    from sparse_lab.methods.phases import regrowth_start

    config = composed("experiment=paper/bidirectional_iterative", "method=iterative_regrow")
    assert (regrowth_start(config), config.sparsity.target) == (0.9885, 0.9685)
    assert (config.schedule.iterative.share, config.schedule.iterative.round_epochs, config.training.epochs) == (
        0.2,
        40,
        200,
    )
    assert config.training.finetune.optimizer == "adamw" and config.training.regrow.patience == 50
    request = Request.read(["experiment=paper/bidirectional_oneshot"])
    request.read_experiment_axes()
    assert request.axes["sparsity.target"] == ["0.9639", "0.9296"] and len(request.axes["seed"]) == 3


@pytest.mark.nightly
def test_every_choice_of_every_group_composes():
    groups = (
        "model",
        "dataset",
        "method",
        "sparsity",
        "schedule",
        "training",
        "trainer",
        "logger",
        "debug",
        "experiment",
    )
    request = Request.read([])
    tried = 0
    for group in groups:
        for choice in request.source.choices(group):
            request.compose([f"{group}={choice}"]).config()
            tried += 1
    assert tried > 45


def test_a_users_own_folder_adds_choices(tmp_path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text(
        "defaults: [oneshot, _self_]\nname: mine\nprune: {score: magnitude}\n"
    )
    request = Request.read(["--config-dir", str(tmp_path), "method=mine"])
    config = request.compose([]).config()
    assert (config.method.name, config.method.prune.score, config.schedule.name) == ("mine", "magnitude", "one_shot")


@pytest.mark.parametrize("written", ["{fc:0.5,layer4.*:0.995}", """{"fc":0.5,'layer4.*': 0.995}"""])
def test_a_mapping_is_written_with_and_without_quotes(written):
    request = Request.read(["method=rigl", f"sparsity.layers={written}"])
    assert request.compose([]).config().sparsity.layers == {"fc": 0.5, "layer4.*": 0.995}


def test_a_mapping_of_the_command_line_is_put_into_a_files(tmp_path):
    (tmp_path / "sparsity").mkdir()
    (tmp_path / "sparsity" / "mine.yaml").write_text("layers: {fc: 0.5, layer1.*: 0.7}\nexclude: [conv1]\n")
    words = ["--config-dir", str(tmp_path), "sparsity=mine", "method=rigl", "sparsity.layers={layer4.*:0.995,fc:0.6}"]
    config = Request.read(words).compose([]).config()
    assert config.sparsity.layers == {"fc": 0.6, "layer1.*": 0.7, "layer4.*": 0.995}
    assert config.sparsity.exclude == ["conv1"]


def test_a_jobs_mapping_is_its_own():
    request = Request.read(["-m", "method=rigl", "sparsity.layers={fc:0.5},{conv1:0.6}"])
    composer = request.composer()
    found = [composer.config(job).sparsity.layers for job in (*request.corners(), *request.corners())]
    assert found == [{"fc": 0.5}, {"conv1": 0.6}] * 2


def test_a_mapping_is_not_set_by_dots():
    with pytest.raises(UserError, match=r"names may hold dots themselves: sparsity.layers=\{layer4.0.conv1:VALUE\}"):
        Request.read(["sparsity.layers.layer4.0.conv1=0.5"])


def test_a_command_line_list_replaces_an_experiments_list():
    request = Request.read(["-m", "experiment=demo", "seed=5,6,7", "method=dense"])
    request.read_experiment_axes()
    assert request.axes["seed"] == ["5", "6", "7"] and "method" not in request.axes
    assert request.jobs == 3 * 2


def python(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=cwd, timeout=60)


def test_cfg_and_info_answer_without_torch(tmp_path):
    code = (
        "import sys\nfrom sparse_lab.cli.main import main\n"
        "for flags in (['--cfg', 'job'], ['--info', 'searchpath']):\n"
        "    try:\n        status = main(flags)\n    except SystemExit as stop:\n        status = stop.code or 0\n"
        "    assert 'torch' not in sys.modules and status == 0, (flags, status)\n    print('====')\n"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config, info, _ = done.stdout.split("====")
    assert "sparsity:" in config and "conf" in info


def test_python_dash_m_is_the_command_from_any_folder(tmp_path):
    done = python("-m", "sparse_lab", "--cfg", "job", "method=oneshot_regrow", cwd=tmp_path)
    assert done.returncode == 0 and "score: taylor" in done.stdout


def test_shell_completion_offers_choices(tmp_path):
    environment = {**os.environ, "COMP_LINE": "sparse-lab method=onesh", "COMP_POINT": "23"}
    done = subprocess.run(
        [sys.executable, "-m", "sparse_lab", "-sc", "query=bash"],
        capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60,
    )  # fmt: skip
    assert "method=oneshot_regrow" in done.stdout


def test_a_launcher_in_a_swept_choice_is_refused_and_named(tmp_path, capsys):
    (tmp_path / "experiment").mkdir()
    for name, defaults in (("far", "[{override /hydra/launcher: joblib}]"), ("near", "[]")):
        (tmp_path / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\ndefaults: {defaults}\n")
    line = ["-m", "--config-dir", str(tmp_path), "experiment=near,far", "dataset=digits"]
    assert main(line) == 2
    error = capsys.readouterr().err.strip()
    assert error.endswith("put hydra/launcher=joblib on the command line") and len(error.splitlines()) == 1
    request = Request.read([*line, "seed=1,2", "hydra/launcher=joblib", f"paths.outputs={tmp_path}"])
    request.check()
    assert request.launcher == "joblib" and request.jobs == 2


@pytest.mark.parametrize(
    ("group", "extra"), [("launcher=joblib", "joblib"), ("launcher=ray", "ray"), ("sweeper=optuna", "optuna")]
)
def test_a_missing_extra_is_named(group, extra, monkeypatch, capsys):
    from sparse_lab.sweep import plan

    monkeypatch.setattr(plan, "find_spec", lambda name: None if extra in name else object())
    assert main(["-m", f"hydra/{group}", "seed=1,2", "dataset=digits"]) == 2
    error = capsys.readouterr().err.strip()
    assert f"pip install 'sparse_lab[{extra}]'" in error and len(error.splitlines()) == 1


def test_our_launchers_win_over_the_plugins_own():
    for launcher, key, value in (("joblib", "n_jobs", places("cpu")), ("submitit_slurm", "max_num_timeout", 10)):
        request = Request.read(["-m", f"hydra/launcher={launcher}"])
        assert request.compose([]).cfg.hydra.launcher[key] == value
    request = Request.read(["-m", "hydra/launcher=ray", "trainer=cpu"])
    ray = request.compose([]).cfg.hydra.launcher.ray
    assert ray.remote.num_gpus == 0 and ray.remote.max_calls == 1 and ray.init.object_store_memory > 0
    request = Request.read(["-m", "hydra/launcher=ray", "hydra.launcher.ray.init.address=auto"])
    assert request.compose([]).cfg.hydra.launcher.ray.init.object_store_memory is None


@pytest.mark.parametrize(("visible", "accelerator", "wanted"), [("0,1", "auto", 1), ("", "auto", 0), ("0", "cpu", 0)])
def test_a_ray_job_asks_for_a_gpu_where_there_is_one(visible, accelerator, wanted, monkeypatch):
    from sparse_lab.experiment.compose import gpus_a_job

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus_a_job(accelerator) == wanted


def test_a_group_takes_a_list_of_choices():
    request = Request.read(["logger=[wandb,tensorboard]"])
    assert request.fixed == ["logger=[wandb,tensorboard]"]


def test_globs_are_written_out():
    request = Request.read(["-m", "sparsity=glob(s99_9*)"])
    assert request.axes["sparsity"] == ["s99_9", "s99_95", "s99_99"]


def test_help_is_quick_and_imports_neither_torch_nor_a_launcher(tmp_path):
    code = (
        "import sys, time\nbegan = time.process_time()\nimport hydra\nhydra_took = time.process_time() - began\n"
        "from sparse_lab.cli.main import main\nstatus = main(['--help'])\n"
        "took = time.process_time() - began - hydra_took\n"
        "print('took', took, status, {'torch', 'ray', 'joblib', 'optuna', 'submitit'} & set(sys.modules))\n"
    )
    out = python("-c", code, cwd=tmp_path).stdout
    took = out.splitlines()[-1].split(maxsplit=3)
    assert "sparsity:" in out and took[2:] == ["0", "set()"]
    assert float(took[1]) < 3.0  # seconds of a processor; 0.4 where it is idle


def test_a_sweep_runs_on_past_a_failing_run_and_ends_non_zero(tmp_path, capfd):
    small = [
        "dataset=digits",
        "training=digits",
        "model.width=0.0625",
        "dataset.train_limit=128",
        "dataset.eval_limit=32",
    ]
    small += ["training.epochs=1", "training.warmup=0"]
    status = main(["-m", "method=dense", "training.lr=1e30,0.01", *small, f"paths.outputs={tmp_path}"])
    out, error = capfd.readouterr()
    assert status == 1
    assert "2 runs: 1 done, 1 failed" in out and "the loss became NaN" in error
    assert len(list(tmp_path.rglob("result.json"))) == 1
    assert len(list(tmp_path.rglob("error.txt"))) == 1


def test_overrides_may_stand_on_both_sides_of_a_flag(tmp_path, capsys):
    request = Request.read(["method=dense", "-m", "seed=range(1,4)"])
    assert request.axes == {"seed": ["1", "2", "3"]} and request.argv[0] == "-m"
    assert main(["seed=3", "--cfg", "job", "hydra/launcher=nope"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_gpu_may_be_on_another_machine_only_where_the_jobs_run_elsewhere(tmp_path, monkeypatch):
    """The machine that hands jobs to a cluster often has no GPU itself."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = ["-m", "dataset=digits", "trainer=gpu", "seed=1,2", f"paths.outputs={tmp_path}"]
    with pytest.raises(UserError, match="no GPU here"):
        Request.read(words).check()
    monkeypatch.setattr("sparse_lab.sweep.plan.check_extra", lambda target: None)
    request = Request.read([*words, "hydra/launcher=ray"])
    request.check()
    assert len(request.plan) == 2


def test_what_cfg_shows_is_what_a_run_has(capsys):
    """Parts that the method does not have are null, whatever was set in them; a package, Hydra's node, resolved."""
    assert main(["method=rigl", "method.cycles.every=3", "training.epochs=7", "--cfg", "job"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["method"]["cycles"] is None and shown["method"]["drop_and_grow"]["update_every"] == 100
    assert shown["schedule"]["constant"] == {} and shown["schedule"]["one_shot"] is None and "hydra" not in shown
    assert shown["training"]["finetune"]["epochs"] == "${training.epochs}"
    assert main(["training.epochs=7", "--cfg", "job", "--resolve", "--package", "training.finetune"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# @package training.finetune\n") and yaml.safe_load(out)["epochs"] == 7
    assert main(["--cfg", "hydra"]) == 0
    assert yaml.safe_load(capsys.readouterr().out).keys() == {"hydra"}
    for words in (["--package", "nothing"], ["--package", "method.cycles"]):
        assert main(["--cfg", "job", *words]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_key_of_a_part_that_no_run_has_is_named(tmp_path, capsys):
    """And one that some have is not: sweeps over methods set keys of many."""

    def said(*words: str) -> str:
        request = Request.read([*words, "dataset=digits", f"paths.outputs={tmp_path}"])
        request.check()
        return capsys.readouterr().out

    idle = said("method=oneshot", "method.regrow.budget=0.001", "schedule.cubic.every=5")
    none = "has no effect: no run that is asked for has"
    assert idle.splitlines() == [
        f"note: method.regrow.budget {none} method.regrow; method.regrow={{}} adds it",
        f"note: schedule.cubic.every {none} schedule.cubic; schedule=cubic chooses it",
    ]
    assert "note" not in said("-m", "method=oneshot,oneshot_regrow", "method.regrow.budget=0.001")
    assert "note" not in said("method=rigl", "method.cycles={}", "method.cycles.every=5")


def test_a_ranges_numbers_are_those_that_a_person_would_write(tmp_path):
    """On the axis, in the config and in its name; two values that are the same are one job."""
    base = ["dataset=digits", "method=static", f"paths.outputs={tmp_path}"]
    request = Request.read(["-m", "sparsity.target=range(0.9,0.99,0.03)", *base])
    request.check()
    assert request.axes["sparsity.target"] == ["0.9", "0.93", "0.96"]
    assert [config.sparsity.target for config in request.configs] == [0.9, 0.93, 0.96]
    assert [run["sparsity"] for run in request.plan] == [0.9, 0.93, 0.96]
    (by_hand,) = [run["name"] for run in _planned([*base, "sparsity.target=0.96"])]
    assert request.plan[2]["name"] == by_hand


def _planned(words: list[str]) -> list[dict]:
    request = Request.read(words)
    request.check()
    return request.plan


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("axes", "runs"),
    [
        (["seed=1,1"], 1),
        (["sparsity.target=0.9,0.90,0.8999999999999999,0.95"], 2),
        (["sparsity=s90,s95", "sparsity.target=0.9"], 1),
        (["method=dense,static", "sparsity=s90,s95"], 3),
        (["seed=1,2", "sparsity=s90,s95"], 4),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_jobs_that_ask_for_the_same_run_are_one(axes, runs, tmp_path, capsys):
    words = [*axes, "dataset=digits", f"paths.outputs={tmp_path}"]
    request = Request.read(["-m", *words, *([] if any("method" in axis for axis in axes) else ["method=static"])])
    asked = request.jobs
    request.check()
    names = [run["name"] for run in request.plan]
    assert len(set(names)) == len(names) == request.jobs == len(request.configs) == runs
    assert (f"note: {asked} jobs ask for {runs} run" in capsys.readouterr().out) == (asked > runs)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("words", "notes"),
    [
        (["training.milestones=[0.3]"], ["training.milestones has no effect: no run that is asked for reads it"]),
        (["method=dense", "sparsity=s90", "schedule=cubic"], ["sparsity has no effect", "schedule has no effect"]),
        (["method=oneshot", "training.finetune={momentum:0.5,lr:0.1}", "training.finetune.optimizer=adam"],
         ["training.finetune.momentum has no effect"]),
        (["method=rigl", "training.regrow.lr=0.3"], ["training.regrow.lr has no effect"]),
        (["dataset.root=x", "dataset.workers=7", "paths.data=x"],
         ["dataset.root has no effect", "dataset.workers has no effect", "paths.data has no effect"]),
        (["logger.project=x", "trainer.profiler=simple"], ["logger.project has no effect"]),
        (["seed=1", "seed=2"], ["seed=1 has no effect: seed=2 comes after it"]),
        (["method=oneshot", "method.cycles=null"], ["method.cycles=null has no effect"]),
        (["-m", "method=oneshot,rigl", "method.drop_and_grow=null", "method.name=mine"], []),
        (["method=static", "schedule=constant"], []),
        (["method=static", "sparsity=s90", "sparsity.target=0.95"],
         ["sparsity=s90 has no effect: sparsity.target takes its place"]),
        (["method=static", "logger=tensorboard", "logger.tensorboard=false"],
         ["logger=tensorboard has no effect: logger.tensorboard takes its place"]),
        (["-m", "method=static", "sparsity=s90", "sparsity.target=0.8,0.95"],
         ["sparsity=s90 has no effect: sparsity.target takes its place"]),
        (["method=gmp", "schedule=cubic", "schedule.cubic.every=5", "model=vgg16", "model.width=0.5"], []),
        (["method=static", "training=standard", "training.epochs=3"], []),
        (["method=l1_filters", "sparsity=s90", "schedule=soft"], []),
        (["hydra/launcher=joblib"], ["hydra/launcher has no effect: it is for sweeps (-m)"]),
        (["-m", "method=dense,oneshot", "sparsity=s90", "training.finetune.lr=0.1"], []),
        (["-m", "method=static", "training.gamma=0.1,0.2"],
         ["training.gamma has no effect", "2 jobs ask for 1 run"]),
    ],
    ids=lambda value: " ".join(value),
)  # fmt: skip
def test_what_no_run_reads_is_named_before_training(words, notes, tmp_path, capsys):
    Request.read([*words, "dataset=digits", f"paths.outputs={tmp_path}"]).check()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(said) == len(notes)
    assert all(line.startswith(f"note: {wanted}") for line, wanted in zip(said, notes, strict=True))


def test_a_bad_value_of_what_a_finished_run_does_not_read_is_refused_too(tmp_path):
    """It has no say in the run's name, so that the run is found; the request is wrong all the same."""
    for word in (
        "training.milestones=[-1,5]",
        "training.milestones=[nan]",
        "training.regrow.lr=inf",
        "method.regrow.budget=nan",
    ):
        request = Request.read([word, "dataset=digits", f"paths.outputs={tmp_path}"])
        with pytest.raises(UserError, match="is outside"):
            request.compose([]).config()
