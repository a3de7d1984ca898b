"""A result is that of the very data it was made on: another data set's is never taken for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparse_lab.callbacks.nan_guard import NanGuard
from sparse_lab.config import Config
from sparse_lab.errors import UserError
from sparse_lab.experiment.identity import cell, run_dir
from sparse_lab.experiment.runner import run
from sparse_lab.methods import table

PHOTOS = ("dataset=imagenet", "dataset.num_classes=2", "dataset.image_size=32", "dataset.workers=0",
          "dataset.validation=0.5", "dataset.train_limit=null", "dataset.eval_limit=null",
          "training.batch_size=4", "training.epochs=1", "training.finetune.epochs=1")  # fmt: skip


def photos(base: Path, seed: int, count: int = 4) -> Path:
    source = np.random.default_rng(seed)
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            (base / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = source.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(base / part / label / f"{number}.png")
    return base


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("photos")
    return photos(root / "A", seed=1), photos(root / "B", seed=2)


@pytest.fixture
def on(compose: Callable[..., Config]) -> Callable[..., Config]:
    return lambda base, *words: compose(*PHOTOS, f"paths.data={base}", *words)


def test_another_data_set_is_another_run_with_parents_of_its_own(on, two, tmp_path, quiet):
    first = run(on(two[0], "method=oneshot", "sparsity.target=0.9"), "x", quiet)
    second = run(on(two[1], "method=oneshot", "sparsity.target=0.9"), "x", quiet)
    assert first["name"] != second["name"] and first["start"] != second["start"]
    assert first["cell"] != second["cell"], "they share no cell of a table"
    assert first["data"]["fingerprint"] != second["data"]["fingerprint"]
    assert len(list((tmp_path / "runs").iterdir())) == 4


def test_the_same_files_elsewhere_are_the_same_run(on, two, tmp_path, wide_console, capsys):
    result = run(on(two[0], "method=dense"), "x", wide_console)
    shutil.copytree(two[0], tmp_path / "moved")
    again = run(on(tmp_path / "moved", "method=dense"), "x", wide_console)
    assert again["name"] == result["name"] and "done already" in capsys.readouterr().out


def test_photos_that_are_added_in_place_make_another_run(on, tmp_path, quiet):
    base = photos(tmp_path / "data", seed=3)
    before = run(on(base, "method=dense"), "x", quiet)
    for label in ("cat", "dog"):
        for number in (5, 6):
            Image.new("RGB", (32, 32), (number * 40, 9, 9)).save(base / "train" / label / f"{number}.png")
    config = on(base, "method=dense")
    assert run(config, "x", quiet)["name"] != before["name"]
    assert cell(config) != before["cell"]


def test_a_run_that_was_stopped_on_one_does_not_go_on_with_another(on, two, quiet, wide_console, monkeypatch, capsys):
    words = ("method=dense", "training.epochs=3")

    def pull_the_plug(self, trainer, *rest):
        if trainer.current_epoch == 1:
            raise RuntimeError("pulled the plug")

    with monkeypatch.context() as patch:
        patch.setattr(NanGuard, "on_train_batch_end", pull_the_plug)
        with pytest.raises(RuntimeError, match="pulled"):
            run(on(two[0], *words), "x", quiet)
    run(on(two[1], *words), "x", wide_console)
    assert "goes on from" not in capsys.readouterr().out
    run(on(two[0], *words), "x", wide_console)
    assert "goes on from last.ckpt" in capsys.readouterr().out


def test_data_that_changes_between_a_run_and_what_it_starts_from_stops_it(on, tmp_path, quiet, monkeypatch):
    base = photos(tmp_path / "data", seed=4)
    real = table.starts

    def change(config: Config) -> dict[str, Config]:
        if config.method.name == "oneshot":
            Image.new("RGB", (32, 32), (1, 2, 3)).save(base / "train" / "cat" / "0.png")
        return real(config)

    config = on(base, "method=oneshot", "sparsity.target=0.9")
    monkeypatch.setattr("sparse_lab.experiment.runner.table.starts", change)
    with pytest.raises(UserError, match="have changed since this run began: start the same command again"):
        run(config, "x", quiet)
    assert not run_dir(config).has_result


def test_data_that_changes_while_a_run_trains_is_on_record(on, tmp_path, wide_console, monkeypatch, capsys):
    base = photos(tmp_path / "data", seed=5)

    def change(self, trainer, *rest):
        Image.new("RGB", (32, 32), (1, 2, 3)).save(base / "train" / "cat" / "0.png")

    monkeypatch.setattr(NanGuard, "on_train_batch_end", change)
    result = run(on(base, "method=dense"), "x", wide_console)
    assert "WARNING: the files of the data set have changed" in capsys.readouterr().out
    folder = tmp_path / "runs" / result["name"]
    assert json.loads((folder / "result.json").read_text())["data"]["changed"] is True
    assert run_dir(on(base, "method=dense")).name != result["name"], "the changed data is another run's"
