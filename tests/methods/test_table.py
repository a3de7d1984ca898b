"""Which settings a run reads: every key of the schema is decided, and what is said to be unread changes no bit."""

from __future__ import annotations

import pytest
import torch

from sparse_lab.experiment import settings_read
from sparse_lab.experiment.compose import LEAVES
from sparse_lab.experiment.identity import run_dir, run_name
from sparse_lab.experiment.runner import run
from sparse_lab.experiment.settings_read import READ_WHEN
from sparse_lab.methods import base, table
from sparse_lab.sparsity import scores
from sparse_lab.sparsity.structured import filter_scores
from sparse_lab.training.checkpoint_io import load_network

# every run reads them; those of a part or a schedule: every run that has it
ALWAYS = """
model: name arch width weights options
dataset: name num_classes image_size channels mean std train_limit eval_limit
training: optimizer lr weight_decay epochs lr_schedule warmup patience clip_norm
training: batch_size accumulate label_smoothing select stop_after limit_batches
trainer: accelerator devices precision deterministic checkpoint_every progress profiler
diagnostics: activations gradients
logger: wandb tensorboard mlflow trackio
paths: outputs
: seed
method: name init_from
method.dyrelu: begin end unit
method.compactors: penalty begin unit every channels
method.hypersphere: penalty recovery
method.prune: rewind_weights
method.filters: rates coupled flops
method.cycles: shape lengths unit multiplier every drop grow
method.drop_and_grow: drop grow drop_fraction drop_fraction_shape update_every unit end
method.elastic_mutation: drop grow update_every unit distribution low high milestones
method.regrow: steps score start
schedule.iterative: share round_epochs
schedule.layerwise: round_epochs
schedule.cubic: begin end initial
schedule.alternating: begin turn last_dense end
"""


def test_every_key_of_the_schema_is_decided():
    """A key that is new stands in ALWAYS, in experiment/settings_read.py or in `read_when` of its part."""
    always = {
        f"{group}.{name}".lstrip(".")
        for line in ALWAYS.strip().splitlines()
        for group, _, names in [line.partition(": ") if line[0] != ":" else ("", ":", line[1:])]
        for name in names.split()
    }
    of_parts = {f"method.{one.part}.{name}" for one in table.COMPONENTS.values() for name in one.read_when}
    somewhere = {*of_parts, *READ_WHEN} - {"schedule"}
    assert always | somewhere == LEAVES.keys() and not always & somewhere


def test_scores_look_at_what_the_table_says():
    found = scores.SCORES.keys() | filter_scores.FILTER_SCORES.keys() | {"compactor"}
    no_passes = scores.WITHOUT_PASSES | filter_scores.FILTER_SCORES_WITHOUT_PASSES | {"synflow", "compactor"}
    assert found & set(base.WITHOUT_DATA) == no_passes
    assert scores.SCORES.keys() - scores.WITHOUT_PASSES == set(base.FROM_GRADIENTS)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("words", "dead", "alive"),
    [
        (["method=dense"], ["sparsity.target", "schedule", "training.milestones", "training.gamma"], ["training.lr"]),
        (["method=dense", "training.lr_schedule=step"], ["training.clip_over"], ["training.milestones"]),
        (["method=dense", "training.optimizer=adam"], ["training.momentum", "training.nesterov"], ["training.lr"]),
        (["method=oneshot"], ["training.finetune.momentum", "training.regrow.lr"], ["training.finetune.lr"]),
        (
            ["method=lrr"],
            ["training.finetune.lr", "training.finetune.epochs"],
            ["training.lr", "method.prune.rewind_lr"],
        ),
        (["method=oneshot_regrow"], ["method.regrow.given", "method.regrow.ssim_layers"], ["training.regrow.lr"]),
        (["method=oneshot_long"], ["method.regrow.budget", "method.regrow.value"], ["method.regrow.steps"]),
        (["method=granet"], ["schedule.cubic.every"], ["method.drop_and_grow.distribution", "schedule.cubic.end"]),
        (["method=rigl"], ["method.drop_and_grow.gradients", "training.finetune.lr"], ["sparsity.target"]),
        (["method=rigl", "training.clip_norm=1"], ["method.prune.batches"], ["method.drop_and_grow.gradients"]),
        (["method=snip"], ["method.prune.batches"], ["method.prune.per_class"]),
        (["method=hrank"], ["method.prune.rewind"], ["method.prune.batches"]),
        (
            ["dataset=cifar10", "training.augment.flip=true"],
            ["dataset.workers"],
            ["dataset.root", "dataset.verify", "dataset.mirror"],
        ),
        (["dataset=imagenet"], ["training.augment.crop_padding", "dataset.verify"], ["dataset.workers"]),
        (["logger=mlflow"], ["dataset.root"], ["logger.project", "logger.mlflow_uri"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_read_with_what(compose, words, dead, alive):
    found = settings_read.without_effect(compose(*words))
    assert not set(alive) & found.keys()
    assert [key for key in dead if key in LEAVES or key == "schedule"] == [key for key in dead if key in found]


def weights(config, quiet) -> dict[str, torch.Tensor]:
    run(config, "a test", quiet)
    return load_network(run_dir(config).best)


NEVER = {  # method -> what it does not read, and a word that it does
    "method=dense": (
        "training.milestones=[0.2] training.gamma=0.5 training.clip_over=live training.finetune.lr=0.7 schedule=cubic "
        "training.augment.padding_mode=reflect training.regrow.warmup=0.5 dataset.workers=0 dataset.verify=false "
        "diagnostics.layers=true logger.project=other",
        "training.momentum=0.5",
    ),
    "method=rigl": (
        "method.drop_and_grow.drop_fraction_end=0.2 method.drop_and_grow.distribution=erk method.prune.batches=3 "
        "method.drop_and_grow.gradients=before_clipping method.prune.per_class=2 method.prune.rewind_lr=true "
        "training.finetune.optimizer=adam training.clip_over=live",
        "method.drop_and_grow.drop_fraction=0.2",
    ),
}


@pytest.mark.parametrize("method", NEVER)
def test_what_is_unread_changes_no_bit_and_no_name_and_what_is_read_does(compose_under, quiet, tmp_path, method):
    own = ("training.augment.crop_padding=0", "method.drop_and_grow.drop_fraction_shape=constant")
    own = (*own, "method.drop_and_grow.update_every=1", "sparsity.target=0.9", method)
    unread, read = NEVER[method]
    before = compose_under(tmp_path / "before", *own)
    same = compose_under(tmp_path / "same", *own, *unread.split())
    other = compose_under(tmp_path / "other", *own, read)
    dead = settings_read.without_effect(before)
    assert all(settings_read.lies_in(word.partition("=")[0], dead) for word in unread.split())
    assert run_name(before) == run_name(same) != run_name(other)
    first, second, third = (weights(one, quiet) for one in (before, same, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)
