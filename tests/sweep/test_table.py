"""A table's definition: what it asks for, in which order, and what is none. Nothing trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparse_lab.cli.main import main
from sparse_lab.errors import UserError
from sparse_lab.experiment.identity import request_hash, run_name
from sparse_lab.sweep.plan import Request
from sparse_lab.sweep.table import Asked, Run, Table, merged, plan, tables

PAPERS = ["bidirectional", "bidirectional_cpu", "east", "east_cpu"]


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Path]:
    """tiny(change) -> a file with a tiny table, changed."""

    def write(change: Callable[[dict[str, Any]], Any] = lambda plain: None) -> Path:
        plain = {
            "title": "A tiny table",
            "seeds": [1, 2],
            "always": ["model.width=0.0625 dataset=digits training=digits"],
            "cells": ["method=dense", {"name": "pruned", "run": "method=oneshot sparsity=s90"}],
        }
        change(plain)
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(plain))
        return tmp_path / "tiny.yaml"

    return write


def composes(name: str, recipe: str, device: str) -> list[Run]:
    table = Table.read(name)
    runs = plan(table, Asked(recipe, device, seeds=1))
    assert len(runs) == len(table.cells) == len({run.name for run in runs})
    return runs


@pytest.mark.full
def test_the_table_of_east_composes() -> None:
    runs = composes("east", "quarter", "gpu")
    every = {run.config.method.name: part.update_every for run in runs if (part := run.config.method.drop_and_grow)}
    assert every["east"] == every["rigl_itop"] == 1000 and every["set_itop"] == 375
    assert {run.config.training.epochs for run in runs} == {62}


@pytest.mark.full
def test_the_table_of_bidirectional_regrowth_composes() -> None:
    runs = composes("bidirectional", "quarter", "cpu")
    names = [run.name for run in runs]
    regrown, *stronger = [run for run in runs if run.config.method.name == "iterative_regrow"]
    # a start stands before what it is needed for
    assert list(regrown.starts) == names[:2] and regrown.name == names[2]
    assert [run.config.schedule.iterative.round_epochs for run in runs if run.config.method.name == "lrr"] == [
        40,
        40,
        40,
    ]
    for run, target in zip(stronger, (0.9685, 0.9639, 0.9296), strict=True):
        config = run.config
        assert config.sparsity.target == target and config.method.prune.rewind_lr
        assert config.training.epochs == config.schedule.iterative.round_epochs == config.training.regrow.epochs == 40
        assert (config.training.regrow.optimizer, config.training.regrow.lr) == ("sgd", 0.1)


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.full), pytest.param("gpu", marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize("name", PAPERS)
def test_every_recipe_of_the_papers_tables_composes(name: str, device: str) -> None:
    for recipe in Table.read(name).recipes:
        composes(name, recipe, device)


def test_one_seed_of_every_cell_comes_first(tiny) -> None:
    runs = plan(Table.read(str(tiny())), Asked("default", "cpu"))
    assert [(run.number, run.seed, run.cell.name) for run in runs] == [
        (1, 1, "dense"), (2, 1, "pruned"), (3, 2, "dense"), (4, 2, "pruned"),
    ]  # fmt: skip
    assert list(runs[3].starts) == [runs[2].name]


def test_cells_are_chosen_by_name_and_by_number(tiny) -> None:
    table = Table.read(str(tiny(lambda plain: plain["cells"].append("method=static sparsity=s90"))))
    for asked, names in ((["3", "dense"], ["dense", "static"]), (["pruned"], ["pruned"]), (["1", "1"], ["dense"])):
        runs = plan(table, Asked("default", "cpu", seeds=1, cells=asked))
        assert [run.cell.name for run in runs] == names and [run.number for run in runs] == [*range(1, len(names) + 1)]


def test_a_users_own_tables_stand_beside_ours_and_are_no_choice_of_a_run(tiny, tmp_path: Path, capsys) -> None:
    (tmp_path / "conf" / "table").mkdir(parents=True)
    (tmp_path / "conf" / "method").mkdir()
    tiny(lambda plain: plain.update(cells=["method=mine"])).rename(tmp_path / "conf" / "table" / "own.yaml")
    (tmp_path / "conf" / "method" / "mine.yaml").write_text("defaults: [dense]\nname: mine\n")
    assert sorted(tables(tmp_path / "conf")) == sorted([*PAPERS, "own"])
    table = Table.read("own", tmp_path / "conf")
    [run] = plan(table, Asked("default", "cpu", conf=["--config-dir", str(tmp_path / "conf")], seeds=1))
    assert run.config.method.name == "mine"
    assert main(["table=east"]) == 2
    assert "table" in capsys.readouterr().err
    listed = Request.read(["--config-dir", str(tmp_path / "conf"), "--help"]).help_text()
    assert "method: acdc" in listed and "\ntable:" not in listed and "bidirectional_cpu" not in listed


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no title": (lambda plain: plain.pop("title"), "title"),
    "a title that is none": (lambda plain: plain.update(title=["x"]), "title"),
    "an unknown key": (lambda plain: plain.update(seed=[1]), "unknown key 'seed'; did you mean 'seeds'?"),
    "a key that is no text": (lambda plain: plain.update({3: 1}), "unknown key 3"),
    "a seed twice": (lambda plain: plain.update(seeds=[1, 1]), "twice"),
    "seeds that are none": (lambda plain: plain.update(seeds=[1, "2"]), "no list of whole numbers"),
    "a seed below 0": (lambda plain: plain.update(seeds=[-1]), "seed"),
    "no seeds": (lambda plain: plain.update(seeds=[]), "no list of whole numbers"),
    "no cells": (lambda plain: plain.update(cells=[]), "cells"),
    "cells that are a mapping": (lambda plain: plain.update(cells={"run": "method=dense"}), "cells"),
    "a cell's unknown key": (lambda plain: plain.update(cells=[{"method": "dense"}]), "cell 1: unknown key 'method'"),
    "a cell without overrides": (lambda plain: plain.update(cells=[{"name": "x"}]), "cell 1: run"),
    "a cell that is a number": (lambda plain: plain.update(cells=[3]), "cell 1: 3 is no list of overrides"),
    "a cell's name that is none": (lambda plain: plain.update(cells=[{"name": [], "run": ""}]), "cell 1: name: []"),
    "a reserved key": (lambda plain: plain.update(cells=["method=dense", "seed=1"]), "cell 2"),
    "where it runs": (lambda plain: plain.update(cells=["hydra/launcher=ray"]), "hydra/launcher=ray: what runs"),
    "one cell twice": (lambda plain: plain["cells"].append("method=dense"), "cells 1 and 3"),
    "an open quotation": (lambda plain: plain.update(always="method='dense"), "always: No closing quotation"),
    "a flag": (lambda plain: plain["cells"].append("--cfg=job"), "'--cfg=job' is no override"),
    "a word without a value": (lambda plain: plain["cells"].append("dense"), "'dense' is no override"),
    "a key taken out": (lambda plain: plain["cells"].append("~method=dense"), "nothing can be taken out"),
    "a sweep in a cell": (lambda plain: plain["cells"].append("method=rigl,set"), "method=rigl,set is a sweep"),
    "an unknown method": (lambda plain: plain["cells"].append("method=onshot"), "did you mean 'oneshot'?"),
    "an unknown override": (lambda plain: plain["cells"].append("training.epoch=1"), "did you mean 'epochs'?"),
    "a value out of range": (lambda plain: plain["cells"].append("sparsity.target=2"), "sparsity.target"),
    "what a config may not start": (
        lambda plain: plain["cells"].append("+callbacks.x._target_=os.system"), "cell 3"
    ),
    "two processes a run": (lambda plain: plain["cells"].append("trainer.devices=2"), "trainer.devices=2"),
    "recipes that are a list": (lambda plain: plain.update(recipes=["short"]), "recipes"),
    "a recipe of a cell's key": (lambda plain: plain.update(recipes={"run": []}), "'run' is a key of every cell"),
    "a recipe of numbers": (lambda plain: plain.update(recipes={"short": 3}), "recipes.short: 3 is no list"),
    "no such device": (lambda plain: plain.update(devices={"tpu": []}), "no device 'cpu'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_table_is_one_line(name: str, tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, line = WRONG[name]
    refused([str(tiny(change))], line, tmp_path, capsys)


def refused(argv: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", *argv, "--device", "cpu", "--outputs", str(tmp_path / "out")]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith("sparse-lab: ") and line in said and len(said) < 2000 and said.isprintable()
    assert not (tmp_path / "out").exists()


LAUGHS = "\n".join(
    f"{name}: &{name} [{', '.join(9 * [before])}]" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "a table is a mapping"),
    "a list": (b"- method=dense", "a table is a mapping"),
    "no YAML": (b"title: [", "cannot be read"),
    "a tab": (b"title:\n\t- x", "cannot be read"),
    "bytes": (bytes(range(256)), "cannot be read"),
    "nested too deep": (b"[" * 5000, "cannot be read"),
    "an object of Python's": (b"title: !!python/object/apply:os.system [true]", "cannot be read"),
    "keys that are lists": (b"? [1]\n: 2", "cannot be read"),
    "a title that ends the line": (b'title: "a\\nb"\nseeds: [1]\ncells: [1]', "cell 1: 1 is no list"),
    "a cell that laughs": (f"a: &a lol\n{LAUGHS}\ntitle: x\nseeds: [1]\ncells: [*i]".encode(), "unknown key 'a'"),
    "cells that laugh": (
        b"title: x\nseeds: [1]\ncells: [[&a [lol, lol], &b [*a, *a, *a, *a], &c [*b, *b, *b, *b], [*c, *c, *c, *c]]]",
        "cell 1",
    ),
    "a key with colours": (b'"\\e[31mred": 1', "unknown key"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_table_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, line = FILES[name]
    (tmp_path / "file.yaml").write_bytes(content)
    refused([str(tmp_path / "file.yaml")], line, tmp_path, capsys)


ASKED: list[tuple[list[str], str]] = [
    (["bidirektional"], "unknown table 'bidirektional'; did you mean 'bidirectional'?"),
    (["TINY", "--recipe", "papers"], "unknown recipe 'papers' of table tiny; known: default"),
    (["TINY", "--cell", "prund"], "unknown cell 'prund' of table tiny; did you mean 'pruned'? known: dense, pruned"),
    (["TINY", "--cell", "1", "--cell", "3"], "unknown cell '3' of table tiny; known: dense, pruned; or a number, 1"),
    (["TINY", "--config-dir", "nowhere"], "--config-dir nowhere: no such folder"),
    (["TINY", "training.epoch=3"], "did you mean 'epochs'?"),
    (["TINY", "method=onshot"], "unknown method 'onshot'; did you mean 'oneshot'?"),
    (["TINY", "training.epochs=2,3"], "training.epochs=2,3 is a sweep"),
    (["TINY", "seed=4"], "seed=4: the table's seeds and --seeds say which"),
    (["TINY", "paths.outputs=there"], "use --outputs"),
    (["TINY", "sparsity.target=2"], "sparsity.target"),
    (["TINY", "--seeds", "3"], "--seeds 3: table tiny has 2 seeds"),
    (["TINY", "--jobs", "2", "hydra/launcher=ray"], "--jobs 2 is hydra/launcher=joblib"),
    (["TINY", "hydra/sweeper=optuna"], "hydra/sweeper=optuna: of Hydra's keys a table heeds"),
    (["TINY", "hydra/launcher=rai"], "unknown hydra/launcher 'rai'; did you mean 'ray'?"),
    (["TINY", "--config-dir", "TMP", "dataset=cifar10", "paths.data=TMP"], "use --data"),
    (["TINY", "--data", "TMP/none", "dataset=cifar10"], "CIFAR-10 is not in"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "line"), ASKED)
def test_a_wrong_request_is_one_line(argv: list[str], line: str, tiny, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = str(tiny())
    refused([file if word == "TINY" else word.replace("TMP", str(tmp_path)) for word in argv], line, tmp_path, capsys)


def test_a_folder_and_a_file_that_may_not_be_read(tiny, tmp_path: Path, capsys, monkeypatch) -> None:
    refused([str(tmp_path)], "unknown table", tmp_path, capsys)
    file = tiny()
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "no", str(file))))
    with pytest.raises(UserError, match="cannot be read"):
        Table.read(str(file))


def test_of_two_overrides_the_last_one_counts() -> None:
    assert merged(["a=1", "training=digits"], ["b=2"], ["training=east", "+a=3"]) == ["b=2", "training=east", "+a=3"]


def test_arithmetic_is_no_part_of_a_request() -> None:
    def asked(*lines: str):
        return Request.read([]).compose(["method=rigl", "trainer=cpu", *lines]).config()

    plain = asked()
    for line in ("compute=sparse", "trainer.precision=64-true", "trainer.precision=bf16-mixed"):
        assert run_name(asked(line)) != run_name(plain) and request_hash(asked(line)) == request_hash(plain)
    assert request_hash(asked("seed=2")) != request_hash(plain) != request_hash(asked("sparsity=s90"))
