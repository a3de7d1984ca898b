"""examples/own_method: a score, a rule of dropping and growing and a schedule from outside, as the package's own."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
import torch

from sparse_lab.cli.config_keys import keys
from sparse_lab.cli.main import main
from sparse_lab.experiment import plugins
from sparse_lab.sparsity.scores import View, find_score
from sparse_lab.training.checkpoint_io import load_network

RULE = ("method=blurred_rigl", "sparsity=s90", "method.blurred.update_every=1")


def private(source: str) -> list[str]:
    """The names of others that begin with an underscore."""
    tree = ast.parse(source)
    imported = [name.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names]
    used = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return [name for name in (*imported, *used) if name.startswith("_") and name not in ("__init__", "annotations")]


@pytest.mark.parametrize("example", ["own_method", "own_network"])
def test_no_private_name_is_used(example, examples):
    source = (examples / example / "plugin.py").read_text()
    assert private(source) == [] and private("from a import _b\na._c") == ["_b", "_c"]
    assert len(source.splitlines()) < 100


def test_the_rule_runs_and_its_setting_has_a_say(start, results, tmp_path, capsys):
    said = {}
    for blur in ("0", "3"):
        assert start(*RULE, f"method.blurred.blur={blur}", example="own_method") == 0
        said |= {blur: capsys.readouterr().out}
    runs = results()
    assert len(runs) == 2 and not any("WARNING" in line for line in said.values())
    masks = []
    for name, result in runs.items():
        assert result["kept"] == round(0.1 * result["total"]) and result["plugins"] == plugins.hashes()
        assert list(result["plugins"]) == ["plugin"] and "--plugin" in result["command"]
        network = load_network(tmp_path / "runs" / name / "checkpoints" / "best.ckpt")
        masks.append({key: value for key, value in network.items() if key.endswith("mask")})
    assert any(not torch.equal(masks[0][key], masks[1][key]) for key in masks[0])
    assert start(*RULE, "method.blurred.blur=0", example="own_method") == 0
    assert "done already" in capsys.readouterr().out and len(results()) == 2


@pytest.mark.full
def test_without_blur_it_is_rigl_but_for_its_drop_score(start, results, tmp_path):
    """By the package's own scores both are the same to the bit."""
    drop = "drop=magnitude"
    assert start(*RULE, "method.blurred.blur=0", f"method.blurred.{drop}", example="own_method") == 0
    rigl = ("method=rigl", "sparsity=s90", "method.drop_and_grow.update_every=1", f"method.drop_and_grow.{drop}")
    assert start(*rigl, example="own_method") == 0
    ours, theirs = (
        load_network(tmp_path / "runs" / name / "checkpoints" / "best.ckpt")
        for name in sorted(results(), key=lambda name: "blurred" not in name)
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_score_is_what_it_says(examples):
    plugins.load(str(examples / "own_method" / "plugin.py"))
    layer = torch.nn.Linear(3, 2)
    gradient = torch.tensor([[1.0, 0.0, -2.0], [0.5, 0.0, 0.0]])
    found = find_score("magnitude_with_gradient")(View(layer, grads={"": gradient}))
    assert torch.allclose(found[""], layer.weight.abs() * (1 + gradient.abs() / 2))


def test_the_schedule_prunes_stair_by_stair(start, results, examples, capsys):
    request = ("method=gmp", "schedule=stairs", "schedule.stairs.stairs=2", "schedule.stairs.end=1", "sparsity=s90")
    assert start(*request, "training.epochs=3", example="own_method") == 0
    assert "schedule=stairs has no effect" not in capsys.readouterr().out
    [result] = results().values()
    assert result["kept"] == round(0.1 * result["total"])
    assert result["config"]["schedule"]["stairs"] == {"stairs": 2, "end": 1}


def test_verbs_know_it(examples, capsys, monkeypatch):
    plugin = ["--plugin", str(examples / "own_method" / "plugin.py")]
    assert main(["methods", *plugin, "--markdown"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "`blurred_rigl`" in line)
    assert "blurred (magnitude_with_gradient, gradient)" in row and "dense gradients" in row
    assert "method.blurred.blur" in [key for key, *_ in keys()] and "schedule.stairs.end" in [key for key, *_ in keys()]
    assert main([*plugin, "--cfg", "job", "--package", "method.blurred", "method=blurred_rigl"]) == 0
    assert "blur: 1.0" in capsys.readouterr().out
    assert main([*plugin, "--help"]) == 0
    assert re.search(r"method: .*blurred_rigl.*\n(.*\n)*schedule: .*stairs", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("method=blurr", "method=blurred_rigl"),
        ("method.blurred.b", "method.blurred.blur="),
        ("schedule=st", "schedule=stairs"),
    ],
)
def test_completion_knows_it_from_the_line_that_is_typed(typed, said, examples, capfd, monkeypatch):
    monkeypatch.setenv("COMP_LINE", f"sparse-lab --plugin {examples / 'own_method' / 'plugin.py'} {typed}")
    assert main(["-sc", "query=bash"]) == 0
    assert capfd.readouterr().out.split() == [said]


def test_nothing_is_completed_where_the_plugin_itself_is_typed(examples, capfd, monkeypatch):
    for line in ("sparse-lab --plugin", "sparse-lab --plugin exam", "sparse-lab --plugin=exam"):
        monkeypatch.setenv("COMP_LINE", line)
        assert main(["-sc", "query=bash"]) == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=rigl", "method.blurred={}"], "method.blurred does not go with method.drop_and_grow"),
        (["method=oneshot", "method.blurred={}", "method.name=x"], "method.blurred"),
        (["method=blurred_rigl", "method.blurred.blur=-1"], "method.blurred.blur=-1 is outside [0, 100]"),
        (["method=blurred_rigl", "method.blurred.blurr=1"], "method.blurred has no 'blurr'; did you mean 'blur'?"),
        (["method=blurred_rigl", "method.blurred.blur=x"], "could not be converted to Float"),
        (["method=blurred_rigl", "schedule=stairs"], "method.blurred works with schedule=constant, not stairs"),
        (["method=gmp", "schedule=stairs", "schedule.stairs.stairs=0"], "schedule.stairs.stairs=0 is outside"),
    ],
)
def test_what_does_not_go_is_one_line(words, said, start, capsys):
    assert start(*words, example="own_method") == 2
    assert said in capsys.readouterr().err


@pytest.mark.full
def test_its_part_joins_another_method(start, results):
    words = ("method=static", "method.blurred={update_every: 1}", "method.name=mine", "sparsity=s90")
    assert start(*words, example="own_method") == 0
    [result] = results().values()
    assert result["method"] == "mine" and result["config"]["method"]["blurred"]["update_every"] == 1


@pytest.mark.full
def test_a_sweep_over_its_setting_and_its_schedule(start, results, capsys):
    assert start("-m", *RULE, "method.blurred.blur=1,2", "training.epochs=1", example="own_method") == 0
    words = ("method=gmp", "schedule=cubic,stairs", "schedule.stairs.stairs=1,2", "sparsity=s90", "training.epochs=1")
    assert start("-m", *words, example="own_method") == 0
    assert "4 jobs ask for 3 runs" in capsys.readouterr().out and len(results()) == 5


@pytest.mark.full
def test_a_stopped_run_goes_on_to_the_same_bits(start, results, tmp_path, plug, capsys):
    words = (*RULE, "training.epochs=3", "training.select=last")
    assert start(*words, example="own_method") == 0
    [name] = results()
    folder = tmp_path / "runs" / name
    whole = load_network(folder / "checkpoints" / "best.ckpt")
    folder.rename(tmp_path / "whole")
    plug(2)
    assert start(*words, example="own_method") == 1
    plug(0)
    capsys.readouterr()
    assert start(*words, example="own_method") == 0
    assert "goes on from last.ckpt" in capsys.readouterr().out and list(results()) == [name]
    again = load_network(folder / "checkpoints" / "best.ckpt")
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_edited_between_stop_and_start_it_is_another_run(examples, small, tmp_path, plug, capsys):
    source = (examples / "own_method" / "plugin.py").read_text().replace("sparse_lab.register_choices", "# ")
    path = tmp_path / "mine.py"
    path.write_text(source)
    request = ["--plugin", str(path), *small, f"paths.outputs={tmp_path}", "method=static", "sparsity=s90"]
    request += ["method.blurred={update_every: 1}", "method.name=mine"]
    plug(1)
    assert main(request) == 1
    plug(0)
    plugins.forget()
    path.write_text(source.replace("** self.blur", "** (2 * self.blur)"))
    capsys.readouterr()
    assert main(request) == 0
    said = capsys.readouterr()
    assert len(list((tmp_path / "runs").iterdir())) == 2 and "goes on" not in said.out and not said.err


def test_a_table_and_the_doctor_take_it(examples, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    table = (
        "title: own\nseeds: [1]\nalways: [dataset=digits, training=digits, trainer=cpu]\ncells: [method=blurred_rigl]\n"
    )
    (tmp_path / "own.yaml").write_text(table)
    plugin = f"--plugin={examples / 'own_method' / 'plugin.py'}"
    assert main(["reproduce", plugin, "own.yaml", "--list"]) == 0
    assert "missing  vgg16-digits-blurred_rigl-99-seed1-" in capsys.readouterr().out
    plugins.forget()
    assert main(["reproduce", "own.yaml", "--list"]) == 2
    assert "unknown method 'blurred_rigl'" in capsys.readouterr().err
    assert main(["doctor", plugin, "method=blurred_rigl", "dataset=digits", "trainer=cpu"]) == 0
    loaded = next(line for line in capsys.readouterr().out.splitlines() if "plugin plugin" in line)
    assert plugins.hashes()["plugin"][:10] in loaded and "algorithm blurred" in loaded and "schedule stairs" in loaded


@pytest.mark.full
def test_the_processes_of_ddp_load_it(examples, small, tmp_path):
    """Lightning starts the command again for each; the path is meant from where the command was started."""
    devices = ("trainer.devices=2", "trainer.accelerator=cpu")
    words = [*(word for word in small if word != "trainer=cpu"), *RULE, *devices, f"paths.outputs={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "sparse_lab", "--plugin", "own_method/plugin.py", *words],
        capture_output=True, text=True, cwd=examples, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "MEMBER: 2/2" in done.stderr + done.stdout and "of 57,884 weights" in done.stdout


@pytest.mark.nightly
@pytest.mark.parametrize("launcher", ["ray", "submitit_local"])
def test_other_launchers_bring_it_along(launcher, examples, small, tmp_path):
    pytest.importorskip({"submitit_local": "submitit"}.get(launcher, launcher))
    words = [*small, *RULE, "training.epochs=1", f"paths.outputs={tmp_path}", f"hydra/launcher={launcher}"]
    done = subprocess.run(
        [sys.executable, "-m", "sparse_lab", "-m", *words, "--plugin", "own_method/plugin.py"],
        capture_output=True, text=True, cwd=examples, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and "1 run: 1 done" in done.stdout, done.stdout + done.stderr
