"""The network as torch saves it: a state dict with zeros where weights are pruned, for `models.build`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparse_lab import models
from sparse_lab.errors import UserError
from sparse_lab.export.load_run import Finished
from sparse_lab.sparsity.structured.remove_channels import rebuild
from sparse_lab.training.checkpoint_io import load_checkpoint, save_checkpoint

FORMAT = "sparse_lab export 1"


def save(run: Finished, path: Path) -> dict[str, Any]:
    """Write weights and buffers with what `models.build` needs to make the network; returns what was written. Raises
    UserError where the network's own code is not at hand.
    """
    if run.unbuilt:
        raise UserError(f"--to torch needs the network's own code, packed and onnx do not: {run.unbuilt}")
    payload = {
        "format": FORMAT,
        "build": run.build,
        "normalise": run.normalise,
        "about": run.about(),
        "state_dict": run.model.state_dict(),
    }
    save_checkpoint(payload, path)
    return payload


def read(path: Path) -> torch.nn.Module:
    """The exported network, in evaluation mode. Raises UserError for any other file."""
    return opened(path)[0]


def opened(path: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    """`read`, and what the file says of the network: `build`, `normalise` and `about`, as `save` wrote them."""
    payload = load_checkpoint(path)
    if payload.get("format") != FORMAT:
        raise UserError(f"{path} is not a torch network that `sparse-lab export` wrote")
    try:
        model = rebuild(models.build(**payload["build"]), payload["state_dict"]).eval()
        about = {**payload["build"], **payload["about"], "normalise": payload["normalise"]}
    except Exception as error:  # somebody else may have written it
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not what it says it is ({type(error).__name__}: {line}): export it again") from None
    return model, about
