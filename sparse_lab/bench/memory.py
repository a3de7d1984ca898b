"""Peak memory of training steps, each kind in a process of its own, so that nothing else counts.

The process is this file: `python -m sparse_lab.bench.memory MODEL WIDTH BATCH [MASKS [STORAGE]]`, MASKS a file of bool
tensors by layer name, without which the steps are dense; it prints two numbers (MiB).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from sparse_lab.bench.patterns import Pattern

STEPS = 2  # the second has momentum


def peak(
    model: str, width: float, images: int, pattern: Pattern | None, storage: str = "float32"
) -> tuple[float, float] | None:
    """MiB resident at most before the first step (libraries, network) and over all; None where the process failed.

    pattern: the masks of sparse steps, which store maps as `storage` says; None for dense ones.
    """
    import torch

    command = [sys.executable, "-m", "sparse_lab.bench.memory", model, f"{width}", f"{images}"]
    with tempfile.TemporaryDirectory() as folder:
        if pattern is not None:
            path = Path(folder) / "masks.pt"
            torch.save(dict(pattern), path)
            command += [str(path), storage]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    start, most = done.stdout.split()
    return float(start), float(most)


def main(argv: list[str]) -> int:
    """Train a few steps and print what they took."""
    import torch

    from sparse_lab.bench.patterns import build
    from sparse_lab.bench.training import DenseStep, SparseStep
    from sparse_lab.records.system import peak_memory

    model, images = build(argv[0], float(argv[1])), int(argv[2])
    step: DenseStep | SparseStep
    if len(argv) > 3:
        step = SparseStep(model, images, *argv[4:])
        step.masks.set(torch.load(argv[3], weights_only=True))
    else:
        step = DenseStep(model, images)
    start = peak_memory()
    for _ in range(STEPS):
        step()
    print(start, peak_memory())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
