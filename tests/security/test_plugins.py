"""Code from outside is named on the process's own command line, or was installed; nothing else loads any."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_lab.cli.main import main
from sparse_lab.experiment import plugins


@pytest.fixture
def mine(plugin, tmp_path, monkeypatch):
    """A plugin that leaves a file `loaded` where it is loaded, in the folder that commands are started in."""
    monkeypatch.chdir(tmp_path)
    return plugin(
        f"""
        from pathlib import Path
        Path({str(tmp_path / "loaded")!r}).touch()
        sparse_lab.register_choices(Path(__file__).with_name("conf"))
        """
    )


def choice(mine: Path, text: str) -> None:
    path = mine.parent / "conf" / "method" / "own.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


EXPERIMENTS = {
    "a key": "# @package _global_\nplugin: {0}\n",
    "a list": "# @package _global_\nplugins: [{0}]\n",
    "the flag": "# @package _global_\n--plugin: {0}\n",
    "Hydra's": "# @package _global_\nhydra:\n  plugin: {0}\n",
    "its overrides": "# @package _global_\nhydra:\n  overrides:\n    task: ['--plugin={0}']\n",
    "its search": "# @package _global_\nhydra:\n  searchpath: ['pkg://mine']\n",
    "a sweep": "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      --plugin: {0}\n",
    "a defaults list": "# @package _global_\ndefaults:\n  - override /plugin: {0}\n",
    "a command line": "# @package _global_\nmethod:\n  summary: --plugin={0}\n",
}


@pytest.mark.parametrize("by", EXPERIMENTS)
def test_no_config_file_names_one(by, mine, tmp_path, capsys):
    choice(mine, "name: own\n")
    folder = tmp_path / "conf"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "x.yaml").write_text(EXPERIMENTS[by].format(mine))
    status = main(["--config-dir", str(folder), "experiment=x", "--cfg", "job"])
    assert status == (0 if by == "a command line" else 2)
    assert not (tmp_path / "loaded").exists() and not plugins.LOADED


@pytest.mark.parametrize("key", ["plugin", "+plugin", "hydra.plugin", "++hydra.plugins", "hydra/plugin"])
def test_nor_does_an_override(key, mine, tmp_path, capsys):
    choice(mine, "name: own\n")
    assert main([f"{key}={mine}", "--cfg", "job"]) == 2 or key.startswith(("++", "hydra."))
    assert not (tmp_path / "loaded").exists() and not plugins.LOADED


def test_nor_does_a_table(mine, tmp_path, capsys):
    (tmp_path / "t.yaml").write_text(f"title: t\nseeds: [1]\ncells: ['--plugin={mine} method=dense']\n")
    assert main(["reproduce", "t.yaml", "--list"]) == 2
    assert "is no override like" in capsys.readouterr().err and not (tmp_path / "loaded").exists()


def test_nor_does_the_environment(mine, tmp_path, monkeypatch, capsys):
    for name in ("PLUGIN", "PLUGINS", "SPARSE_LAB_PLUGIN", "SPARSE_LAB_PLUGINS", "SPARSE_LAB_ARGS", "HYDRA_PLUGIN"):
        monkeypatch.setenv(name, f"--plugin={mine}")
    monkeypatch.setenv("COMP_LINE", f"sparse-lab --plugin={mine} ")  # heeded where a shell asks to complete it
    assert main(["keys", "seed"]) == 0
    assert not (tmp_path / "loaded").exists() and not plugins.LOADED


@pytest.mark.parametrize(
    "text",
    [
        "# @package _global_\nhydra:\n  launcher:\n    _target_: os.system\n",
        "# @package _global_\nhydra:\n  sweep:\n    dir: /tmp/elsewhere\n",
        "name: ${{oc.env:WANDB_API_KEY}}\n",
        "defaults: [../../secret]\n",
    ],
)
def test_its_choices_are_checked_as_anybody_s(text, mine, capsys):
    choice(mine, text.replace("{{", "{").replace("}}", "}"))
    assert main(["--plugin", str(mine), "method=own", "--cfg", "job"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("sparse-lab: ") and said.count("\n") == 1
