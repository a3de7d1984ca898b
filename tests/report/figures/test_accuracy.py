from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from sparse_lab.report import levels, load, long, read
from sparse_lab.report.figures.accuracy import COLOURS, draw, looks

Make = Callable[..., Path]


def picture(root: Path) -> np.ndarray:
    """The drawn report as an array of shape (height, width, 4), values in 0..1."""
    runs = read(root).results
    path = root / "accuracy.png"
    draw(long(runs, load()), levels(runs), load()).savefig(path)
    return np.asarray(imread(path))


def holds(image: np.ndarray, colour: str) -> int:
    wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return int((np.abs(image[..., :3] - wanted).max(axis=-1) < 0.01).sum())


def test_the_picture_has_a_sensible_size_and_every_method_s_colour(make_run: Make, tmp_path: Path) -> None:
    methods = [f"m{i}" for i in range(10)]
    for i, method in enumerate(methods):
        for sparsity in (0.9, 0.99, 0.999):
            for seed in (1, 2):
                make_run(method=method, sparsity=sparsity, seed=seed, accuracy=90 - 5 * i - seed, model="mine")
    make_run(method="dense", sparsity=0.0, accuracy=95.0, model="mine")
    image = picture(tmp_path)
    height, width = image.shape[:2]
    assert 500 < height < 2000 and 800 < width < 3000
    assert all(holds(image, colour) > 100 for colour in COLOURS)


def test_ten_methods_of_a_panel_have_ten_colours_and_a_method_one_look_everywhere(
    make_run: Make, tmp_path: Path
) -> None:
    for i in range(10):
        make_run(method=f"m{i}")
    for method in ("m3", "m7", "new"):
        make_run(method=method, model="resnet34")
    styles = looks(long(read(tmp_path).results, []))
    assert len({styles[f"m{i}"]["color"] for i in range(10)}) == 10
    assert len({(look["color"], look["marker"]) for look in styles.values()}) == 11
    assert styles["new"]["color"] not in (styles["m3"]["color"], styles["m7"]["color"])


def test_two_pairs_make_two_panels(make_run: Make, tmp_path: Path) -> None:
    make_run(accuracy=90.0)
    narrow = picture(tmp_path).shape[1]
    make_run(accuracy=90.0, dataset="cifar100")
    assert picture(tmp_path).shape[1] > 1.5 * narrow


@pytest.mark.parametrize("tested", [True, False])
def test_levels_on_the_way_are_drawn(make_run: Make, tmp_path: Path, tested: bool) -> None:
    steps = [(share, 93.0 - 9 * share, 92.0 - 9 * share if tested else None) for share in (0.2, 0.5, 0.8, 0.9)]
    make_run(method="iterative", sparsity=0.9, model="mine")
    without = holds(picture(tmp_path), COLOURS[0])
    make_run(method="iterative", sparsity=0.9, seed=2, model="mine", levels=steps)
    assert holds(picture(tmp_path), COLOURS[0]) > 1.2 * without


def test_nothing_finished_is_a_picture_that_says_so(tmp_path: Path) -> None:
    image = picture(tmp_path)
    assert 0 < (image[..., :3].min(axis=-1) < 0.5).mean() < 0.05


def test_dense_alone_can_be_drawn(make_run: Make, tmp_path: Path) -> None:
    make_run(method="dense", sparsity=0.0, accuracy=94.0, model="resnet50")
    make_run(method="dense", sparsity=0.0, accuracy=94.5, model="resnet50", seed=2)
    assert holds(picture(tmp_path), "#222222") > 100
