"""Plugins: how they are named and loaded, what is refused in one line, and what of them is a run's name."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import sys

import pytest

import sparse_lab
from sparse_lab.cli.doctor import checks as doctor
from sparse_lab.cli.main import main
from sparse_lab.config import CHOICES
from sparse_lab.errors import SparseLabError, UserError
from sparse_lab.experiment import plugin_files, plugins
from sparse_lab.experiment.identity import cell, identity, request_hash, run_name
from sparse_lab.records.record import BadRecord, check_result
from sparse_lab.registering import REGISTERED
from sparse_lab.sweep.launch import Task
from sparse_lab.sweep.launchers import Basic, Job, compose_elsewhere

SCORE = """
@sparse_lab.register_score(without_passes=True, of_weights=True)
def {0}(view):
    return {{name: weight.abs() for name, weight in view.weights().items()}}
"""


@pytest.fixture
def make_result():
    """The least that a record says, and more."""
    plain = {"name": "r", "cell": "c", "model": "m", "dataset": "d", "method": "dense", "seed": 1, "config": {}}
    plain |= {"test_accuracy": 50.0, "kept": 1, "total": 2, "seconds": 1.0}
    return lambda **more: {**plain, **more}


@pytest.mark.parametrize(
    ("argv", "named", "left"),
    [
        (["--plugin", "a.py", "methods"], ["a.py"], ["methods"]),
        (["methods", "--plugin", "a.py"], ["a.py"], ["methods"]),
        (["--plugin=a.py", "-m", "--plugin", "b", "seed=1,2"], ["a.py", "b"], ["-m", "seed=1,2"]),
        (["seed=1", "--plugin=a=b c.py"], ["a=b c.py"], ["seed=1"]),
        (["plugin=a.py", "--plugins"], [], ["plugin=a.py", "--plugins"]),
    ],
)
def test_they_are_taken_from_any_place_of_a_line(argv, named, left):
    assert plugins.take(argv) == (named, left)


@pytest.mark.parametrize("argv", [["--plugin"], ["--plugin="], ["keys", "--plugin", ""], ["--plugin", "--help"]])
def test_a_flag_without_a_value_is_refused(argv, capsys):
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith("sparse-lab: --plugin needs a FILE or a MODULE")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = (", "SyntaxError: '(' was never closed"),
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name' (line 2)"),
        ("\nraise SystemExit(3)", "SystemExit: 3 (line 3)"),
        ("1 / 0", "ZeroDivisionError: division by zero (line 2)"),
        ("", "it registers nothing; see docs/add_a_method.md"),
        (SCORE.format("magnitude"), "score 'magnitude' is taken: choose another name (line 3)"),
    ],
)
def test_what_cannot_be_loaded_is_one_line_that_names_it(text, said, plugin, capsys):
    path = plugin(SCORE.format("first") + text if "magnitude" in text else text)
    before = len(REGISTERED)
    assert main(["--plugin", str(path), "keys", "seed"]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"sparse-lab: plugin {path} cannot be loaded: ") and said.partition(" (line")[0] in line
    assert line.count("\n") == 1 and len(REGISTERED) == before and not plugins.LOADED


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("nowhere.py", "no such file"),
        ("./nowhere", "no such file"),
        (".", "is a folder without __init__.py"),
        ("./notes.txt", "is no .py file"),
        ("no.such_module", "there is no module no here"),
        ("json", "it registers nothing"),
        ("sparse_lab.config", "it registers nothing"),
        ("seed=1", "there is no module seed=1 here"),
    ],
)
def test_what_is_no_plugin(asked, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    known = set(sys.modules)
    with pytest.raises(UserError, match=f"plugin {asked}.*{said}"):
        plugins.load(asked)
    assert known <= set(sys.modules)


@pytest.mark.parametrize("name", ["json", "torch", "scores", "config", "a b", "größe", "x.y", "1st"])
def test_a_file_of_any_name_takes_no_module_s_place(name, plugin):
    path = plugin(SCORE.format("mine"), name)
    before = sys.modules.get(name)
    loaded = plugins.load(str(path))
    assert loaded.name == name and sys.modules.get(name) is before
    assert plugins.load(os.path.relpath(path)) is loaded and list(plugins.hashes()) == [name]


def test_others_of_its_folder_are_imported_and_count(plugin):
    plugin("depth = 1", "deep", "plugins/below")
    plugin("", "__init__", "plugins/below")
    plugin("from .below.deep import depth", "near")
    plugin("", "unused")
    path = plugin(f"from .near import depth\nimport late_neighbour\n{SCORE.format('mine')}")
    plugin("", "late_neighbour")
    first = plugins.load(str(path)).hash
    for changed, matters in (("unused", False), ("below/deep", True), ("near", True), ("late_neighbour", True)):
        plugins.forget()
        sys.modules.pop("late_neighbour", None)
        file = path.parent / f"{changed}.py"
        file.write_text(file.read_text() + "\n# changed\n")
        now = plugins.load(str(path)).hash
        assert (now != first) is matters, changed
        first = now
    assert not list(path.parent.rglob("__pycache__"))


def test_neighbours_of_one_name_are_not_taken_for_each_other(plugin):
    for folder, how in (("first", "import helper"), ("second", "import helper"), ("third", "from . import helper")):
        plugin(f"name = '{folder}'", "helper", folder)
        plugin(f"{how}\n{SCORE.format(folder)}\nassert helper.name == '{folder}'", folder, folder)
    first, second, third = (
        plugin("", "other", folder).with_name(f"{folder}.py") for folder in ("first", "second", "third")
    )
    plugins.load(str(first))
    plugins.load(str(third))
    second.write_text(second.read_text().replace("assert", "#"))
    with pytest.raises(UserError, match=r"its helper.py and .*first/helper.py have one name: .* import helper`"):
        plugins.load(str(second))


def test_a_package_by_its_folder_and_by_its_name(plugin, monkeypatch, tmp_path):
    plugin("from . import scores_here", "__init__", "site/a_package")
    plugin(SCORE.format("of_a_package"), "scores_here", "site/a_package")
    settings = tmp_path / "site" / "a_package" / "data.yaml"
    settings.write_text("x: 1")
    folder = settings.parent
    by_folder = plugins.load(f"{folder}/")
    assert by_folder.name == "a_package"
    plugins.forget()
    monkeypatch.syspath_prepend(tmp_path / "site")
    by_name = plugins.load("a_package")
    assert by_name.name == "a_package" and by_name.hash == by_folder.hash
    plugins.forget()
    settings.write_text("x: 2")
    assert plugins.load("a_package").hash != by_name.hash


def test_a_file_that_changes_within_a_second_is_read_anew(plugin):
    path = plugin(SCORE.format("mine") + "value = 1\n")
    hashes = {plugins.load(str(path)).hash}
    for value in (2, 3):
        plugins.forget()
        plugin(SCORE.format("mine") + f"value = {value}\n")
        loaded = plugins.load(str(path))
        assert sys.modules[loaded.module].value == value
        hashes.add(loaded.hash)
    assert len(hashes) == 3


def test_two_of_one_name_count_both_in_whatever_order(plugin):
    one, other = (plugin(SCORE.format(name), folder=name) for name in ("first", "second"))
    plugins.load(str(one)), plugins.load(str(other))
    found = plugins.hashes()
    assert list(found) == ["mine", "mine (2)"]
    plugins.forget()
    plugins.load(str(other)), plugins.load(str(one))
    assert plugins.hashes() == found


def test_two_that_register_one_name(plugin):
    plugins.load(str(plugin(SCORE.format("mine"), "first")))
    with pytest.raises(UserError, match=r"second.py cannot be loaded: score 'mine' is taken"):
        plugins.load(str(plugin(SCORE.format("mine"), "second")))
    assert list(plugins.hashes()) == ["first"]


def test_a_run_s_name_is_that_of_what_is_loaded(compose, plugin, tmp_path):
    config = compose("method=static")
    before = run_name(config), cell(config), request_hash(config)
    assert "plugins" not in identity(config)
    path = plugin(SCORE.format("mine"))
    plugins.load(str(path))
    named = run_name(config), cell(config), request_hash(config)
    assert not set(named) & set(before) and identity(config)["plugins"] == plugins.hashes()
    plugins.forget()
    assert (run_name(config), cell(config), request_hash(config)) == before
    plugins.load(str(plugin(SCORE.format("mine"), folder="elsewhere")))
    assert run_name(config) == named[0]
    plugins.forget()
    plugins.load(str(plugin(SCORE.format("mine") + "# changed", folder="elsewhere")))
    assert run_name(config) not in (named[0], before[0])


def test_choices_count_by_their_content(plugin, tmp_path):
    path = plugin("from pathlib import Path\nsparse_lab.register_choices(Path(__file__).with_name('conf'))")
    chosen = path.parent / "conf" / "method" / "own.yaml"
    chosen.parent.mkdir(parents=True)
    chosen.write_text("name: own\n")
    first = plugins.load(str(path))
    assert CHOICES == list(first.choices) == [chosen.parents[1]]
    plugins.forget()
    assert CHOICES == []
    chosen.write_text("name: own\nsummary: other\n")
    assert plugins.load(str(path)).hash != first.hash


@pytest.fixture
def install(plugin, monkeypatch, tmp_path):
    """install("module", text) -> a distribution their-package that brings the module as its plugin."""
    monkeypatch.syspath_prepend(tmp_path / "site")

    def put(module, text):
        plugin(text, module, "site")
        about = tmp_path / "site" / "their_package-1.0.dist-info"
        about.mkdir(exist_ok=True)
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[sparse_lab.plugins]\nany = {module}\n[others]\nx = y\n")
        importlib.invalidate_caches()

    return put


def test_installed_packages_bring_theirs(install, capsys):
    install("their_plugin", SCORE.format("brought"))
    assert plugins.start(["keys"]) == ["keys"] and list(plugins.hashes()) == ["their_plugin"]
    assert plugins.words() == plugins.words(whole=True) == []  # other processes find it by themselves
    assert plugins.handed().places[0][2] == "their-package"
    [finding] = doctor.plugins()
    assert "their_plugin" in finding.line and "of the installed package their-package): score brought" in finding.line


def test_an_installed_plugin_that_is_broken_stops_the_command(install, capsys):
    install("their_broken_one", "1 / 0")
    assert main(["keys", "seed"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("sparse-lab: the installed package their-package: its plugin their_broken_one cannot be")
    assert said.count("\n") == 1 and "ZeroDivisionError" in said


def test_another_process_loads_them_before_what_holds_their_classes(plugin):
    path = plugin(
        f"""
        from dataclasses import dataclass
        @dataclass
        class Settings:
            x: int = 1
        {SCORE.format("mine").replace(chr(10), chr(10) + "        ")}
        """
    )
    loaded = plugins.load(str(path))
    settings = sys.modules[loaded.module].Settings(3)
    handed = pickle.dumps((plugins.handed(), settings))
    plugins.forget()  # a process that has loaded nothing
    brought, there = pickle.loads(handed)
    brought.check()
    assert there.x == 3 and list(plugins.hashes()) == ["mine"]
    plugins.forget()
    path.write_text(path.read_text() + "# changed\n")
    with pytest.raises(UserError, match=r"mine.py is not on \S+ what it was when the command began"):
        pickle.loads(handed)[0].check()


def test_a_job_whose_worker_has_another_content_fails_and_says_so(tmp_path):
    task = Task("sparse-lab", "joblib", 2, folder=tmp_path)
    brought = plugins.Handed((), "plugin mine.py is not here what it was")
    compose_elsewhere(brought, None, None, task, {}, Job(1, "a-run", ()))
    [outcome] = [json.loads(path.read_text()) for path in tmp_path.rglob("*.json")]
    assert outcome["outcome"] == "failed" and outcome["run"] == "a-run" and outcome["said"] == brought.said


def test_a_job_whose_worker_cannot_load_one_fails_and_says_so(tmp_path, plugin):
    path = plugin("1 / 0")
    launcher = Basic()
    launcher.task = Task("sparse-lab", "joblib", 1, folder=tmp_path)

    def collect(handle):
        try:
            plugins.load(str(path))
        except UserError as error:
            raise RuntimeError("a task has failed to un-serialize") from error

    launcher.collect = collect
    launcher._returned(Job(0, "a-run", ()), None)
    outcome = json.loads((tmp_path / "000.json").read_text())
    assert outcome["outcome"] == "failed" and not launcher.task.lost
    assert outcome["said"] == f"plugin {path} cannot be loaded: ZeroDivisionError: division by zero (line 2)"


def test_a_record_s_plugins_are_a_mapping_of_texts(make_result):
    check_result(make_result(plugins={"mine": "abc"}))
    for wrong in (["mine"], {"mine": 1}, "mine"):
        with pytest.raises(BadRecord, match="'plugins' is no mapping of names to hashes"):
            check_result(make_result(plugins=wrong))


def test_the_root_offers_every_registering_function():
    offered = {name: module for name, module in sparse_lab.PUBLIC.items() if name.startswith("register_")}
    assert len(offered) == 9
    for name, module in offered.items():
        function = getattr(sparse_lab, name)
        assert function.__module__ == module and "Raise SparseLabError" in function.__doc__


def test_nothing_is_registered_under_a_name_that_is_no_word(plugin):
    for name in ("my-score", "", "null", "class", "ä", "nan"):

        def function(view):
            return {}

        function.__name__ = name
        for register in (sparse_lab.register_score, sparse_lab.register_distribution, sparse_lab.register_model):
            with pytest.raises(SparseLabError, match="a name is a plain word"):
                register(function)


def test_what_is_imported_late_or_by_others_counts_and_what_is_installed_does_not(plugin):
    plugin("def f(): from .late import g", "near")
    plugin("x = 1", "late")
    plugin("", "json")  # the standard library's comes first, so it never runs; that it counts does no harm
    path = plugin(f"import torch\nfrom .near import f\nimport sparse_lab.config\n{SCORE.format('mine')}")
    first = plugins.load(str(path)).hash
    plugins.forget()
    path.with_name("late.py").write_text("x = (")  # it is never imported, so nothing is wrong with it
    second = plugins.load(str(path)).hash
    plugins.forget()
    __import__("xml.dom")  # whatever else this process has imported
    assert plugins.load(str(path)).hash == second != first


def test_a_file_above_installed_packages_is_not_all_of_them(plugin, monkeypatch, tmp_path):
    """As one in the folder of a project that holds its environment, or in a checkout of sparse_lab."""
    path = plugin("from theirs import x\nfrom ours import y", "mine", ".")
    for folder in ("theirs", "ours"):
        plugin("x = y = 1", "__init__", folder)
    monkeypatch.setattr(plugin_files, "_installed", lambda: {tmp_path / "theirs"})
    first = plugin_files.content_hash(path, "", [])
    plugin("x = y = 2", "__init__", "theirs")
    assert plugin_files.content_hash(path, "", []) == first
    plugin("x = y = 2", "__init__", "ours")
    assert plugin_files.content_hash(path, "", []) != first


def test_a_module_within_a_package_counts_with_what_it_imports_of_it(plugin, monkeypatch, tmp_path):
    """Installed packages too: there nothing beside the package itself."""
    monkeypatch.setattr(plugin_files, "_installed", lambda: {tmp_path})
    plugin("", "beside", ".")
    plugin("", "unused", "pack")
    plugin("", "__init__", "pack")
    plugin("x = 1", "used", "pack/deep")
    plugin("x = 1", "near", "pack/deep")
    path = plugin("from pack.deep.used import x\nfrom .near import x as y\nimport beside", "mine", "pack/deep")
    hashes = [plugin_files.content_hash(path, "pack.deep.mine", [])]
    for name, folder in (("unused", "pack"), ("beside", ".")):
        plugin("changed = 1", name, folder)
        assert plugin_files.content_hash(path, "pack.deep.mine", []) == hashes[0]
    for name, folder in (("used", "pack/deep"), ("near", "pack/deep"), ("__init__", "pack")):
        plugin("changed = 1", name, folder)
        hashes.append(plugin_files.content_hash(path, "pack.deep.mine", []))
    assert len(set(hashes)) == 4
