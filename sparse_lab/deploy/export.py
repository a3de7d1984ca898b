"""`sparse-lab export RUN`: the network of a finished run as one plain file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from sparse_lab import models
from sparse_lab.config import UserError
from sparse_lab.deploy.thin import rebuild
from sparse_lab.models.offsets import folded
from sparse_lab.models.surgery import match
from sparse_lab.training.files import load, load_network, save_whole

FORMAT = "sparse_lab export 1"


def export(run: Path, out: Path) -> dict[str, Any]:
    """Write weights and buffers (no masks: pruned weights are zeros) with what `models.build` needs to make the
    network.

    Raises UserError when `run` is not a finished run.
    """
    try:
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        config = result["config"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{run} is not a finished run: it has no readable result.json") from None
    best, small = (run / "checkpoints" / name for name in ("best.ckpt", "small.ckpt"))
    network = load_network(small if small.is_file() else best)  # where whole filters went, the network without them
    state = {name: value for name, value in _folded(network, config).items() if not name.endswith(".mask")}
    build = {
        "name": config["model"]["name"],
        "num_classes": config["dataset"]["num_classes"],
        "width": config["model"]["width"],
        "image_size": config["dataset"]["image_size"],
    }
    about = {key: result[key] for key in ("name", "sparsity", "kept", "total", "test_accuracy")}
    about["kept_with_reuse"] = result.get("kept_with_reuse")
    normalise = {"mean": config["dataset"]["mean"], "std": config["dataset"]["std"]}
    payload = {"format": FORMAT, "build": build, "normalise": normalise, "about": about, "state_dict": state}
    save_whole(payload, out)
    return payload


def _folded(network: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The network as plain layers: what some methods keep beside a weight is added to it."""
    if not any(name.endswith((".alpha", ".mean")) for name in network):
        return network
    model = models.build(
        config["model"]["name"],
        config["dataset"]["num_classes"],
        config["model"]["width"],
        config["dataset"]["image_size"],
    )
    match(model, network)
    model.load_state_dict(network, strict=False)  # masks that a plain layer has no place for
    return folded(model).state_dict()


def read(path: Path) -> torch.nn.Module:
    """The exported network, in evaluation mode. Raises UserError for any other file."""
    payload = load(path)
    if payload.get("format") != FORMAT:
        raise UserError(f"{path} is not a network that `sparse-lab export` wrote")
    model = models.build(**payload["build"])
    return rebuild(model, payload["state_dict"]).eval()


def main(argv: list[str]) -> int:
    """Export, read the file back, say what is in it."""
    parser = argparse.ArgumentParser(
        prog="sparse-lab export",
        description="Write the network of a finished run as one file: weights with zeros where they are pruned, "
        "loadable with torch.load(FILE, weights_only=True) into sparse_lab.models.build(**file['build']). Where whole "
        "filters went the weights are those of the smaller network: sparse_lab.deploy.export.read(FILE) builds it.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder (it holds result.json)")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="default: RUN/network.pt")
    args = parser.parse_args(argv)
    out = args.out or args.run / "network.pt"
    about = export(args.run, out)["about"]
    read(out)
    reuse = about["kept_with_reuse"]
    shared = f" (shared, so {reuse:,} in the plain network that it equals)" if reuse is not None else ""
    print(
        f"{out}: {out.stat().st_size / 1024:,.0f} KiB, {about['kept']:,} of {about['total']:,} weights{shared}, "
        f"test {about['test_accuracy']:.2f}%"
    )
    return 0
