"""The real command with API keys in its environment: no byte that it writes or says holds one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

KEYS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "MLFLOW_TRACKING_PASSWORD": "pa$$ word 'with\" all & <of> it",
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz0123",
    "OPENAI_API_KEY": "sk-9876543210abcdef",
}


pytestmark = pytest.mark.full


@pytest.fixture
def command(tmp_path, small):
    """command(words...) -> (exit status, what it said); afterwards no file below tmp_path may hold a secret."""

    def give(*words: str) -> tuple[int, str]:
        environment = {**os.environ, **KEYS, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-m", "sparse_lab", *words]
        done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
        said = done.stdout + done.stderr
        spoken = [path for path in tmp_path.rglob("*") if path.is_file()]
        for name, secret in KEYS.items():
            shapes = {secret, json.dumps(secret)[1:-1]}
            assert not any(shape in said for shape in shapes), f"{name} is said: {said}"
            for path in spoken:
                content = path.read_bytes()
                assert not any(shape.encode() in content for shape in shapes), f"{name} is in {path}"
        return done.returncode, said

    return give


def test_a_sweep_with_a_run_that_fails_and_its_report(command, small, tmp_path):
    words = ["-m", *small, "method=dense,oneshot", "sparsity=s90", "training.lr=0.05,1e30", "logger=wandb"]
    status, said = command(*words, "paths.outputs=out")
    assert status == 1 and "failed" in said
    found = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"result.json", "status.json", "error.txt", "config.yaml", "multirun.yaml", "plan.json"} <= found
    assert command("report", "out")[0] == 0
    assert command("status", "out")[0] in (0, 1)


def test_a_server_that_is_down_and_has_a_password_in_its_address(command, small, monkeypatch):
    """What is said of it holds its address, and the run goes on."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2hunter2@127.0.0.1:9")
    monkeypatch.setitem(KEYS, "the password in MLFLOW_TRACKING_URI", "hunter2hunter2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    status, said = command(*small, "method=dense", "logger=mlflow", "paths.outputs=out")
    assert status == 0 and "mlflow" in said


def test_requests_that_would_write_one_down(command, small, tmp_path):
    for words in (
        ["logger.project=${oc.env:WANDB_API_KEY}"],
        [f"logger.project={KEYS['OPENAI_API_KEY']}"],
        ["-m", "seed=1,2", "logger.project=${oc.env:HF_TOKEN}"],
        ["--cfg", "job", "--resolve", "logger.project=${oc.env:WANDB_API_KEY}"],
        ["hydra.job.env_copy=[WANDB_API_KEY]"],
    ):
        status, said = command(*words, *small, "paths.outputs=out")
        assert status == 2 and len(said.strip().splitlines()) == 1 and "environment" in said, said
    assert not (tmp_path / "out").exists()


def test_the_doctor_tells_none(command, small):
    assert command("doctor", *small, "logger=wandb", "paths.outputs=out")[0] == 0
