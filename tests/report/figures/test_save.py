from __future__ import annotations

import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from sparse_lab.report import load, long, read
from sparse_lab.report.figures.accuracy import draw
from sparse_lab.report.figures.registry import NAMES, Picture, pictures
from sparse_lab.report.figures.save import put, put_all
from sparse_lab.report.load.traces import traces
from sparse_lab.report.tables.aggregate import levels

Make = Callable[..., Path]


def all_of(root: Path) -> list[Picture]:
    runs = read(root).results
    return pictures(long(runs, load()), levels(runs), load(), traces(runs)[0])


@pytest.mark.full
def test_several_processes_draw_what_one_draws(make_many: Callable[..., int], tmp_path: Path) -> None:
    assert make_many(tmp_path / "runs", methods=2, shares=2, seeds=2) == 8
    drawn = all_of(tmp_path)
    assert tuple(picture.name for picture in drawn) == NAMES
    for name in ("together", "alone"):
        (tmp_path / name).mkdir()
    put_all(drawn, tmp_path / "together")
    for picture in drawn:
        put(picture, tmp_path / "alone")
    files = {path.name: path.read_bytes() for path in (tmp_path / "together").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()}
    assert set(files) == {f"{name}.{kind}" for name in NAMES for kind in ("png", "pdf")}


def test_what_fails_in_another_process_fails_here(tmp_path: Path) -> None:
    def broken() -> Figure:
        raise ValueError("no such colour")

    with pytest.raises(ValueError, match="no such colour"):
        put_all([Picture(f"p{number}", "", "", broken) for number in range(6)], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_sign_that_the_font_lacks_says_nothing(make_run: Make, tmp_path: Path) -> None:
    make_run(method="密度 $x^")
    runs = read(tmp_path).results
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        put(Picture("p", "", "", lambda: draw(long(runs, []), levels(runs), [])), tmp_path)
    assert (tmp_path / "p.png").is_file()


@pytest.mark.nightly
def test_a_thousand_records_with_everything(
    make_many: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the start of the process to the last file; the time is printed, for it depends on what else runs here."""
    count = make_many(tmp_path / "runs")
    command = [sys.executable, "-m", "sparse_lab", "report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - began
    with capsys.disabled():
        print(f"\n{count:,} records with metrics and all diagnostics: {seconds:.1f} s")
    assert count == 1000 and "warning" not in done.stderr
    assert len((tmp_path / "out" / "results.csv").read_text().splitlines()) == 251
    assert {path.stem for path in (tmp_path / "out").glob("*.pdf")} == set(NAMES)
