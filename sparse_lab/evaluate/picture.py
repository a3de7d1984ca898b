"""The confusion matrix as a picture: readable from two classes to a thousand."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sparse_lab.records.atomic_io import atomic_write
from sparse_lab.report.figures.style import canvas, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WRITTEN = 20  # classes up to which each cell says its count
NAMED = 60  # up to which each row and column says its class
ALONE = 250  # classes up to which each cell is drawn; of more a cell is of several, or they would not be seen
CHARS = 22  # of a class's name
CELL = {WRITTEN: 0.42, NAMED: 0.19}  # inches of a cell, of so many classes at most
SMALLEST, LARGEST = 3.2, 9.0  # inches of the matrix
DARK = 0.45  # of the colours' range, from which on a count is white
NOBODY = "#cccccc"  # a row without an image


def draw(confusion: np.ndarray, names: Sequence[str], title: str, path: Path) -> None:
    """Write a PNG of images by true class (row) and predicted class (column), int [classes, classes], whole.

    Colours are shares of a row. They rise with the square root, so that the few that are mistaken are seen. Of very
    many classes neighbours share a cell, which shows the largest of their shares.
    """
    count = len(confusion)
    side = float(np.clip(count * next((size for most, size in CELL.items() if count <= most), 0), SMALLEST, LARGEST))
    side = side if count <= NAMED else LARGEST
    labels = [short(name, CHARS) for name in names] if count <= NAMED else []
    room = 0.75 + 0.075 * max(map(len, labels), default=4)  # inches for the classes beside and below
    below = room - 0.2
    width, height = side + room + 1.3, side + below + 0.75
    figure = canvas(width, height)
    axis = figure.add_axes((room / width, below / height, side / width, side / height))
    together = -(-count // ALONE)
    _matrix(axis, confusion, side / count, together)
    _ticks(axis, labels, count)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    figure.text(0.15 / width, 1 - 0.38 / height, short(title, int(width * 12)), fontsize=10)
    bar = figure.add_axes(((room + side + 0.18) / width, below / height, 0.16 / width, side / height))
    figure.colorbar(axis.images[0], cax=bar, ticks=[0, 1, 5, 10, 25, 50, 75, 100])
    shares = f"largest share of {together}x{together} classes" if together > 1 else "share of the class's images"
    bar.set_ylabel(f"{shares}, %")
    with warnings.catch_warnings(), atomic_write(path) as temporary:
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(temporary, format="png")


def _matrix(axis: Axes, confusion: np.ndarray, cell: float, together: int) -> None:
    """cell: inches of one. together: so many classes share a row and a column."""
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    images = confusion.sum(1, keepdims=True)
    shares = np.where(images > 0, 100.0 * confusion / np.maximum(images, 1), np.nan)
    colours = colormaps["Blues"].with_extremes(bad=NOBODY)
    drawn, norm, whole = _largest(shares, together), PowerNorm(0.5, 0.0, 100.0), len(shares) - 0.5
    end = together * len(drawn) - 0.5  # the last of them may stand for fewer classes
    extent = (-0.5, end, end, -0.5)
    axis.imshow(drawn, cmap=colours, norm=norm, extent=extent, aspect="auto", interpolation="nearest")
    axis.set(xlim=(-0.5, whole), ylim=(whole, -0.5))
    if len(confusion) > WRITTEN:
        return
    longest = max(len(str(confusion.max())), 2)
    size = min(10.0, 72 * cell / (0.75 * longest))  # points: a digit is some 0.6 of its size wide
    for (row, column), number in np.ndenumerate(confusion):
        if number:
            colour = "white" if (shares[row, column] / 100) ** 0.5 > 1 - DARK else "black"
            axis.text(column, row, str(number), ha="center", va="center", fontsize=size, color=colour)


def _largest(shares: np.ndarray, together: int) -> np.ndarray:
    """Of each block of so many rows and columns the largest share; NaN where all are."""
    starts = np.arange(0, len(shares), together)
    return np.fmax.reduceat(np.fmax.reduceat(shares, starts, axis=0), starts, axis=1)


def _ticks(axis: Axes, labels: list[str], count: int) -> None:
    if not labels:  # numbers, some of them
        step = next(step for step in (10, 20, 50, 100, 200, 500, 1000) if count / step <= 12 or step == 1000)
        axis.set_xticks(range(0, count, step))
        axis.set_yticks(range(0, count, step))
        return
    size = 9 if count <= WRITTEN else 7
    flat = max(map(len, labels)) <= 2
    axis.set_xticks(range(count), labels, rotation=0 if flat and count <= WRITTEN else 90, fontsize=size)
    axis.set_yticks(range(count), labels, fontsize=size)
