"""Photos of three classes that can be told apart, and a run that has learned them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparse_lab.cli.main import main

CLASSES = ("ape", "bee", "cat")


def write_photos(root: Path, classes: Sequence[str], count: int, parts: Sequence[str] = ("",), seed: int = 0) -> Path:
    """Noise with one of the three colours on top, by the class's first letter."""
    rng = np.random.default_rng(seed)
    for part in parts:
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                pixels[..., ord(name[0]) % 3] += rng.integers(0, 90, dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def photos() -> Callable[..., Path]:
    return write_photos


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds photos/, and runs/ on them: one that is pruned, and the dense one that it starts from."""
    folder = tmp_path_factory.mktemp("outputs")
    write_photos(folder / "photos", CLASSES, 30)
    words = ["method=oneshot", "sparsity=s90", "dataset=folder", f"paths.data={folder / 'photos'}", "training=digits"]
    words += ["model.width=0.0625", "training.batch_size=8", "training.epochs=8", "training.finetune.epochs=4"]
    words += ["trainer=cpu", "trainer.progress=false", f"paths.outputs={folder}"]
    assert main(words) == 0
    return folder


@pytest.fixture(scope="module")
def run(outputs: Path) -> Path:
    return next((outputs / "runs").glob("*oneshot*"))
