"""The two short programs run as they stand, in an empty folder, and say what they have kept."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["plain_loop", pytest.param("lightning", marks=pytest.mark.full)])
def test_the_program_runs_and_ends_at_its_target(name, tmp_path):
    said = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert said.returncode == 0, said.stderr
    assert re.search(r"^all +4,224  84,480 +5% ", said.stdout, re.MULTILINE)
    assert "Warning" not in said.stderr.replace("GPU available", "") or name == "lightning"
    if name == "plain_loop":
        accuracy = float(re.search(r"^test ([\d.]+)%$", said.stdout, re.MULTILINE)[1])
        assert accuracy > 90
        plain = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        plain.load_state_dict(torch.load(tmp_path / "digits.pt", weights_only=True), strict=True)
        assert sum(int((layer.weight != 0).sum()) for layer in plain[::2]) <= 4224


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: path.relative_to(EXAMPLES).as_posix())
def test_no_private_name_is_used(path):
    words = re.findall(r"(?:\.|import )(_[a-z]\w*)", path.read_text())
    assert not words
