"""The confusion matrix as a picture, from two classes to a thousand."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sparse_lab.evaluate.picture import ALONE, _largest, draw


@pytest.mark.parametrize("classes", [2, 10, 45, pytest.param(100, marks=pytest.mark.full), 1000])
def test_every_number_of_classes_has_a_picture(classes, tmp_path):
    confusion = np.diag(np.full(classes, 40))
    confusion[0, -1], confusion[1] = 3, 0  # a class without an image
    names = ["$x^2", "a name in 日本語 that is much longer than there is room for", *map(str, range(2, classes))]
    draw(confusion, names, "a title " * 40, tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as picture:
        picture.load()
        width, height = picture.size
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert 400 < width < 2000 and 400 < height < 2000
    dark = (pixels < (60, 120, 200)).all(1).sum() / len(pixels)  # the diagonal, and the bar beside it
    assert dark > (0.002 if classes < 1000 else 0.001)
    assert [path.name for path in tmp_path.iterdir()] == ["one.png"]


def test_of_very_many_classes_a_single_mistake_is_still_seen():
    shares = np.zeros((1001, 1001))
    shares[700, 3], shares[1000, 1000] = 2.0, 50.0
    shares[40:45] = np.nan
    together = -(-len(shares) // ALONE)
    drawn = _largest(shares, together)
    assert together == 5 and drawn.shape == (201, 201)
    wanted = np.zeros((201, 201))
    wanted[140, 0], wanted[200, 200], wanted[8] = 2.0, 50.0, np.nan
    np.testing.assert_array_equal(drawn, wanted)
