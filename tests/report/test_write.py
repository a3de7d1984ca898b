from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from sparse_lab.errors import UserError
from sparse_lab.report import show, write
from sparse_lab.report.render.markdown import escape

Make = Callable[..., Path]


def cells(line: str) -> list[str]:
    """The cells of a Markdown table's line; an escaped pipe is no border."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_every_file_is_written_and_the_csv_holds_the_means(make_run: Make, tmp_path: Path) -> None:
    values = [91.2, 90.7, 91.9]
    for seed, value in enumerate(values):
        make_run(seed=seed, accuracy=value)
    written = write([tmp_path / "runs"], tmp_path / "new" / "out")
    names = {path.name for path in (tmp_path / "new" / "out").iterdir()}
    tables = {"report.html", "report.md", "results.csv", "levels.csv", "table.tex"}
    assert names == tables | {f"{name}.{kind}" for name in ("accuracy",) for kind in ("png", "pdf")}
    [row] = csv.DictReader(written.results.open())
    assert float(row["mean"]) == pytest.approx(statistics.fmean(values), abs=1e-5)
    assert float(row["std"]) == pytest.approx(statistics.stdev(values), abs=1e-5)
    assert len(list(csv.DictReader(written.levels.open()))) == 3
    assert (written.page.parent / "accuracy.png").stat().st_size > 10_000
    assert (written.page.parent / "accuracy.pdf").read_bytes().startswith(b"%PDF")
    # 91.27 is 0.24 above 91.03, more than its deviation of 0.17.
    assert "91.27 ± 0.60 [91.03 ± 0.17] ↑" in written.report.read_text() and row["verdict"] == "above"


def test_a_file_is_whole_or_as_it_was(make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run()
    write([tmp_path], tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    def torn(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", torn)
    with pytest.raises(UserError, match=r"the disk is full: .*choose another --out"):
        write([tmp_path], tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.full
def test_a_full_disk_is_told_by_the_process_that_meets_it(
    make_run: Make, put_lines: Callable[..., None], update: Callable[..., Any], tmp_path: Path
) -> None:
    layers = {"fc": {"kept": 1, "total": 100, "effective": 0}}
    for seed in (1, 2):
        folder = make_run(seed=seed, seconds=1.0, layers=[{"name": "fc", "kept": 1, "total": 100}])
        put_lines(folder, "updates", [update(0, layers=layers), update(1, layers=layers)])
    written = write([tmp_path], tmp_path / "out")
    assert len(written.pictures) > 3
    (tmp_path / "out" / "updates.pdf").unlink()
    (tmp_path / "out" / "updates.pdf").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        write([tmp_path], tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_whoever_reads_the_old_file_reads_it_to_its_end(make_run: Make, tmp_path: Path) -> None:
    make_run(seed=1)
    report = write([tmp_path], tmp_path).report
    before = report.read_text()
    with report.open() as old:
        make_run(seed=2, accuracy=70.0)
        write([tmp_path], tmp_path)
        assert old.read() == before != report.read_text()


def test_a_report_in_the_runs_folder_changes_nothing_when_made_again(make_run: Make, tmp_path: Path) -> None:
    make_run()
    first = write([tmp_path], tmp_path)
    written = [first.page, first.report, first.results, first.levels, first.latex, *first.pictures]
    written += [path.with_suffix(".pdf") for path in first.pictures]
    before = [path.read_bytes() for path in written]
    write([tmp_path], tmp_path)
    assert before == [path.read_bytes() for path in written]


def test_the_page_lists_failed_runs_and_escapes_their_errors(make_run: Make, make_status: Make, tmp_path: Path) -> None:
    make_run()
    make_status("lost", state="failed", error="a | b\\| __init__ <x> *y*")
    text = write([tmp_path], tmp_path).report.read_text()
    [line] = [line for line in text.splitlines() if line.startswith("| lost")]
    assert cells(line)[:3] == ["lost", "failed", "3/9"]
    assert cells(line)[3] == r"a \| b\\\| \_\_init\_\_ \<x\> \*y\*"


def test_every_line_of_a_table_has_as_many_cells_as_its_head(make_run: Make, tmp_path: Path) -> None:
    make_run(settings={"training.note": "a|b"})
    make_run(settings={"training.note": "c|d"})
    tables = re.findall(r"(?:^\|.*\n)+", write([tmp_path], tmp_path).report.read_text(), flags=re.M)
    assert len(tables) == 3
    for table in tables:
        assert len({len(cells(line)) for line in table.splitlines()}) == 1
    assert r"oneshot (training.note=a\|b)" in tables[0]


def test_escape_leaves_names_readable() -> None:
    assert escape("iterative_regrow") == "iterative_regrow"
    assert escape("two\nlines") == "two lines"
    assert escape("91.20 [91.03 ± 0.17]") == "91.20 [91.03 ± 0.17]"


def test_escape_leaves_no_link_no_code_and_no_html() -> None:
    assert escape("[x](javascript:alert(1))") == r"[x\](javascript:alert(1))"
    assert escape("[x]: javascript:alert(1)") == r"[x\]: javascript:alert(1)"
    assert escape("![x][y]") == r"![x\][y]"
    assert escape("<script>`x`") == r"\<script\>\`x\`"


def test_only_unfinished_runs_still_make_a_page(make_status: Make, tmp_path: Path) -> None:
    make_status("lost", state="failed", error="no memory")
    written = write([tmp_path], tmp_path)
    assert "no memory" in written.report.read_text() and "no memory" in written.page.read_text()
    assert list(csv.DictReader(written.results.open())) == []


def test_no_record_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no records under"):
        write([tmp_path], tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_out_that_is_a_file_is_one_clear_line(make_run: Make, tmp_path: Path) -> None:
    make_run()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        write([tmp_path], tmp_path / "file")


@pytest.mark.every(2)
@pytest.mark.parametrize(("width", "terminal"), [(100, True), (60, True), (200, True), (80, False)])
def test_the_shown_table_is_never_cut(make_run: Make, tmp_path: Path, width: int, terminal: bool) -> None:
    shares = [0.9, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995, 0.999]
    epochs = [3, 5]
    for i, share in enumerate(shares):
        for number in epochs:
            settings = {"training.epochs": number, "training.lr": number / 10, "training.note": "[bold]x"}
            make_run(sparsity=share, accuracy=60.0 + i + number / 10, settings=settings)
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, color_system=None)
    show(write([tmp_path], tmp_path).made_from.table, console)
    lines = out.getvalue().splitlines()
    assert "…" not in out.getvalue()
    assert all(line.endswith("│") for line in lines if line.startswith("│"))
    assert max(map(len, lines)) <= max(width, 120 if not terminal else 0)
    for i, _ in enumerate(shares):
        for number in epochs:
            assert sum(f"{60.0 + i + number / 10:.2f}" in line for line in lines) == 1


def test_the_page_says_who_made_the_numbers(make_run: Make, tmp_path: Path) -> None:
    known = {"command": "sparse-lab -m seed=1,2", "commit": "abc123", "device": "cpu: one", "seconds": 90}
    for seed in (1, 2):
        make_run(seed=seed, **known)
    make_run(method="other", seed=3, **{**known, "commit": "def456", "seconds": 30})
    lines = write([tmp_path / "runs"], tmp_path / "out").report.read_text().splitlines()
    rows = [cells(line) for line in lines if "sparse-lab -m" in line]
    assert ["sparse-lab -m seed=1,2", "abc123", "cpu: one", "2", "1, 2", "3.0"] in rows
    assert ["sparse-lab -m seed=1,2", "def456", "cpu: one", "1", "3", "0.5"] in rows
