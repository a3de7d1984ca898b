"""What a run ran on: packages, device, memory, commit."""

from __future__ import annotations

import atexit
import gc
import os
import resource
import subprocess
from functools import cache
from pathlib import Path

import torch

from sparse_lab.host.machine import processor

PACKAGES = (
    "sparse_lab",
    "torch",
    "torchvision",
    "pytorch-lightning",
    "hydra-core",
    "omegaconf",
    "numpy",
    "numba",
    "scikit-learn",
)


@cache
def _freeze_imports() -> None:
    """What was imported before the first run stays, and is not looked through again after every run."""
    gc.freeze()
    atexit.register(gc.unfreeze)


def reset_peak_memory() -> None:
    """Start the peak anew, so that a run in a sweep does not report the one before it (Linux)."""
    _freeze_imports()
    gc.collect()  # trainers and callbacks hold each other: the run before would stay in memory for a while
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # the kernel or the sandbox forbids it: the peak is then that of the whole process


def peak_memory() -> float:
    """Peak memory of this process in MiB: resident, or on the GPU when there is one."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def device_name(device: torch.device) -> str:
    """What the run computed on, as a person would name it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu: {processor()}, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """The commit of the checkout that this package runs from, '+' behind it when files differ; None in a wheel.

    SPARSE_LAB_COMMIT says it for a copy without its .git: in a container, on a machine that is lent for an hour.
    """
    if said := os.environ.get("SPARSE_LAB_COMMIT"):
        return said
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        head = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "-C", here, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")
