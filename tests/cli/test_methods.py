"""`sparse-lab methods`: every method, what it is, what it needs, from the config that a run would have."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from torch import nn

from sparse_lab.cli.main import main
from sparse_lab.cli.methods import MEMORY, grid, markdown, memory, methods, read
from sparse_lab.config import KINDS, conf_dir
from sparse_lab.errors import UserError
from sparse_lab.experiment.compose import ConfigSource, schema
from sparse_lab.methods.base import FROM_GRADIENTS
from sparse_lab.sparsity.scores import SCORES, Probe, View
from sparse_lab.sparsity.structured.filter_scores import FILTER_SCORES
from sparse_lab.sweep.plan import Request

BARE = schema(in_place=False)
NAMES = sorted(path.stem for path in (conf_dir() / "method").glob("*.yaml"))
NEEDS = {
    "dense": "-",
    "static": "-",
    "set": "-",
    "mest": "-",  # drops by the gradients of living weights, grows at random
    "rigl": "dense gradients",
    "east": "dense gradients",
    "granet": "dense gradients",
    "snip": "dense gradients (once)",
    "synflow": "dense gradients (100 times)",
    "gmp": "dense gradients (while dense)",
    "acdc": "dense gradients (while dense)",
    "oneshot": "pretrained, extra epochs",
    "resrep": "pretrained, extra epochs",
    "iterative": "pretrained, extra epochs (rounds)",
    "lth": "pretrained, extra epochs (rounds)",
    "iterative_extra": "pretrained, extra epochs (rounds)",
    "iterative_regrow": "pretrained, extra epochs (rounds), dense gradients (once)",
}
CONFIG = {
    "dense": "-",
    "rigl": "prune (random), drop_and_grow (magnitude, gradient)",
    "gmp": "prune (magnitude), cubic",
    "granet": "prune (random), drop_and_grow (magnitude, gradient), cubic",
    "lth": "prune (magnitude), iterative_full",
    "l1_filters": "prune filters (l1)",
    "resrep": "compactors, prune filters (compactor), at_end",
    "dctps": "dct, prune (random)",
    "east": "sharing, dyrelu, prune (random), cycles, drop_and_grow (magnitude, gradient)",
    "oneshot_regrow": "prune (lamp), regrow (taylor)",
}


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, str]]:
    return {row["name"]: row for row in methods()}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder of the user's: a method of its own schedule, and one that has a built-in method's name."""
    (tmp_path / "method").mkdir()
    (tmp_path / "schedule").mkdir()
    (tmp_path / "schedule" / "halves.yaml").write_text("defaults: [iterative]\niterative: {share: 0.5}\n")
    (tmp_path / "method" / "mine.yaml").write_text(
        "defaults:\n  - iterative_regrow\n  - override /schedule@_global_.schedule: halves\n"
        "paper: Me 2026\nsummary: a[b]|c\nprune: {score: grasp}\n"
        "regrow:\n  steps: 2\n  batches: ${training.batch_size}\n"
    )
    (tmp_path / "method" / "rigl.yaml").write_text("defaults: [static, _self_]\nname: rigl\n")
    return tmp_path


def test_every_method_has_a_kind_and_a_paper_with_its_year(rows):
    assert sorted(rows) == NAMES and all(row["kind"] in KINDS and row["summary"] for row in rows.values())
    assert [KINDS.index(row["kind"]) for row in rows.values()] == sorted(
        KINDS.index(row["kind"]) for row in rows.values()
    )
    for name, row in rows.items():
        assert (row["kind"] == "control") == row["summary"].startswith("control:"), name
        if row["kind"] not in ("dense", "control"):
            assert re.search(r"\b20[012]\d\b", row["paper"]) and re.search(r"arXiv \d{4}\.\d{5}", row["paper"]), name


def test_methods_count_as_methods_and_none_has_two_names(rows, capsys):
    kinds = [row["kind"] for row in rows.values()]
    assert main(["methods"]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert (
        said
        == f"{len(kinds) - kinds.count('control') - 1} methods, {kinds.count('control')} controls, and dense training"
    )
    assert said.startswith("29 methods, 6 controls")
    made_of, source = {}, ConfigSource(conf_dir())
    for name in rows:
        chosen = read(source, name, BARE)
        same = json.dumps([asdict(replace(chosen.method, name="", kind="dense", paper="", summary="")), chosen.choice])
        assert made_of.setdefault(same, name) == name, f"{name} is {made_of[same]}"


def test_what_is_our_own_guess_says_so(rows):
    assert "our guess" in rows["prune_on_the_fly"]["paper"] and "of our own" in rows["prune_on_the_fly"]["summary"]


@pytest.mark.parametrize("name", NEEDS)
def test_what_a_method_needs(name, rows):
    assert rows[name]["needs"] == NEEDS[name]


@pytest.mark.parametrize("name", CONFIG)
def test_what_a_method_is_made_of(name, rows):
    assert rows[name]["config"] == CONFIG[name]


@pytest.mark.full
def test_the_files_read_here_are_what_hydra_composes(own):
    request = Request.read(["--config-dir", str(own)])
    source = ConfigSource(conf_dir(), own)
    assert source.choices("method") == sorted({*NAMES, "mine"})
    for name in source.choices("method"):
        composed, chosen = request.compose([f"method={name}"]), read(source, name, BARE)
        assert composed.config().method == chosen.method, name
        assert composed.config().schedule == chosen.schedule, name
        # what Hydra makes of every key of the parts that are there
        whole = OmegaConf.to_container(composed.cfg.method, resolve=True)
        said = {key: value for key, value in asdict(chosen.method).items() if value is not None}
        assert {key: whole[key] for key in said} == said, name


def test_scores_from_gradients_are_those_that_differentiate(monkeypatch):
    asked = set()
    grad = torch.autograd.grad

    def watch(*args, **kwargs):
        asked.add(name)
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", watch)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    batch = (torch.randn(2, 3, 4, 4), torch.tensor([0, 1]))
    reference = {"0": model[0].weight, "3": model[3].weight}
    for name in (*SCORES, *FILTER_SCORES):
        {**SCORES, **FILTER_SCORES}[name](View(model, [batch], reference=reference, probe=Probe(lambda: 4)))
    assert asked == set(FROM_GRADIENTS)


def test_a_method_of_the_user_is_in_the_table_and_a_built_in_one_stays_what_it_is(own, rows):
    seen = {row["name"]: row for row in methods(own)}
    assert seen["rigl"] == rows["rigl"] and len(seen) == len(rows) + 1
    assert seen["mine"] == {
        "name": "mine",
        "kind": "bidirectional",
        "paper": "Me 2026",
        "config": "prune (grasp), regrow (taylor), halves",
        "needs": "pretrained, extra epochs (rounds), dense gradients (each round), dense gradients (2 times)",
        "memory": "-",
        "summary": "a[b]|c",
    }


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune: {scor: lamp}", "scor"),
        ("kind: statc", "did you mean 'static'"),
        ("defaults: [rigle]", "did you mean 'rigl'"),
        ("prune: [", "line 1, column 9"),
    ],
)
def test_a_file_that_no_run_could_read_is_said_in_one_line(text, message, tmp_path, capsys):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text(text)
    assert main(["methods", "--config-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sparse-lab: method mine: ") and message in error and error.count("\n") == 1


def test_a_folder_that_is_not_there_is_an_error(tmp_path, capsys):
    assert main(["methods", "--config-dir", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_markdown_has_one_whole_row_a_method(own):
    lines = markdown(methods(own)).splitlines()
    assert len(lines) == 2 + len(NAMES) + 1
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert all(len(row) == 7 for row in cells) and set(cells[1]) == {"---"}
    assert [row[0] for row in cells[2:]] == [f"`{row['name']}`" for row in methods(own)]
    assert r"a[b]\|c" in next(row for row in cells if row[0] == "`mine`")


@pytest.mark.full
@pytest.mark.parametrize("width", [80, 120])
def test_the_table_in_a_terminal_keeps_every_name_and_paper(width, own):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - as long as the console
    console.print(grid(methods(own), width))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    text = re.sub(r"\s+", " ", "\n".join(lines).replace("│", " "))
    for row in methods(own):
        assert any(row["name"] in line.split() for line in lines), row["name"]
    assert "Price & Tanner 2021, arXiv 2102.07655" in text and "a[b]|c" in text
    heads = [line.strip(" │") for line in lines if line.startswith("│ ") and line[2] != " "]
    assert heads == list(KINDS)


def test_memory_is_read_in_times_dense(tmp_path):
    measured = tmp_path / "memory.csv"
    measured.write_text(
        "method,model,peak_mb,dense_peak_mb,ratio,commit,machine\n"
        'rigl,vgg16,1070,1000,1.0700,abc,"cpu: a, 2 threads"\ndense,vgg16,1000,1000,1.000,abc,x\n'
    )
    assert memory(measured) == {"rigl": "1.07x", "dense": "1.00x"}
    seen = {row["name"]: row["memory"] for row in methods(measured=measured)}
    assert seen["rigl"] == "1.07x" and seen["dense"] == "1.00x" and seen["set"] == "-"


def test_what_is_shipped_was_measured_of_these_methods():
    with open(MEMORY, newline="") as file:
        for row in csv.DictReader(file):
            assert row["method"] in NAMES and row["machine"]
            assert float(row["ratio"]) == pytest.approx(float(row["peak_mb"]) / float(row["dense_peak_mb"]), abs=2e-3)


def test_the_gallery_answers_without_torch():
    code = "import sys, sparse_lab.cli.methods as g; g.main(['--markdown']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_the_readme_carries_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--markdown"]) == 0
    assert capsys.readouterr().out.strip() in (conf_dir().parent / "README.md").read_text(encoding="utf-8")


def test_a_method_may_point_to_any_key_of_a_run(tmp_path):
    (tmp_path / "method").mkdir()
    own = "{update_every: '${seed}', drop_fraction: '${sparsity.target}'}"
    text = f"defaults: [rigl, _self_]\nname: mine\ndrop_and_grow: {own}\n"
    (tmp_path / "method" / "mine.yaml").write_text(text)
    assert "mine" in [row["name"] for row in methods(tmp_path)]


def test_a_method_of_before_a_key_was_renamed_is_told_the_new_name(tmp_path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("defaults: [rigl, _self_]\nname: mine\nrewire: {every: 5}\n")
    with pytest.raises(UserError, match=r"method mine: method\.rewire is method\.drop_and_grow since 0\.2"):
        methods(tmp_path)
