from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from sparse_lab.report import load, long, read
from sparse_lab.report.render.latex import _SIGNS, COLUMNS, COLUMNS_PUBLISHED, escape, latex
from sparse_lab.report.tables.cell import MARKS

Make = Callable[..., Path]


def tabular(root: Path) -> str:
    return latex(long(read(root).results, load()))


def body(text: str) -> list[list[str]]:
    """The cells of the rows between \\midrule and \\bottomrule."""
    rows = re.findall(r"\\midrule\n(.*?)\\bottomrule", text, flags=re.S)
    return [
        re.split(r"(?<!\\)&", line.strip().removesuffix(r"\\")) for part in rows for line in part.strip().split("\n")
    ]


def test_a_cell_holds_ours_the_published_number_and_the_verdict(make_run: Make, tmp_path: Path) -> None:
    for seed, accuracy in ((1, 91.0), (2, 91.2)):
        make_run(seed=seed, accuracy=accuracy)
    make_run(method="mine", accuracy=12.3)
    text = tabular(tmp_path)
    rows = [[cell.strip() for cell in row] for row in body(text)]
    assert rows == [
        ["mine", "$12.30$"],
        ["oneshot", r"$91.10 \pm 0.14$ {\scriptsize [$91.03 \pm 0.17$] $\approx$}"],
    ]
    assert "In brackets: published. $\\approx$: within one published" in text


def test_every_mark_has_a_sign_and_its_meaning(make_run: Make, seal: Callable[..., None], tmp_path: Path) -> None:
    """Of all that can be wrong with a cell at once."""
    images = {"train": {"used": 64, "whole": 45_000}}
    make_run(method="mine", images=images, selected_on="test", data={"official": False, "changed": True}, folder="mine")
    path = tmp_path / "runs" / "mine" / "result.json"
    seal(path, json.loads(path.read_text().replace('"connected": true', '"connected": false')))
    text = tabular(tmp_path)
    assert set(MARKS) <= set(_SIGNS)
    assert r"$^{\dagger \ddagger \P \neq \S}$" in text
    for mark in "†‡¶≠§":
        assert f"${_SIGNS[mark]}$: {escape(MARKS[mark])}." in text


def test_every_environment_is_closed_and_every_row_is_full(make_run: Make, tmp_path: Path) -> None:
    for dataset in ("cifar10", "cifar100"):
        for number in range(COLUMNS + 3):
            make_run(method="mine", sparsity=round(0.9 + number / 100, 2), dataset=dataset)
        make_run(method="last", sparsity=0.97, dataset=dataset, data={"official": False}, selected_on="test")
    text = tabular(tmp_path)
    begun, ended = re.findall(r"\\begin\{(\w+)\}", text), re.findall(r"\\end\{(\w+)\}", text)
    assert begun == ["table", "tabular", "tabular"] * 2 and sorted(begun) == sorted(ended)
    for spec, part in re.findall(r"\\begin\{tabular\}\{(l?r+)\}(.*?)\\end\{tabular\}", text, flags=re.S):
        lines = [line for line in part.splitlines() if line.rstrip().endswith(r"\\")]
        assert all(len(re.split(r"(?<!\\)&", line)) == len(spec) for line in lines)
        assert [part.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    # The last method ran in the second half only.
    assert [row[0].strip() for row in body(text)] == ["mine", "last", "mine"] * 2
    assert r"$\dagger$: the epoch was selected on the test set" in text and r"$^{\dagger \ddagger}$" in text


def test_published_numbers_need_room(make_run: Make, tmp_path: Path) -> None:
    for share in (0.95, 0.96, 0.97, 0.98, 0.99):
        make_run(sparsity=share)
    text = tabular(tmp_path)
    assert re.findall(r"\\begin\{tabular\}\{(\w+)\}", text) == ["l" + "r" * COLUMNS_PUBLISHED, "lrr"]


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("a_b", r"a\_b"),
        ("50% & $5 #1", r"50\% \& \$5 \#1"),
        ("{x}", r"\{x\}"),
        (r"\input{/etc/passwd}", r"\textbackslash{}input\{/etc/passwd\}"),
        ("[x]*", "{[}x{]}{*}"),
        ("a--b", "a{-}{-}b"),
        ("x^2~y", r"x\textasciicircum{}2\textasciitilde{}y"),
        ('<b>|"`', r"\textless{}b\textgreater{}\textbar{}''\textasciigrave{}"),
        ("two\nlines\t%", r"two lines \%"),
        ("β = 1 ± 2 …", r"$\beta$ = 1 $\pm$ 2 \ldots{}"),
        ("é 漢字 \x00\x1b 😀", r"é \otherscript{漢字}{U+6F22 U+5B57} ? \otherscript{😀}{U+1F600}"),
    ],
)
def test_escape(text: str, safe: str) -> None:
    assert escape(text) == safe


def test_nothing_from_a_record_reaches_tex_as_a_command(make_run: Make, tmp_path: Path) -> None:
    evil = "\\write18{rm}% }$&#_^~\\end{tabular}[*]"
    make_run(method=evil, folder="evil", model=evil, dataset=evil)
    text = tabular(tmp_path)
    assert re.findall(r"\\end\{(\w+)\}", text) == ["tabular", "table"] and r"\write" not in text
    for line in text.splitlines()[3:]:
        assert "%" not in line.replace(r"\%", "")
    plain = re.sub(r"\\[{}]", "", text)
    assert plain.count("{") == plain.count("}") and text.count("$") - text.count(r"\$") in range(0, 100, 2)
