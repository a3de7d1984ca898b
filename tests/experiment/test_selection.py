"""An epoch is not selected on next to nothing, unless that is what was asked for."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from sparse_lab.config import Config
from sparse_lab.errors import UserError
from sparse_lab.experiment.identity import run_dir, run_name
from sparse_lab.experiment.runner import run
from sparse_lab.experiment.selection import check_selection

Compose = Callable[..., Config]


@pytest.mark.parametrize(
    ("words", "validation", "test", "refused"),
    [
        (["training.select=validation_best"], 9, 99, "9 validation"),
        (["training.select=validation_best"], 10, 1, None),
        (["training.select=test_best"], 99, 9, "9 test"),
        (["training.select=last"], 1, 1, None),
        (
            ["training.select=last", "training.patience=2"],
            1,
            99,
            "training.patience would judge epochs by 1 validation",
        ),
        (["training.select=last", "training.finetune.patience=2"], 1, 99, "training.patience"),
        (["training.select=validation_best", "training.select_on_few=true"], 1, 1, None),
    ],
)
def test_fewer_images_than_classes_select_nothing(
    words: list[str], validation: int, test: int, refused: str | None, compose: Compose
) -> None:
    config = compose(*words)
    images = {"train": (100, 100), "validation": (validation, 100), "test": (test, 100)}
    if refused is None:
        check_selection(config, images)
    else:
        with pytest.raises(UserError, match=refused):
            check_selection(config, images)


def test_one_validation_image_stops_the_run_before_it_trains(compose: Compose, quiet) -> None:
    config = compose("method=dense", "dataset.validation=0.0001")
    with pytest.raises(UserError, match=r"1 validation image\(s\) of 10 classes.* training.select_on_few=true"):
        run(config, "x", quiet)
    assert not (run_dir(config).path / "metrics.csv").exists()
    told = compose("method=dense", "dataset.validation=0.0001", "training.select_on_few=true")
    assert run_name(told) == run_name(config), "it changes no result"
    assert run(told, "x", quiet)["images"]["validation"] == {"used": 1, "whole": 1}


def test_a_record_says_how_many_images_there_were(compose: Compose, quiet) -> None:
    """Digits: 1,797 scans, of which a fifth of each class is the test set."""
    config = compose("method=dense", "dataset.validation=0.2", "training.limit_batches=1")
    images = run(config, "x", quiet)["images"]
    whole = {part: said["whole"] for part, said in images.items()}
    assert whole["train"] + whole["validation"] + whole["test"] == 1797
    assert whole["validation"] == round(0.2 * (1797 - whole["test"])) and abs(whole["test"] - 1797 / 5) < 5
    assert {part: said["used"] for part, said in images.items()} == {"train": 16, "validation": 16, "test": 30}
    assert json.loads((run_dir(config).path / "result.json").read_text())["images"] == images
