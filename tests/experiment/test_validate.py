"""Requests that would train something else than they say, or nothing: one line, before anything trains."""

from __future__ import annotations

import os
import zipfile

import pytest
import torch

from sparse_lab import models
from sparse_lab.errors import SparseLabError, UserError
from sparse_lab.experiment.validate import check_pace, check_request
from sparse_lab.methods.networks import structure_of
from sparse_lab.methods.schedules import kind_of
from sparse_lab.sweep.plan import Request

ABSURD = {
    "a share that takes forever": (["method=iterative", "schedule.iterative.share=1e-12"], "4,605,272,062,526 rounds"),
    "a share that no float takes away": (["method=iterative", "schedule.iterative.share=1e-17"], "outside [1e-12, 1)"),
    "a share that takes all": (["method=iterative", "schedule.iterative.share=0.999999"], "in one round"),
    "a turn of nothing": (["method=acdc", "schedule.alternating.turn=1e-9"], "outside [0.0001, 1]"),
    "a turn beyond its span": (["method=acdc", "schedule.alternating.turn=0.9"], "longer than the 0.65"),
    "a last turn beyond its span": (["method=acdc", "schedule.alternating.last_dense=0.9"], "must lie before"),
    "milestones outside": (["training.milestones=[-1,5]"], "-1 is outside (0, 1)"),
    "no milestones": (["training.lr_schedule=step", "training.milestones=[]"], "needs training.milestones"),
    "no number": (["training.milestones=[nan]"], "nan is outside"),
    "an infinite deviation": (["dataset.std=[inf,1,1]"], "inf is outside"),
    "an infinite rate": (["method=east", "method.cycles.lengths=[.inf]"], "method.cycles.lengths"),
    "a number that no float holds": (["training.lr=1" + "0" * 400], "training.lr: int too large"),
    "a density beyond counting": (["method=east", "method.cycles.multiplier=1e308"], "outside [1, 1000000]"),
    "a begin beyond counting": (["method=resrep", "method.compactors.begin=1e308"], "outside [0, 100000]"),
    "a density of a stage beyond counting": (
        ["method=mest", "method.elastic_mutation.high=[1e308,1,1]"],
        "outside [0, 1000000]",
    ),
    "a seed beyond counting": (["seed=4294967296"], "seed=4294967296 is outside [0, 4294967295]"),
    "a sparsity next to 1": (["method=oneshot", "sparsity.target=0.9999999"], "sparsity 0.9999999 keeps"),
    "a start sparser than the end": (
        ["method=gmp", "schedule.cubic.initial=0.999"],
        "schedule.cubic.initial=0.999 is where pruning starts, and it ends at sparsity 0.99:",
    ),
    "a sparse start sparser than the end": (
        ["method=granet", "schedule.cubic.initial=0.991"],
        "it ends at sparsity 0.99: lower it",
    ),
    "a batch that several processes cannot share": (
        ["trainer.devices=3", "trainer=cpu", "training.batch_size=128"],
        "training.batch_size=128 does not divide over 3 devices",
    ),
    "a rate beyond counting": (["training.lr=1e308"], "outside (0, 3e+38]"),
    "a method without a name": (["method.name=''"], "method.name='' is part of a folder's name"),
    "a method's name that leads elsewhere": (["method.name=../../x"], "is part of a folder's name"),
    "a method's name of two lines": (["method.name='a\nb'"], "is part of a folder's name"),
    "a boolean": (["seed=true"], "seed"),
    "text that is a number": (["logger.project=1e3"], "is written in quotes"),
    "look-ahead along nothing": (["training.nesterov=true", "training.momentum=0"], "training.momentum above 0"),
    "nothing is pruned": (["method=oneshot", "sparsity.target=1e-12"], "prunes none of"),
    "more iterations than weights": (
        ["method=oneshot", "sparsity.target=0.0001", "method.prune.iterations=900"],
        "6 weights go, less than one an iteration",
    ),
    "nothing is exchanged": (["method=rigl", "method.drop_and_grow.drop_fraction=1e-9"], "nothing would ever move"),
    "nothing cycles": (
        ["method=rigl", "method.cycles={}", "method.cycles.multiplier=1.000001"],
        "nothing would ever move",
    ),
    "nothing mutates": (["method=mest", "method.elastic_mutation.low=[1,1,1]"], "nothing would ever be dropped"),
    "nothing regrows": (["method=oneshot_regrow", "method.regrow.budget=1e-9"], "0 of 57,884 weights regrow"),
    "a regrowth from dense": (["method=oneshot_regrow", "method.init_from=dense"], "must name the pruning method"),
    "no phasing": (
        ["method=rigl", "method.dyrelu={}", "method.dyrelu.begin=0.5", "method.dyrelu.end=0.5"],
        "must lie before",
    ),
    "a start beyond the end": (
        ["method=resrep", "training.finetune.optimizer=sgd", "method.compactors.unit=share"],
        "a share of the",
    ),
}
# the training has two steps an epoch, and two epochs
TOO_SHORT = {
    "schedule.cubic.every": ("method=gmp", "schedule.cubic.every=50", "no step between 0 and 2"),
    "schedule.alternating.turn": ("method=acdc", "schedule.alternating.turn=0.001", "a turn of 0.004 steps"),
    "method.drop_and_grow.update_every": ("method=rigl", "method.drop_and_grow.update_every=50", "has 4 steps"),
    "method.cycles.every": ("method=east", "method.cycles.every=50", "a cycle of 1 steps"),
    "method.elastic_mutation.update_every": ("method=mest", "method.elastic_mutation.update_every=50", "has 4 steps"),
    "method.hypersphere.every": ("method=prune_on_the_fly", "method.hypersphere.every=50", "once in 4 steps"),
    "method.compactors.begin": ("method=resrep", "method.compactors.begin=50", "the last of 4 steps"),
}


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ABSURD)
def test_the_absurd_is_refused_in_one_line(compose, name):
    words, wanted = ABSURD[name]
    with pytest.raises(SparseLabError) as refused:
        for word in words:
            Request.read([word])
        check_request(compose("sparsity.target=0.99", *words))
    said = str(refused.value)
    assert wanted in said and len(said.splitlines()) == 1 and len(said) < 400


@pytest.mark.parametrize("key", TOO_SHORT)
def test_what_is_asked_for_and_never_comes_is_refused(compose, key):
    """With the number of steps that there are; what a method's own file says is warned of as the run begins."""
    method, word, wanted = TOO_SHORT[key]
    config = compose(method, "training.finetune.optimizer=sgd", "training.finetune.nesterov=false", word)
    with pytest.raises(SparseLabError, match=wanted):
        check_pace(config, {key})
    check_pace(config, {"training.lr"})


def test_a_list_of_choices_is_for_loggers():
    """Of others the last one would win in silence; in a file's defaults too."""
    for words in (["sparsity=[s90,s95]"], ["-m", "sparsity=[s90],[s95]"], ["model=[vgg16]"]):
        with pytest.raises(SparseLabError, match="a run has one"):
            Request.read(words)
    assert Request.read(["logger=[wandb,csv]"]).compose([]).config().logger.wandb


def test_a_list_of_choices_in_a_file_is_refused(tmp_path):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults: [{override /sparsity: [s90, s95]}]\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    with pytest.raises(SparseLabError, match="a run has one sparsity"):
        Request.read(["--config-dir", str(tmp_path), "experiment=mine"]).compose([])


def test_a_start_counts_from_where_the_pruning_ends_not_the_regrowth():
    """Its one-way run goes to 0.95 first, so that it may start above what the regrowth ends at."""
    words = ["method=oneshot_regrow", "method.init_from=gmp", "schedule=cubic", "sparsity=s90"]
    config = Request.read([*words, "schedule.cubic.initial=0.93"]).compose([]).config()
    kind_of(config.schedule).check(config, structure_of(config))
    config = Request.read([*words, "schedule.cubic.initial=0.96"]).compose([]).config()
    with pytest.raises(UserError, match=r"it ends at sparsity 0\.95"):
        kind_of(config.schedule).check(config, structure_of(config))


NO_WEIGHTS = {
    "text": "no file of tensors",
    "pipe": "not a file",
    "device": "not a file",
    "folder": "is a folder, and no run's",
    "bomb": "unpacks to",
    "missing": "cannot be read (No such file",
    "lacking": "'classifier.0.bias' is missing",
}


@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_start_weights_that_are_none_or_do_not_fit_are_refused_before_anything_runs(kind, tmp_path):
    path = tmp_path / "weights.pt"
    if kind == "text":
        path.write_text("root:x:0:0:root:/root:/bin/bash\n" * 50)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    elif kind == "lacking":
        state = models.build("vgg16", 10, 0.0625).state_dict()
        torch.save({name: value for name, value in state.items() if name != "classifier.0.bias"}, path)
    line = refused(f"model.weights={path}", tmp_path)
    assert line.startswith(f"model.weights={path}: ") and NO_WEIGHTS[kind] in line
    if kind != "lacking":
        words = (f"method.regrow.reference={path}", "method=oneshot_regrow", "method.regrow.score=reference")
        assert refused(*words, tmp_path).startswith(f"method.regrow.reference={path}: ")


def test_start_weights_that_fit_are_taken_in_either_format(tmp_path):
    from safetensors.torch import save_file

    state = models.build("vgg16", 10, 0.0625).state_dict()
    torch.save(state, tmp_path / "weights.pt")
    save_file(state, tmp_path / "weights.safetensors")
    for name in ("weights.pt", "weights.safetensors"):
        check_request(Request.read([*WEIGHTS, f"model.weights={tmp_path / name}"]).compose([]).config())


WEIGHTS = ("dataset=digits", "model.width=0.0625", "sparsity=s90")


def refused(*words: object) -> str:
    *lines, folder = map(str, words)
    request = Request.read([*WEIGHTS, *lines, f"paths.outputs={folder}"])
    with pytest.raises(UserError) as caught:
        request.look()
    return str(caught.value)


@pytest.mark.parametrize("model", ["vgg16", "resnet20", "mobilenet_v2"])
def test_what_a_step_keeps_is_no_more_than_what_torch_keeps(model):
    """Against torch's own count of the tensors that a forward pass saves for the backward one."""
    config = Request.read([f"model={model}", "model.width=0.25", "dataset=digits"]).compose([]).config()
    network = models.build(model, 10, 0.25, config.dataset.size)
    weights = {id(one) for one in network.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in weights:
            saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.zeros(2, *config.dataset.shape)).sum().backward()
    kept = sum(one.numel() * one.element_size() for one in saved.values())
    claimed = 2 * 4 * structure_of(config).read
    assert 0.2 * kept < claimed <= kept


def test_a_batch_that_no_memory_holds_is_refused_before_it_is_tried(tmp_path, monkeypatch):
    monkeypatch.setattr("sparse_lab.experiment.validate.available_memory", lambda: 10**6)
    line = refused("training.batch_size=128", tmp_path)
    assert line.startswith("training.batch_size=128 of images (3, 32, 32): vgg16 keeps at least")
