"""What a finished run says of itself: result.json."""

from __future__ import annotations

import copy
import math
import platform
from typing import Any

import torch
from torch import nn

from sparse_lab.config import Config
from sparse_lab.data import Data
from sparse_lab.experiment.build import Parts
from sparse_lab.experiment.identity import cell, request_hash, run_hash, settings, surroundings
from sparse_lab.experiment.selection import SELECTED_ON
from sparse_lab.host.machine import version
from sparse_lab.methods import phases
from sparse_lab.records.run_dir import RunDir
from sparse_lab.records.system import PACKAGES, commit, device_name, peak_memory
from sparse_lab.sparsity.flops import LayerCost, layer_costs
from sparse_lab.sparsity.masks import COUNTING, count, layers, uncounted
from sparse_lab.sparsity.structured.remove_channels import thin
from sparse_lab.training.device import device_of

NAMED = 8  # files that were left out


def make_result(
    config: Config, parts: Parts, data: Data, folder: RunDir, start: str | None, command: str
) -> dict[str, Any]:
    """The whole record, plain values only. Accuracies in percent, times in seconds, memory in MiB."""
    levels = parts.rounds.levels
    costs = layer_costs(parts.model, config.dataset.shape)
    return finite(
        {
            **_request(config, folder),
            **_network(config, parts, costs),
            "test_accuracy": levels[-1]["test_accuracy"],
            "validation_accuracy": levels[-1]["validation_accuracy"],
            "selected_on": SELECTED_ON[config.training.select],
            "start": start,
            "explored": parts.log.explored,
            "dead_layers": levels[-1]["effective"]["dead_layers"],
            "levels": levels,
            "classes": {
                "names": list(data.class_names) or None,
                "test_images": data.test.labels.bincount(minlength=data.num_classes).tolist(),
            },
            "layers": [{"name": c.name, "kept": c.kept, "total": c.total, "macs": c.macs} for c in costs if c.counted],
            "flops": flops(costs, parts.module.figures.trained, parts.log.trained_macs()),
            "seconds": sum(level["seconds"] for level in levels),
            "peak_memory_mb": peak_memory(),
            **_surroundings(config, data),
            "computed": parts.save.computed,
            "command": command,
            "config": settings(config),
        }
    )


def _request(config: Config, folder: RunDir) -> dict[str, Any]:
    """What was asked for, in short, and by which names it is known."""
    return {
        "name": folder.name,
        "hash": run_hash(config),
        "cell": cell(config),
        "request": request_hash(config),
        "model": config.model.title,
        "width": config.model.width,
        "dataset": config.dataset.name,
        "method": config.method.name,
        "seed": config.seed,
        "compute": config.compute,
        "precision": config.trainer.precision,
        "storage": config.storage if config.compute == "sparse" else None,
        "sparsity_target": phases.final_sparsity(config),
    }


def _network(config: Config, parts: Parts, costs: list[LayerCost]) -> dict[str, Any]:
    """How many weights there are, of which kinds, and how many are kept."""
    last, shared = parts.rounds.levels[-1], config.method.sharing is not None
    return {
        "sparsity": last["sparsity"],
        "kept": last["kept"],
        "nonzero": last["nonzero"],
        "kept_with_reuse": parts.masks.kept_with_reuse() if parts.masks and shared else None,
        "unique": sum(cost.total for cost in costs if cost.counted),
        "total": count(parts.model),
        "counting": COUNTING,
        "uncounted": uncounted(parts.model),
    }


def _surroundings(config: Config, data: Data) -> dict[str, Any]:
    """What else a result depends on: packages, data, plugins, the machine."""
    around = surroundings(config)
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "data": {
            "md5": data.md5,
            "official": data.official,
            "fingerprint": around.data,
            "skipped": len(data.skipped),
            "skipped_files": list(data.skipped[:NAMED]),
        },
        "plugins": around.plugins,
        "ranks": around.ranks,
        "normalise": {"scale": data.scale, "mean": data.mean, "std": data.std},
        "images": {part: {"used": used, "whole": whole} for part, (used, whole) in data.images.items()},
        "device": device_name(device_of(config.trainer.accelerator)),
        "commit": commit(),
    }


def finite(value: Any) -> Any:
    """A record's values; a figure that is no number, or infinite, is null: JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, (list, tuple)) else value


def remove_channels_of(config: Config, parts: Parts, data: Data) -> tuple[nn.Module, dict[str, Any]]:
    """The network without the channels that are gone, and what it is: parameters (biases and BatchNorm too), FLOPs,
    the largest difference of its logits to the masked network's on a batch of training images, and the shares that
    went. Papers on filters count the filters alone (`removed_filters`); really gone are also the weights that read
    them (`remove_channels_of`).
    """
    shape = config.dataset.shape
    small = thin(parts.model, shape)
    # in float64: it is the surgery that is compared, not the rounding of logits that may be large
    masked, thinned = copy.deepcopy(parts.model).double().eval(), copy.deepcopy(small).double().eval()
    images = data.train.fixed(1)[0][0].to(next(thinned.parameters()))
    with torch.no_grad():
        difference = float((masked(images) - thinned(images)).abs().max())
    before, after = layer_costs(parts.model, shape), layer_costs(small, shape)
    rows = {name: layer.weight.shape[0] for name, layer in layers(small).items()}
    shares = {name: rows[name] / layer.weight.shape[0] for name, layer in layers(parts.model).items()}

    def gone(left: float, dense: int) -> float:
        return round(1.0 - left / dense, 6)

    weights, macs = sum(cost.total for cost in before if cost.counted), sum(cost.macs for cost in before)
    return small, finite(
        {
            "parameters": sum(parameter.numel() for parameter in small.parameters()),
            "weights": sum(cost.total for cost in after if cost.counted),
            "flops": 2 * sum(cost.macs for cost in after),
            "filters": rows,
            "difference": difference,
            "removed": {
                "weights": gone(sum(cost.total for cost in after if cost.counted), weights),
                "flops": gone(sum(cost.macs for cost in after), macs),
            },
            "removed_filters": {
                "weights": gone(sum(shares[cost.name] * cost.total for cost in before if cost.counted), weights),
                "flops": gone(sum(shares.get(cost.name, 1.0) * cost.macs for cost in before), macs),
            },
        }
    )


def flops(costs: list[LayerCost], trained: int, trained_macs: int) -> dict[str, int]:
    """Two operations a multiply-add; a training image costs three forward passes (forward, input and weight gradient).

    Dense counts are what masked dense arithmetic really computes; sparse ones count kept weights: in inference the
    final network's, in training `trained_macs`, one forward pass of all `trained` images by what was kept then. What
    DyReLU and compactors add while training is not counted.
    """
    dense, sparse = sum(c.macs for c in costs), sum(c.sparse_macs for c in costs)
    return {
        "inference_dense": 2 * dense,
        "inference_sparse": 2 * sparse,
        "training_dense": 6 * dense * trained,
        "training_sparse": 6 * trained_macs,
    }
