"""A wheel carries conf/ and works from any folder, and what examples/ show works with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import sparse_lab

ROOT = Path(sparse_lab.__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel installs, alone in a folder."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")]
    subprocess.run(build, check=True, cwd=ROOT, capture_output=True, timeout=120)
    wheel = next((folder / "dist").glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def command(site: Path, tmp_path: Path) -> Callable[..., str]:
    """command("methods", ...) -> what the wheel's command says in a folder of its own."""

    def start(*argv: str) -> str:
        # -P and PYTHONPATH first: the wheel's package, not the checkout's
        done = subprocess.run(
            [sys.executable, "-P", "-m", "sparse_lab", *argv],
            capture_output=True, text=True, cwd=tmp_path, timeout=200,
            env={**os.environ, "PYTHONPATH": str(site)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return start


def test_a_wheel_carries_conf_and_runs_from_another_folder(site, command):
    names = [path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()]
    assert (
        "sparse_lab/conf/config.yaml" in names
        and "sparse_lab/conf/experiment/paper/bidirectional_oneshot.yaml" in names
    )
    assert "sparse_lab/report/load/published.yaml" in names
    assert "sparse_lab/conf/table/bidirectional.yaml" in names and "hydra_plugins/sparse_lab_launchers.py" in names
    assert "hydra_plugins/sparse_lab_choices.py" in names
    assert not any(name.startswith(("tests/", "conf/", "results/", "examples/")) for name in names)
    assert str(site / "sparse_lab" / "conf") in command("--info", "searchpath")
    assert command("reproduce", "east_cpu", "--list", "--seeds", "1").count("missing  resnet34-cifar10-") == 6


@pytest.mark.full
def test_the_library_s_program_works_with_it(site, tmp_path):
    name = "plain_loop"
    shutil.copy(ROOT / "examples" / f"{name}.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "-P", f"{name}.py"], capture_output=True, text=True, cwd=tmp_path, timeout=300,
        env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert done.returncode == 0 and "sparsity 95%" in done.stdout, done.stderr


@pytest.mark.nightly
def test_a_method_and_a_network_of_one_s_own_work_with_it(command, small, tmp_path):
    """The folders copied, as a user would."""
    for name in ("own_method", "own_network"):
        shutil.copytree(ROOT / "examples" / name, tmp_path / name)
    own = ("--plugin", "own_method/plugin.py", "--plugin=own_network/plugin.py")
    words = ("model=small_cnn", "dataset=stripes", "model.width=1", "sparsity=s90", "method=blurred_rigl")
    sweep = ("-m", "method.blurred.blur=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    said = command(*own, *small, *words, *sweep)
    assert "2 runs: 2 done" in said and "UserWarning" not in said
    assert "blurred_rigl" in command("report", *own, "outputs")
    runs = sorted(path.name for path in (tmp_path / "outputs" / "runs").iterdir())
    assert len(runs) == 2
    command(*own, "export", f"outputs/runs/{runs[0]}", "--to", "packed")
    assert "done already" in command(*own, *small, *words, "method.blurred.blur=1")
