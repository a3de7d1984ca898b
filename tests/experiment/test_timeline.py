"""How many steps an epoch has is known before any data is read."""

from __future__ import annotations

import math

import pytest

from sparse_lab import data
from sparse_lab.experiment.timeline import steps_an_epoch


@pytest.mark.parametrize(
    "words",
    [
        ["dataset.train_limit=null"],
        ["dataset.train_limit=null", "dataset.validation=0.37", "training.batch_size=100"],
        ["dataset.train_limit=33", "training.batch_size=16"],
        ["dataset.train_limit=5"],
        ["dataset.train_limit=null", "training.limit_batches=3"],
        ["dataset=synthetic", "dataset.train_limit=null", "model.width=0.5"],
        ["dataset=synthetic", "dataset.train_limit=77"],
        ["dataset.train_limit=80", "training.batch_size=16", "training.accumulate=2"],
    ],
    ids=" ".join,
)
def test_steps_an_epoch_are_those_of_the_loaders(compose, words):
    config = compose(*words)
    loaded = data.build(config.dataset, config.training, config.seed)
    assert steps_an_epoch(config) == math.ceil(len(loaded.train) / config.training.accumulate)


def test_nobody_knows_a_folder_of_photos(compose):
    words = ["dataset=imagenet", "dataset.train_limit=null"]
    assert steps_an_epoch(compose(*words)) is None
    assert steps_an_epoch(compose(*words, "training.limit_batches=7")) == 7
    assert steps_an_epoch(compose(*words, "training.limit_batches=7", "training.accumulate=3")) == 3
