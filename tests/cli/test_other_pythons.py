"""The promise of Python 3.11.0 to 3.14: other interpreters on this machine, with the packages that are installed here.

A Python of the same minor version takes all of them, torch too. Others take what is written in Python alone: composing,
checking and refusing a request, planning a sweep, the records, archives; that is all that may not import torch.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser

from sparse_lab.sweep.plan import let_hydra_build_its_parser

TOP = Path(__file__).resolve().parents[2]
VERSIONS = ("3.11", "3.12", "3.13", "3.14")
ASK = "import sys; print('%d.%d.%d' % sys.version_info[:3], sys.executable)"

# Sources that a later Python warns of are refused; nothing is written beside them.
COMPILE = """
import pathlib, sys, warnings
warnings.simplefilter("error")
for folder in ("sparse_lab", "scripts"):
    for path in sorted(pathlib.Path(folder).rglob("*.py")):
        compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
"""

# The modules that do without torch, and a request from its words to the names of its runs.
REQUEST = """
import sys, warnings
warnings.filterwarnings("error", module=r"sparse_lab(\\.|$)")
import sparse_lab.cli.main, sparse_lab.cli.doctor.main, sparse_lab.cli.methods, sparse_lab.cli.config_keys
import sparse_lab.experiment.identity, sparse_lab.sweep.launch
import sparse_lab.experiment.timeline, sparse_lab.records.atomic_io, sparse_lab.data.files
from sparse_lab.experiment.identity import run_name
from sparse_lab.sweep.plan import Request
request = Request.read(["-m", "method=east,iterative_regrow", "sparsity=s99", "dataset=digits", "trainer=cpu"])
for corner in request.corners():
    swept = [f"{key}={value}" for key, value in corner.items()]
    print(run_name(request.compose(swept).config()))
assert "torch" not in sys.modules
"""

ARCHIVES = """
import io, pathlib, sys, tarfile
from sparse_lab.data import files
folder = pathlib.Path(sys.argv[1])
def packed(name, kind=tarfile.REGTYPE, mode=0o644, link=""):
    member = tarfile.TarInfo(name)
    member.type, member.mode, member.linkname, member.size = kind, mode, link, 4 if kind == tarfile.REGTYPE else 0
    with tarfile.open(folder / "one.tar.gz", "w:gz") as tar:
        tar.addfile(member, io.BytesIO(b"evil"))
    return folder / "one.tar.gz"
files.unpack(packed("here/file", mode=0o4777), folder / "target")
assert (folder / "target/here/file").read_bytes() == b"evil"
assert (folder / "target/here/file").stat().st_mode & 0o7111 == 0
for name, kind in (
    ("../escaped", tarfile.REGTYPE), (f"{folder}/escaped", tarfile.REGTYPE), ("link", tarfile.SYMTYPE),
    ("link", tarfile.LNKTYPE), ("pipe", tarfile.FIFOTYPE), ("device", tarfile.CHRTYPE),
):
    try:
        files.unpack(packed(name, kind, link="here/file"), folder / "target")
    except tarfile.TarError:
        continue
    raise SystemExit(f"{name} was unpacked")
assert {path.name for path in folder.rglob("*")} == {"one.tar.gz", "target", "here", "file"}
print(hasattr(tarfile, "data_filter"))
"""


@cache
def interpreters() -> dict[str, tuple[str, str]]:
    """Minor version -> (full version, path) of Pythons other than this one; of several, the oldest."""
    folders = [*os.get_exec_path(), *map(str, Path.home().glob(".pyenv/versions/*/bin"))]
    found: dict[str, tuple[str, str]] = {}
    for version in VERSIONS:
        paths = {shutil.which(f"python{version}", path=folder) for folder in folders} - {None}
        answers = [subprocess.run([path, "-c", ASK], capture_output=True, text=True) for path in sorted(paths)]
        told = {tuple(one.stdout.split()) for one in answers if one.returncode == 0}
        others = [(full, path) for full, path in told if full != ".".join(map(str, sys.version_info[:3]))]
        if others:
            found[version] = min(others, key=lambda one: [int(part) for part in one[0].split(".")])
    return found


@pytest.fixture(params=VERSIONS)
def other(request):
    """other(*arguments) runs another Python, with the packages of this one."""
    return started(request.param)


def started(version):
    if version not in interpreters():
        pytest.skip(f"no other Python {version} on this machine")
    path = interpreters()[version][1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TOP), sysconfig.get_path("purelib")))}

    def run(*arguments: str, at: Path = TOP) -> str:
        ended = subprocess.run([path, "-B", *arguments], cwd=at, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-2000:]
        return ended.stdout

    return run


def test_every_source_is_understood(other):
    other("-c", COMPILE)


@pytest.mark.full
def test_a_request_becomes_the_same_runs(other):
    here = subprocess.run([sys.executable, "-c", REQUEST], cwd=TOP, capture_output=True, text=True, check=True).stdout
    assert other("-c", REQUEST) == here and len(here.split()) == 2


@pytest.mark.full
def test_the_command_answers(other):
    assert "--config-dir" in other("-m", "sparse_lab", "--help")
    assert "name: rigl" in other("-m", "sparse_lab", "method=rigl", "--cfg", "job")


def test_archives_are_unpacked_and_hostile_ones_refused(other, tmp_path):
    other("-c", ARCHIVES, str(tmp_path))


@pytest.mark.full
def test_another_patch_release_trains_prunes_and_exports(tmp_path):
    """All of the package, torch and kernels too; Debian's 3.11.2 is one such Python."""
    run = started(f"{sys.version_info[0]}.{sys.version_info[1]}")
    short = ["model.width=0.0625", "dataset.train_limit=128", "training.epochs=1", "training.finetune.epochs=1"]
    words = ["method=oneshot", "sparsity=s90", "dataset=digits", "training=digits", "compute=sparse", *short]
    run("-m", "sparse_lab", *words, f"paths.outputs={tmp_path}")
    folder = next(path for path in (tmp_path / "runs").iterdir() if "oneshot" in path.name)
    run("-m", "sparse_lab", "export", str(folder))
    run("-m", "sparse_lab", "report", str(tmp_path))
    assert (tmp_path / "report.html").is_file() and (folder / "network.sparse").is_file()


@pytest.fixture
def argparse_of_3_14(monkeypatch):
    """What Python 3.14 does when an argument is added, where this one does not do it yet."""
    add = argparse.ArgumentParser.add_argument

    def check_help(self, action):
        try:
            if action.help and "%" in action.help:
                self._get_formatter()._expand_help(action)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError("badly formed help string") from error

    def add_argument(self, *names, **settings):
        action = add(self, *names, **settings)
        self._check_help(action)
        return action

    monkeypatch.setattr(argparse.ArgumentParser, "_check_help", check_help, raising=False)
    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", add_argument)


def test_hydra_builds_its_parser_under_the_argparse_of_3_14(argparse_of_3_14):
    with pytest.raises(ValueError, match="badly formed help string"):
        get_args_parser()
    let_hydra_build_its_parser()
    assert get_args_parser().parse_args(["--cfg", "job", "seed=1"]).overrides == ["seed=1"]
    with pytest.raises(ValueError, match="badly formed help string"):
        argparse.ArgumentParser().add_argument("--share", help="100% of it")
