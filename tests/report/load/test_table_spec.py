"""A folder with table.yaml is a table of its own, and a report on a folder above writes each of them in place."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml

from sparse_lab.cli.report import main

Make = Callable[..., Path]
FILES = ("report.md", "report.html", "results.csv", "levels.csv", "table.tex", "accuracy.png")


@pytest.fixture
def put(make_run: Make, tmp_path: Path) -> Callable[..., Path]:
    """put("a/b", title=...) -> tmp_path/a/b with one run and a table.yaml that says this (none where nothing is)."""

    def make(place: str, accuracy: float = 90.0, seed: int = 1, **said: object) -> Path:
        folder = tmp_path / place
        run = make_run(accuracy=accuracy, seed=seed)
        (folder / "runs").mkdir(parents=True)
        run.rename(folder / "runs" / run.name)
        if said:
            (folder / "table.yaml").write_text(yaml.safe_dump(said))
        return folder

    return make


def means(folder: Path) -> list[float]:
    return pd.read_csv(folder / "results.csv")["mean"].tolist()


def test_each_table_below_is_written_in_place(
    put: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = put("tables/one", 91.0, title="The first <table>", command="sparse-lab -m seed=1,2")
    two = put("tables/deep/er/two", 92.0, title="The second table")
    within = put("tables/one/within", 93.0, 2, title="belongs to the first")
    assert main([str(tmp_path / "tables")]) == 0
    said = capsys.readouterr().out
    assert all((folder / name).is_file() for folder in (one, two) for name in FILES)
    assert means(one) == [92.0] and means(two) == [92.0]  # of 91 and 93
    assert not (within / "report.md").exists() and not (tmp_path / "tables" / "report.md").exists()
    assert said.index("The second table (") < said.index("The first <table> (")
    assert (one / "report.md").read_text().startswith("# The first \\<table\\>\n")
    assert "Filled by sparse-lab -m seed=1,2" in (one / "report.md").read_text()
    page = (one / "report.html").read_text()
    assert "<h1>The first &lt;table&gt;</h1>" in page and "<code>sparse-lab -m seed=1,2</code>" in page


def test_what_lies_in_no_table_has_a_report_of_its_own(
    put: Callable[..., Path], make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = put("tables/one", 91.0, title="One")
    make_run(accuracy=70.0)
    assert main([str(tmp_path)]) == 0
    assert means(tmp_path) == [70.0] and means(table) == [91.0]
    assert (tmp_path / "report.md").read_text().startswith("# Report\n")
    out = capsys.readouterr().out
    assert out.count("wrote ") == 2


def test_a_table_by_itself_can_go_elsewhere_and_several_cannot(
    put: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = put("tables/one", 91.0, title="One"), put("tables/two", 92.0, 2, title="Two")
    assert main([str(one), "--out", str(tmp_path / "there")]) == 0
    assert (tmp_path / "there" / "report.md").read_text().startswith("# One\n")
    assert main([str(tmp_path / "tables"), "--out", str(tmp_path / "else")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "--out" in line and str(one) in line and str(two) in line and not (tmp_path / "else").exists()
    # given one by one they are read together, as folders always were
    assert main([str(one), str(two), "--out", str(tmp_path / "both")]) == 0
    assert means(tmp_path / "both") == [91.5]


def test_planned_runs_of_a_table_are_missing_until_they_are_there(put: Callable[..., Path], tmp_path: Path) -> None:
    rows = [
        {"name": "vgg16-cifar10-rigl-99-seed1-0", "model": "vgg16", "dataset": "cifar10", "method": "rigl"},
        {"name": "../elsewhere"},
    ]
    folder = put("one", 91.0, title="One", planned=rows)
    assert main([str(folder)]) == 0
    page = (folder / "report.md").read_text()
    missing = page[page.index("## Missing runs") : page.index("## Warnings")]
    assert "vgg16-cifar10-rigl-99-seed1-0 |" in missing and "not started" in missing and "elsewhere" not in missing
    [run] = (folder / "runs").iterdir()
    (folder / "table.yaml").write_text(yaml.safe_dump({"title": "One", "planned": [{"name": run.name}]}))
    assert main([str(folder)]) == 0
    assert "## Missing runs" not in (folder / "report.md").read_text()


@pytest.mark.every(2)
@pytest.mark.parametrize(("text", "heading"), [("", "# one"), ("title: 7", "# one"), ('title: " "', "# one")])
def test_a_table_without_a_title_has_its_folders_name(
    text: str, heading: str, put: Callable[..., Path], tmp_path: Path
) -> None:
    folder = put("one")
    (folder / "table.yaml").write_text(text)
    assert main([str(tmp_path)]) == 0
    assert (folder / "report.md").read_text().startswith(f"{heading}\n")


def test_a_table_that_cannot_be_read_is_one_line(
    put: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (put("one") / "table.yaml").write_text("title: [")
    assert main([str(tmp_path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "table.yaml cannot be read" in line


def test_one_table_without_a_run_does_not_stop_the_others(
    put: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, last = put("a", 91.0, title="A"), put("c", 92.0, 2, title="C")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "table.yaml").write_text("title: B")
    assert main([str(tmp_path)]) == 2
    assert means(first) == [91.0] and means(last) == [92.0]
    [line] = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "b") in line


RESULTS = Path(__file__).parents[3] / "results"


@pytest.fixture
def tracked() -> list[str]:
    """What Git keeps below results/."""
    listed = subprocess.run(["git", "ls-files", "-z", "."], cwd=RESULTS, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("a copy without Git's own folder, or without results/")
    return listed.stdout.rstrip("\0").split("\0")


def test_a_kept_table_is_a_handful_of_files(tracked: list[str]) -> None:
    tables = {Path(name).parts[0] for name in tracked if name.endswith("/table.yaml")}
    assert len(tables) >= 7
    for name in tables:
        files = {path.removeprefix(f"{name}/") for path in tracked if path.startswith(f"{name}/")}
        assert {"table.yaml", "records.jsonl", "report.md", "results.csv"} <= files and len(files) <= 8
    pages = [
        RESULTS.parent / "README.md",
        RESULTS / "README.md",
        *(RESULTS / path for path in tracked if path[-3:] == ".md"),
    ]
    shown = {
        (page.parent / link).resolve().relative_to(RESULTS).as_posix()
        for page in pages
        for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text())
    }
    # plots are made again: Git keeps those that a page shows, and a page shows none that a checkout lacks
    assert shown == {path for path in tracked if path.endswith((".png", ".pdf"))}
    benches = [Path(path).stem.removeprefix("layers-") for path in tracked if path.startswith("bench/")]
    assert set(benches) == {"amd-epyc-2-cores", "nvidia-h200", "compute"}  # machines, and a picture


@pytest.mark.full
def test_the_kept_tables_are_what_their_records_say(tracked: list[str], tmp_path: Path) -> None:
    """What Git keeps of a report is made again from the records, word for word."""
    for path in tracked:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(("/table.yaml", "/records.jsonl")):
            shutil.copy(RESULTS / path, tmp_path / path)
    assert main([str(tmp_path)]) == 0
    made = [path for path in tracked if path.endswith(("/report.md", "/results.csv"))]
    assert len(made) >= 14
    for path in made:
        assert (tmp_path / path).read_text() == (RESULTS / path).read_text(), path
