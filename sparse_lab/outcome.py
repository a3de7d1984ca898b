"""What a finished run says of itself: result.json."""

from __future__ import annotations

import atexit
import copy
import gc
import os
import platform
import resource
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_lab import stages
from sparse_lab.compute.device import device_of
from sparse_lab.config import Config
from sparse_lab.data import Data
from sparse_lab.deploy.thin import thin
from sparse_lab.parts import Parts
from sparse_lab.record import RunFolder, cell, digest, identity
from sparse_lab.sparsity.cost import LayerCost, layer_costs
from sparse_lab.sparsity.masks import COUNTING, count, layers

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
SELECTED_ON = {"validation_best": "validation", "last": "last epoch", "test_best": "test"}


def outcome(
    config: Config, parts: Parts, data: Data, folder: RunFolder, start: str | None, command: str
) -> dict[str, Any]:
    """The whole record, plain values only. Accuracies in percent, times in seconds, memory in MiB."""
    levels = parts.rounds.levels
    costs = layer_costs(parts.model, config.dataset.image_size)
    last = levels[-1]
    return {
        "name": folder.name,
        "hash": digest(identity(config)),
        "cell": cell(config),
        "model": config.model.name,
        "width": config.model.width,
        "dataset": config.dataset.name,
        "method": config.method.name,
        "seed": config.seed,
        "compute": config.compute,
        "precision": config.trainer.precision,
        "sparsity_target": stages.final_sparsity(config),
        "sparsity": last["sparsity"],
        "kept": last["kept"],
        "kept_with_reuse": parts.masks.kept_with_reuse() if parts.masks and config.method.sharing else None,
        "unique": sum(cost.total for cost in costs),
        "total": count(parts.model),
        "counting": COUNTING,
        "test_accuracy": last["test_accuracy"],
        "validation_accuracy": last["validation_accuracy"],
        "selected_on": SELECTED_ON[config.training.select],
        "start": start,
        "explored": parts.log.explored,
        "dead_layers": last["effective"]["dead_layers"],
        "levels": levels,
        "layers": [{"name": c.name, "kept": c.kept, "total": c.total, "macs": c.macs} for c in costs],
        "flops": flops(costs, levels, len(data.train) * config.training.batch_size, parts.log.mean_macs()),
        "seconds": sum(level["seconds"] for level in levels),
        "peak_memory_mb": peak_memory(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "data": {"md5": data.md5, "official": data.official},
        "device": device_name(device_of(config.trainer.accelerator)),
        "command": command,
        "commit": commit(),
        "config": identity(config),
    }


def removed(config: Config, parts: Parts, data: Data) -> tuple[nn.Module, dict[str, Any]]:
    """The network without the channels that are gone, and what it is: parameters (biases and BatchNorm too), FLOPs,
    the largest difference of its logits to the masked network's on a batch of training images, and the shares that
    went. Papers on filters count the filters alone (`removed_filters`); really gone are also the weights that read
    them (`removed`).
    """
    image_size = config.dataset.image_size
    small = thin(parts.model, image_size)
    # in float64: it is the surgery that is compared, not the rounding of logits that may be large
    masked, thinned = copy.deepcopy(parts.model).double().eval(), copy.deepcopy(small).double().eval()
    images = data.train.fixed(1)[0][0].to(next(thinned.parameters()))
    with torch.no_grad():
        difference = float((masked(images) - thinned(images)).abs().max())
    before, after = layer_costs(parts.model, image_size), layer_costs(small, image_size)
    rows = {new.name: layers(small)[new.name].weight.shape[0] for new in after}
    shares = {old.name: rows[old.name] / layers(parts.model)[old.name].weight.shape[0] for old in before}

    def gone(left: float, dense: int) -> float:
        return round(1.0 - left / dense, 6)

    weights, macs = sum(cost.total for cost in before), sum(cost.macs for cost in before)
    return small, {
        "parameters": sum(parameter.numel() for parameter in small.parameters()),
        "weights": sum(cost.total for cost in after),
        "flops": 2 * sum(cost.macs for cost in after),
        "filters": rows,
        "difference": difference,
        "removed": {
            "weights": gone(sum(cost.total for cost in after), weights),
            "flops": gone(sum(cost.macs for cost in after), macs),
        },
        "removed_filters": {
            "weights": gone(sum(shares[cost.name] * cost.total for cost in before), weights),
            "flops": gone(sum(shares[cost.name] * cost.macs for cost in before), macs),
        },
    }


def flops(
    costs: list[LayerCost], levels: list[dict[str, Any]], images_an_epoch: int, mean_macs: float
) -> dict[str, int]:
    """Two operations a multiply-add; a training image costs three forward passes (forward, input and weight gradient).

    Dense counts are what masked dense arithmetic really computes; sparse ones count kept weights: in inference the
    final network's, in training `mean_macs`, the mean over all steps. What DyReLU and compactors add while training is
    not counted.
    """
    dense, sparse = sum(c.macs for c in costs), sum(c.sparse_macs for c in costs)
    images = images_an_epoch * sum(level["epochs"] for level in levels)
    return {
        "inference_dense": 2 * dense,
        "inference_sparse": 2 * sparse,
        "training_dense": 6 * dense * images,
        "training_sparse": round(6 * mean_macs * images),
    }


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


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """What the run computed on, as a person would name it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"cpu: {name}, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """The commit of the checkout that this package runs from, '+' behind it when files differ; None in a wheel.

    SPARSE_LAB_COMMIT says it for a copy without its .git: in a container, on a machine that is lent for an hour.
    """
    if said := os.environ.get("SPARSE_LAB_COMMIT"):
        return said
    here = Path(__file__).resolve().parent.parent
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
