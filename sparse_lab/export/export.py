"""The network of a finished run as files that others can use, each checked and timed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_lab.errors import UserError
from sparse_lab.export import latency, onnx, onnx_trace, packed, state_dict
from sparse_lab.export.dead_channels import reduced
from sparse_lab.export.folding import folded
from sparse_lab.export.graph import Graph
from sparse_lab.export.load_run import Finished, images
from sparse_lab.export.lowering import NoPlace, lowered
from sparse_lab.export.state_dict import read as read
from sparse_lab.export.streams import Precision
from sparse_lab.records.atomic_io import write_record
from sparse_lab.records.record import read_result
from sparse_lab.records.run_dir import now
from sparse_lab.trace.trace import Trace, multiply_adds, shapes, weight_names

SUFFIXES = {"packed": packed.SUFFIX, "onnx": ".onnx", "torch": ".pt"}
EXACT = 1e-4  # logits of float32 files may differ by this share of the largest from float64's
ROUNDED = 8  # or by so many times what the network itself loses in float32, where it amplifies rounding more than that
Runner = Callable[[Tensor], Tensor]


def export(run: Finished, files: dict[str, Path], values: Precision = "fp32") -> dict[str, Any]:
    """Write each format of `files`, read it back, compare it with the original, time it; returns what was found.

    Raises UserError when the network has no trace, when its code or a package is needed and missing, and when a
    float32 file's logits are not those of the original.
    """
    shown, which = images(run, 64 if min(run.shape[1:]) < 64 else 16)
    dense = sum(parameter.numel() * parameter.element_size() for parameter in run.model.parameters())
    found: dict[str, Any] = {"written": now(), "compared_on": f"{len(shown)} {which}", "values": values}
    found["bytes"] = {"dense": dense}
    written = None
    if set(files) - {"torch"}:
        written = network(*run.traced())
        found |= {"macs": written.macs, "weights": written.weights, "thinned": written.graph is not None}
    original = _logits(run.model, shown)
    runners: dict[str, Runner] = {"dense torch": run.model}
    own = ROUNDED * _furthest(torch.no_grad()(run.model), shown, original)
    for kind, path in files.items():
        name, runner = _write(kind, run, written, path, values, shown)
        difference = _furthest(runner, shown, original)
        if not difference <= max(EXACT, own) and not (kind == "packed" and values == "fp16"):
            raise UserError(f"{path} differs from the run's network by {difference:.1e} of its logits: do not use it")
        found["bytes"][kind] = path.stat().st_size
        found.setdefault("difference", {})[kind] = difference
        if kind != "torch":
            runners[name] = runner
    found["threads"] = torch.get_num_threads()
    found["latency_ms"] = latency.by_batch(runners, shown)
    return found


@dataclass(frozen=True)
class Network:
    """What is written: a graph, or a folded trace with its tensors where there is no graph. macs: of an image."""

    graph: Graph | None
    trace: Trace
    tensors: dict[str, Tensor]
    macs: dict[str, int]
    weights: int


def network(trace: Trace, tensors: dict[str, Tensor]) -> Network:
    """What is written of a network: its graph without what is dead, or its folded trace."""
    dense, live = multiply_adds(trace, tensors)
    try:
        graph = reduced(lowered(trace, tensors))
    except NoPlace:
        small, folds = folded(trace, tensors, shapes(trace, tensors, 2))
        weights = sum(int(torch.count_nonzero(folds[name])) for name in weight_names(small))
        return Network(None, small, folds, {"dense": dense, "sparse": live}, weights)
    return Network(graph, trace, tensors, {"dense": dense, "sparse": graph.multiply_adds()}, graph.weights())


def _write(
    kind: str, run: Finished, written: Network | None, path: Path, values: Precision, shown: Tensor
) -> tuple[str, Runner]:
    """One file, and what runs it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "torch" or written is None:
        state_dict.save(run, path)
        return "torch", torch.no_grad()(state_dict.read(path))
    about = {"network": run.build["name"], **run.build, **run.about(), "normalise": run.normalise}
    about |= {"channels": run.shape[0]}
    if kind == "packed":
        if written.graph is None:
            packed.save_trace(written.trace, written.tensors, about, path, values)
        else:
            packed.save(written.graph, about, path, values)
        return "sparse", packed.load(path)
    if written.graph is None:
        onnx_trace.save(written.trace, written.tensors, about, path)
        return "onnxruntime", onnx.runner(path)
    return "onnxruntime", onnx.save_fastest(written.graph, about, path, shown)


def _logits(model: torch.nn.Module, shown: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).double()(shown.double())


def _furthest(runner: Runner, shown: Tensor, original: Tensor) -> float:
    """Largest difference from the original logits, as a share of the largest of them: of one image, and of all."""
    return max(_difference(runner(shown[:size]), original[:size]) for size in (1, len(shown)))


def _difference(logits: Tensor, original: Tensor) -> float:
    return float((logits - original).abs().max() / original.abs().max().clamp_min(1e-30))


def record(run: Finished, found: dict[str, Any]) -> None:
    """Put what was found into the run's record."""
    path = run.path / "result.json"
    write_record(path, {**read_result(path), "export": found})
