"""The network of a finished run as a plain torch module, with what is known of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_lab import models
from sparse_lab.errors import SparseLabError, UserError
from sparse_lab.experiment import plugins
from sparse_lab.experiment.trace_file import read_trace
from sparse_lab.export.folding import Folded
from sparse_lab.models.offsets import folded
from sparse_lab.models.surgery import rebuild_structure
from sparse_lab.records.atomic_io import verify_checksum
from sparse_lab.records.record import BadRecord, read_result
from sparse_lab.records.run_dir import RunDir
from sparse_lab.sparsity.state import load_state
from sparse_lab.sparsity.structured.remove_channels import rebuild
from sparse_lab.trace.capture import captured, state_of
from sparse_lab.trace.trace import Trace, TracedNetwork, check
from sparse_lab.training.checkpoint_io import load_network

LINE = 200  # characters of what went wrong


@dataclass(frozen=True)
class Finished:
    """`model`: plain layers, no masks (pruned weights are zeros), evaluation mode, float32 on the CPU. `build`: what
    `models.build` needs to make a network of its kind; `normalise`: mean and std per channel, of pixels in 0..1.
    `trace`: of the network, where its run has left one. `unbuilt`: why its code is not at hand; then `model` is its
    trace.
    """

    path: Path
    result: dict[str, Any]
    model: nn.Module
    build: dict[str, Any]
    normalise: dict[str, list[float]]
    trace: Trace | None = None
    unbuilt: str = ""

    def traced(self) -> Folded:
        """The network's trace and its tensors. Raises UserError, in one line, for a network that has none."""
        trace = self.trace or captured(self.model, self.shape)
        if isinstance(self.model, TracedNetwork):
            return trace, self.model.tensors()
        return trace, {**state_of(trace, self.model.state_dict()), **trace.constants}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        size = self.build["image_size"]
        return self.build.get("channels", 3), *((size, size) if isinstance(size, int) else size)

    def about(self) -> dict[str, Any]:
        """What a file says of the network: plain facts."""
        keys = ("name", "sparsity", "kept", "total", "test_accuracy")
        known = {key: self.result.get(key) for key in ("nonzero", "kept_with_reuse")}  # of a run of before: null
        return {key: self.result[key] for key in keys} | known | {"classes": self.class_names or None}

    @property
    def class_names(self) -> list[str]:
        """By label; none of data that do not name them, and of a run of before."""
        classes = self.result.get("classes")
        names = classes.get("names") if isinstance(classes, dict) else None
        return list(names) if isinstance(names, list) else []


def finished(run: Path) -> Finished:
    """Read a run's folder; where whole filters went, the network without them. Raises UserError when the run is not
    finished, or its result or its network is not what was written.
    """
    folder = RunDir(run, {})
    try:
        result = read_result(run / "result.json")
        model, dataset = result["config"]["model"], result["config"]["dataset"]
        build = {"name": model["name"], "num_classes": dataset["num_classes"], "width": model["width"]}
        build["image_size"] = dataset["image_size"]
        build |= {name: model[name] for name in ("arch", "adapt_stem", "options") if model.get(name)}
        build |= {"channels": dataset["channels"]} if dataset.get("channels", 3) != 3 else {}
        normalise = result.get("normalise") or {"mean": dataset["mean"], "std": dataset["std"]}
    except FileNotFoundError:
        raise UserError(f"{run} is not a finished run: it has no result.json") from None
    except BadRecord as error:
        raise UserError(f"{run / 'result.json'}: {error}; the same command that made the run makes it again") from None
    except (KeyError, TypeError):
        raise UserError(f"{run / 'result.json'} says neither what its network is nor what its images are") from None
    network = folder.small if folder.small.is_file() else folder.best
    if network in folder.foreign(result):
        raise UserError(f"{network} is not the network that {run / 'result.json'} speaks of: nothing is exported")
    if not network.is_file() or not verify_checksum(network):
        raise UserError(f"{network} is missing or damaged: the same command that made the run makes it again")
    state = load_network(network)
    trace = read_trace(folder.trace) if folder.trace.is_file() else None
    try:
        if build["name"] not in models.names():
            raise UserError(f"{run} has a network {build['name']!r} that is not known here{_missing(result)}")
        return Finished(run, result, _plain(state, build, network).eval(), build, normalise, trace)
    except UserError as error:  # its plugin or its library is not here
        if trace is None and models.is_ours(build["name"]):
            raise
        if trace is None:
            raise UserError(f"{error}; the run left no trace, by which it could be exported without that") from None
        return Finished(run, result, _from_trace(trace, state, folder.trace), build, normalise, trace, str(error))


def _from_trace(trace: Trace, state: dict[str, Tensor], path: Path) -> TracedNetwork:
    try:
        tensors = {**state_of(trace, state), **trace.constants}
        check(trace, tensors)
    except Exception as error:  # somebody else may have written either
        line = " ".join(str(error).split())[:LINE]
        raise UserError(f"{path} is not the trace of the network beside it ({line}): nothing is exported") from None
    return TracedNetwork(trace, tensors).eval()


def _missing(result: dict[str, Any]) -> str:
    """Which plugins the run was made with that are not loaded."""
    loaded = plugins.hashes()
    missing = [f"{name} ({digest[:10]})" for name, digest in result.get("plugins", {}).items() if name not in loaded]
    if not missing:
        return ""
    said = f"plugin {missing[0]}" if len(missing) == 1 else f"plugins {', '.join(missing)}"
    return f": it was made with {said}, so give {'it' if len(missing) == 1 else 'them'} by --plugin FILE_OR_MODULE"


def _plain(network: dict[str, Tensor], build: dict[str, Any], path: Path) -> nn.Module:
    """The network as plain layers: what some methods keep beside a weight is added to it."""
    try:
        return _rebuilt(models.build(**build), network)
    except UserError:
        raise
    except Exception as error:  # what lies there does not fit what the record says of it
        line = " ".join(str(error).split())[:LINE]
        raise UserError(f"{path} is no network of the kind that its run's record names ({line})") from None


def _rebuilt(model: nn.Module, network: dict[str, Tensor]) -> nn.Module:
    if any(name.endswith((".alpha", ".mean")) for name in network):
        rebuild_structure(model, network)
        load_state(model, network, strict=False)  # masks that a plain layer has no place for
        return folded(model)
    return rebuild(model, {name: value for name, value in network.items() if not name.endswith(".mask")})


def images(run: Finished, count: int) -> tuple[Tensor, str]:
    """Up to `count` normalised images (N, C, H, W) of the run's test set, or random ones where the data is not at hand;
    and which they are, in words.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from sparse_lab import data
    from sparse_lab.config import Config

    try:
        stored = OmegaConf.load(run.path / "config.yaml")
        # the rest may be of an older version
        of_data = {key: OmegaConf.select(stored, key) for key in ("dataset", "training", "seed")}
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), of_data))
        assert isinstance(config, Config)
        config.dataset.download = False  # an export fetches nothing
        found = data.build(config.dataset, config.training, config.seed).test
        batches, left = [], count
        for batch, _ in found:
            batches.append(batch[:left])
            left -= len(batches[-1])
            if not left:
                break
        return torch.cat(batches), f"test images of {config.dataset.name}"
    except (SparseLabError, OSError, OmegaConfBaseException):
        source = torch.Generator().manual_seed(0)
        return torch.randn(count, *run.shape, generator=source), "random images"
