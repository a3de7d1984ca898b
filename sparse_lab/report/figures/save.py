"""Puts pictures on paper: each as PNG and as PDF, in as many processes as the machine has cores."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sparse_lab.records.atomic_io import atomic_write
from sparse_lab.report.figures.registry import Picture

# The date would make the same report another file every time; zlib's best costs a quarter of the time for little.
_SETTINGS: dict[str, dict[str, Any]] = {
    "png": {"pil_kwargs": {"compress_level": 4}},
    "pdf": {"metadata": {"CreationDate": None}},
}
FORMATS = tuple(_SETTINGS)
ALONE = 3  # pictures that one process draws sooner than a second one starts
_shared: list[Picture] = []  # in a worker: what its parent has planned


def put_all(pictures: Sequence[Picture], out: Path) -> None:
    """Writes NAME.png and NAME.pdf of every picture into `out`, each file whole.

    Raises OSError if a file cannot be written.
    """
    import matplotlib.backends.backend_agg
    import matplotlib.backends.backend_pdf  # noqa: F401 - imported once, before the processes part

    processes = min(len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1, len(pictures))
    if processes < 2 or len(pictures) <= ALONE:
        for picture in pictures:
            put(picture, out)
        return
    # A forked process holds the data already; what is not Linux may not fork safely, and draws alone.
    with ProcessPoolExecutor(processes, get_context("fork"), _share, (list(pictures),)) as pool:
        for done in [pool.submit(_put_shared, number, out) for number in _slowest_first(pictures)]:
            done.result()


def put(picture: Picture, out: Path) -> None:
    """Draws one picture and writes it in every format."""
    with warnings.catch_warnings():
        # A name may hold signs that the font lacks; they become boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = picture.draw()
        for kind in FORMATS:
            with atomic_write(out / f"{picture.name}.{kind}") as path:
                figure.savefig(path, format=kind, **_SETTINGS[kind])


def _share(pictures: list[Picture]) -> None:
    _shared[:] = pictures


def _put_shared(number: int, out: Path) -> None:
    put(_shared[number], out)


def _slowest_first(pictures: Sequence[Picture]) -> list[int]:
    """So that no process is left with a long one while the others have nothing to do."""
    return sorted(range(len(pictures)), key=lambda number: -pictures[number].panels)
