"""One run in two processes: the same name, the same exact count; never under -m."""

from __future__ import annotations

import json
import subprocess
import sys

from sparse_lab.cli import main
from sparse_lab.record import run_name

DDP = ("trainer=ddp", "trainer.accelerator=cpu", "method=oneshot_regrow", "sparsity.target=0.9")


def test_a_run_in_two_processes_ends_like_any_other(compose, small, tmp_path):
    command = [sys.executable, "-m", "sparse_lab", *small, *DDP, "trainer.devices=2", f"paths.outputs={tmp_path}"]
    done = subprocess.run(
        [part for part in command if part != "trainer=cpu"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    name = run_name(compose("method=oneshot_regrow", "sparsity.target=0.9"))
    result = json.loads((tmp_path / "runs" / name / "result.json").read_text())
    assert result["kept"] == round(0.1 * result["total"])
    assert "MEMBER: 2/2" in done.stderr + done.stdout
    assert len(list(tmp_path.rglob("result.json"))) == 3


def test_a_sweep_in_several_processes_is_refused(tmp_path, capsys):
    request = ["-m", "dataset=digits", "trainer=ddp", "seed=1,2", f"paths.outputs={tmp_path}"]
    assert main(request) == 2
    assert "one by one" in capsys.readouterr().err
