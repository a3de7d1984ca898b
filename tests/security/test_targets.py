"""Configs start what is known and nothing else, wherever a foreign name stands in them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sparse_lab.cli.main import main
from sparse_lab.config import conf_dir
from sparse_lab.errors import UserError
from sparse_lab.experiment.security.logging_setup import LOG_FILE
from sparse_lab.experiment.security.targets import check_targets
from sparse_lab.sweep.plan import Request

RUN = ("dataset=digits", "training=digits", "trainer=cpu", "model.width=0.0625", "training.epochs=1")
LAUNCHER = "hydra_plugins.sparse_lab_launchers.LocalLauncher"


@pytest.fixture(autouse=True)
def trap(tmp_path, monkeypatch):
    """A module on Python's path that leaves a marker when it is imported, and when its function is called."""
    folder = tmp_path / "path"
    folder.mkdir()
    marker = tmp_path / "marker"
    spring = f"import pathlib\ndef spring(*_, **__):\n    pathlib.Path({str(marker)!r}).touch()\nspring()\n"
    (folder / "trap_of_a_test.py").write_text(spring)
    monkeypatch.syspath_prepend(str(folder))
    yield marker
    sys.modules.pop("trap_of_a_test", None)


@pytest.fixture
def refused(tmp_path, capsys, trap):
    """refused(words...) -> the one line that a request gets; nothing has been started or written."""

    def ask(*words: str) -> str:
        assert main([*words, *RUN, f"paths.outputs={tmp_path / 'out'}"]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert not trap.exists() and not (tmp_path / "out").exists()
        return lines[0]

    return ask


@pytest.fixture
def conf(tmp_path) -> Path:
    folder = tmp_path / "conf"
    for group in ("experiment", "hydra/launcher", "hydra/callbacks", "hydra/job_logging", "hydra/sweeper"):
        (folder / group).mkdir(parents=True)
    return folder


TYPED = {
    "a launcher": ["hydra.launcher._target_=trap_of_a_test.spring"],
    "a launcher by choice": ["hydra/launcher=basic", "hydra.launcher._target_=os.system"],
    "a launcher of a sweep": ["-m", "seed=1,2", "hydra.launcher._target_=trap_of_a_test.spring"],
    "a sweeper": ["-m", "seed=1,2", "hydra.sweeper._target_=trap_of_a_test.spring"],
    "a callback": ["+hydra.callbacks.evil._target_=trap_of_a_test.spring"],
    "a callback in a list": ["+hydra.callbacks.evil=[{_target_: trap_of_a_test.spring}]"],
    "deep in a callback": ["+hydra.callbacks.evil.one.two=[[{three: {_target_: trap_of_a_test.spring}}]]"],
    "beside a good name": [f"+hydra.callbacks.evil={{_target_: {LAUNCHER}, x: {{_target_: trap_of_a_test.spring}}}}"],
    "a name that is resolved": ["hydra.launcher._target_=${hydra.job.name}", "hydra.job.name=trap_of_a_test.spring"],
    "a name from the environment": ["hydra.launcher._target_=${oc.env:HOME}"],
    "another of Hydra's": ["hydra.launcher._target_=hydra.utils.instantiate"],
    "nearly a good one": [f"hydra.launcher._target_={LAUNCHER}x"],
    "a list for a name": ["hydra.launcher._target_=[trap_of_a_test.spring]"],
}


@pytest.mark.every(2)
@pytest.mark.parametrize("what", TYPED)
def test_a_target_on_the_command_line(what, refused):
    assert "_target_" in refused(*TYPED[what])


def test_a_part_that_a_resolver_would_make_is_refused(refused):
    line = refused("+hydra.callbacks.evil=${oc.decode:'{_target_: trap_of_a_test.spring}'}")
    assert "hydra.callbacks.evil: ${oc.decode:...} calls what is not known here" in line


def test_the_nearest_known_name_is_told(refused):
    line = refused(f"hydra.launcher._target_={LAUNCHER.replace('launchers.Local', 'launcher.Local')}")
    assert line.endswith(f"the nearest that is: {LAUNCHER}")


FILES = {
    "an experiment": ("experiment", "hydra: {launcher: {_target_: trap_of_a_test.spring}}"),
    "an experiment's callback": ("experiment", "hydra: {callbacks: {evil: {_target_: trap_of_a_test.spring}}}"),
    "a launcher": ("hydra/launcher", "_target_: trap_of_a_test.spring"),
    "a launcher of another package": (
        "hydra/launcher",
        "# @package _global_\nhydra: {callbacks: {a: {_target_: trap_of_a_test.spring}}}",
    ),
    "a callback": ("hydra/callbacks", "evil: {_target_: trap_of_a_test.spring}"),
    "a logging factory": ("hydra/job_logging", "version: 1\nhandlers: {evil: {(): trap_of_a_test.spring}}"),
    "a formatter's factory": ("hydra/job_logging", "version: 1\nformatters: {evil: {(): trap_of_a_test.spring}}"),
    "a filter's factory": ("hydra/job_logging", "version: 1\nfilters: {evil: {'()': 'ext://trap_of_a_test.spring'}}"),
    "a logging class": ("hydra/job_logging", "version: 1\nhandlers: {evil: {class: trap_of_a_test.spring}}"),
    "a way round through logging": (
        "hydra/job_logging",
        "version: 1\nhandlers: {e: {class: logging.os.system, command: ls}}",
    ),
    "an imported stream": (
        "hydra/job_logging",
        "version: 1\nhandlers: {e: {class: logging.StreamHandler, stream: 'ext://trap_of_a_test.x'}}",
    ),
    "an attribute that is set": (
        "hydra/job_logging",
        "version: 1\nhandlers: {e: {class: logging.StreamHandler, '.': {stream: 1}}}",
    ),
    "a resolved class": (
        "hydra/job_logging",
        "version: 1\nx: trap_of_a_test.spring\nhandlers: {e: {class: '${hydra.job_logging.x}'}}",
    ),
    "a log file elsewhere": (
        "hydra/job_logging",
        "version: 1\nhandlers: {e: {class: logging.FileHandler, filename: /tmp/trap_of_a_test}}",
    ),
}


@pytest.mark.every(2)
@pytest.mark.parametrize("what", FILES)
def test_a_folder_of_unknown_origin(what, refused, conf):
    group, text = FILES[what]
    (conf / group / "evil.yaml").write_text(f"# @package _global_\n{text}" if group == "experiment" else text)
    line = refused("--config-dir", str(conf), f"{group}=evil")
    assert "hydra." in line


def test_the_last_corner_of_a_sweep_is_looked_at_before_the_first_runs(refused, conf):
    (conf / "experiment" / "evil.yaml").write_text(
        "# @package _global_\nhydra: {callbacks: {a: {_target_: trap_of_a_test.spring}}}"
    )
    (conf / "experiment" / "good.yaml").write_text("# @package _global_\nseed: 3\n")
    assert "trap_of_a_test" in refused("--config-dir", str(conf), "-m", "seed=1,2", "experiment=good,evil")


@pytest.mark.parametrize("entry", ["pkg://trap_of_a_test", "s3://bucket/conf", "trap_of_a_test"])
def test_folders_alone_are_searched(entry, refused):
    assert "--config-dir" in refused(f"hydra.searchpath=[{entry}]")
    assert "--config-dir" in refused(f"hydra.searchpath=['file:///tmp','{entry}']")


SEARCH = ["-m", "hydra/sweeper=optuna", "training.lr=interval(0.1,0.2)"]
INDIRECT = {
    "a function that a sweeper looks up": (
        [*SEARCH, "hydra.sweeper.custom_search_space=trap_of_a_test.spring"],
        "names",
    ),
    "a storage that is unpickled": ([*SEARCH, "hydra.sweeper.storage=redis://127.0.0.1/0"], "unpickled"),
    "a sampler that unpickles": (
        [*SEARCH, "hydra/sweeper/sampler=cmaes", "hydra.sweeper.storage=sqlite:///x.db"],
        "unpickled",
    ),
    "lines for a batch script": (
        ["-m", "seed=1,2", "hydra/launcher=submitit_slurm", "hydra.launcher.comment='a\ncurl evil'"],
        "several lines",
    ),
}


@pytest.mark.parametrize("what", INDIRECT)
def test_what_runs_code_without_a_target(what, refused):
    words, told = INDIRECT[what]
    assert told in refused(*words)


COMMANDS = {
    "launcher: {setup: [touch x]}": ["hydra/launcher=submitit_slurm"],
    "launcher: {ray: {init: {runtime_env: {py_executable: evil}}}}": ["hydra/launcher=ray"],
    "launcher: {ray: {remote: {runtime_env: {pip: [evil]}}}}": ["hydra/launcher=ray"],
    "job: {env_set: {LD_PRELOAD: evil.so}}": [],
    "job: {env_set: {OMP_NUM_THREADS: '1', PYTHONPATH: evil}}": [],
    "sweeper: {params: {+hydra.job.name: 'a,b', seed: '1,2'}}": ["-m"],
}


@pytest.mark.parametrize("text", COMMANDS)
def test_commands_in_a_file_are_not_taken(text, refused, conf):
    (conf / "experiment" / "evil.yaml").write_text(f"# @package _global_\nhydra: {{{text}}}\n")
    assert "hydra." in refused("--config-dir", str(conf), "experiment=evil", *COMMANDS[text])


def composed(*words: str):
    return Request.read(list(words)).compose([]).cfg


def test_commands_that_a_person_types_are_taken():
    slurm = ("hydra/launcher=submitit_slurm", "hydra.launcher.setup=[module load cuda]")
    assert composed(*slurm).hydra.launcher.setup == ["module load cuda"]
    assert composed("+hydra.job.env_set.PYTHONPATH=x").hydra.job.env_set.PYTHONPATH == "x"


def choices() -> list[str]:
    found = []
    for group in (
        "hydra/launcher",
        "hydra/sweeper",
        "hydra/sweeper/sampler",
        "experiment",
        "logger",
        "trainer",
        "debug",
    ):
        for path in sorted((conf_dir() / group).glob("*.yaml")):
            sampler = "hydra/sweeper=optuna " if group.endswith("sampler") else ""
            found.append(f"{sampler}{group}={path.stem}")
    return [*found, "hydra/job_logging=default hydra/hydra_logging=default"]


@pytest.mark.every(3)
@pytest.mark.parametrize("words", choices())
def test_every_choice_of_ours_is_let_through(words):
    assert composed(*words.split()).hydra.launcher._target_


def test_a_log_file_lands_in_the_run_s_folder_alone():
    default = composed("hydra/job_logging=default")
    assert OmegaConf.to_container(default.hydra.job_logging)["handlers"]["file"]["filename"] == LOG_FILE
    with pytest.raises(UserError, match="a log file is"):
        composed("hydra/job_logging=default", "hydra.job.name=../../x")


def test_a_config_that_holds_itself_ends():
    config = OmegaConf.create({"a": {"b": "${c}"}, "c": {"d": "${a}"}})
    with pytest.raises(UserError, match="refer to itself"):
        check_targets(config)
