"""A wheel carries conf/ and works from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import sparse_lab

ROOT = Path(sparse_lab.__file__).resolve().parent.parent


def test_a_wheel_carries_conf_and_runs_from_another_folder(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(build, check=True, cwd=ROOT, capture_output=True, timeout=120)
    wheel = next((tmp_path / "dist").glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert (
        "sparse_lab/conf/config.yaml" in names
        and "sparse_lab/conf/experiment/paper/bidirectional_oneshot.yaml" in names
    )
    assert "sparse_lab/report/load/published.yaml" in names
    assert "sparse_lab/conf/table/bidirectional.yaml" in names and "hydra_plugins/sparse_lab_launchers.py" in names
    assert not any(name.startswith(("tests/", "conf/", "results/")) for name in names)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # -P and PYTHONPATH first: the wheel's package, not the checkout's
    said = {}
    for argv in (["--info", "searchpath"], ["reproduce", "east_cpu", "--list", "--seeds", "1"]):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "sparse_lab", *argv],
            capture_output=True, text=True, cwd=elsewhere, timeout=60,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said[argv[0]] = done.stdout
    assert str(tmp_path / "site" / "sparse_lab" / "conf") in said["--info"]
    assert said["reproduce"].count("missing  resnet34-cifar10-") == 6
