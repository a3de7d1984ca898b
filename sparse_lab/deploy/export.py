"""`sparse-lab export RUN`: the network of a finished run as files that others can use, each checked and timed."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_lab.config import UserError
from sparse_lab.deploy import latency, onnx, packed, torch_file
from sparse_lab.deploy.finished import Finished, finished, images
from sparse_lab.deploy.graph import Graph
from sparse_lab.deploy.live import reduced
from sparse_lab.deploy.torch_file import read as read
from sparse_lab.deploy.trace import traced
from sparse_lab.record import now
from sparse_lab.sparsity.cost import layer_costs
from sparse_lab.whole import write_record

SUFFIXES = {"packed": packed.SUFFIX, "onnx": ".onnx", "torch": ".pt"}
EXACT = 1e-4  # logits of float32 files may differ by this share of the largest from float64's
Runner = Callable[[Tensor], Tensor]


def export(run: Finished, files: dict[str, Path], values: packed.Precision = "fp32") -> dict[str, Any]:
    """Write each format of `files`, read it back, compare it with the original, time it; returns what was found.

    Raises UserError when the network has no graph, when the package onnx is needed and missing, and when a float32
    file's logits are not those of the original.
    """
    shown, which = images(run, 64 if run.image_size < 64 else 16)
    graph = reduced(traced(run.model, run.image_size)) if set(files) - {"torch"} else None
    dense = sum(parameter.numel() * parameter.element_size() for parameter in run.model.parameters())
    costs = layer_costs(run.model, run.image_size)
    found: dict[str, Any] = {"written": now(), "compared_on": f"{len(shown)} {which}", "values": values}
    found["macs"] = {"dense": sum(cost.macs for cost in costs)}
    found["bytes"] = {"dense": dense}
    if graph is not None:
        found["macs"]["sparse"] = graph.multiply_adds()
        found["weights"] = graph.weights()
    original = _logits(run.model, shown)
    runners: dict[str, Runner] = {"dense torch": run.model}
    for kind, path in files.items():
        name, runner = _write(kind, run, graph, path, values, shown)
        difference = _difference(runner(shown), original)
        if not difference <= EXACT and not (kind == "packed" and values == "fp16"):
            raise UserError(f"{path} differs from the run's network by {difference:.1e} of its logits: do not use it")
        found["bytes"][kind] = path.stat().st_size
        found.setdefault("difference", {})[kind] = difference
        if kind != "torch":
            runners[name] = runner
    found["threads"] = torch.get_num_threads()
    found["latency_ms"] = latency.by_batch(runners, shown)
    return found


def _write(
    kind: str, run: Finished, graph: Graph | None, path: Path, values: packed.Precision, shown: Tensor
) -> tuple[str, Runner]:
    """One file, and what runs it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "torch" or graph is None:
        torch_file.save(run, path)
        return "torch", torch.no_grad()(torch_file.read(path))
    about = {"network": run.build["name"], **run.build, **run.about(), "normalise": run.normalise}
    if kind == "packed":
        packed.save(graph, about, path, values)
        return "sparse", packed.load(path)
    return "onnxruntime", onnx.save_fastest(graph, about, path, shown)


def _logits(model: torch.nn.Module, shown: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).double()(shown.double())


def _difference(logits: Tensor, original: Tensor) -> float:
    """Largest difference as a share of the largest logit."""
    return float((logits - original).abs().max() / original.abs().max().clamp_min(1e-30))


def record(run: Finished, found: dict[str, Any]) -> None:
    """Put what was found into the run's record."""
    path = run.path / "result.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    write_record(path, {**result, "export": found})


def report(run: Finished, files: dict[str, Path], found: dict[str, Any]) -> list[str]:
    """What was found, in lines for a terminal."""
    about = run.about()
    reuse = about["kept_with_reuse"]
    shared = f" (shared, so {reuse:,} in the plain network that it equals)" if reuse is not None else ""
    lines = [f"{about['name']}: {about['kept']:,} of {about['total']:,} weights{shared}, "
             f"test {about['test_accuracy']:.2f}%"]  # fmt: skip
    macs, sizes = found["macs"], found["bytes"]
    if "sparse" in macs:
        lines.append(
            f"multiply-adds of an image: {macs['dense']:,} dense, {macs['sparse']:,} with live weights "
            f"({found['weights']:,} of them lie on a path from the image to a logit)"
        )
    for kind, path in files.items():
        lines.append(
            f"{path}: {sizes[kind] / 1024:,.0f} KiB (dense {sizes['dense'] / 1024:,.0f}), logits within "
            f"{found['difference'][kind]:.0e} on {found['compared_on']}"
        )
    for name, times in found["latency_ms"].items():
        spent = ", ".join(f"batch {size} {milliseconds:.2f} ms" for size, milliseconds in times.items())
        lines.append(f"{name}, {found['threads']} threads: {spent}")
    return lines


def _files(run: Path, to: str | None, out: Path | None) -> dict[str, Path]:
    """Which formats go where."""
    by_suffix = {suffix: kind for kind, suffix in SUFFIXES.items()}
    if to is None and out is not None and out.suffix in by_suffix:
        return {by_suffix[out.suffix]: out}
    if to in SUFFIXES:
        kinds = [to]
    else:
        installed = importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxruntime")
        kinds = list(SUFFIXES) if to == "all" or installed else ["packed", "torch"]
    if len(kinds) == 1 and out is not None and out.suffix:
        return {kinds[0]: out}
    return {kind: (out or run) / f"network{SUFFIXES[kind]}" for kind in kinds}


def main(argv: list[str]) -> int:
    """Export, read the files back, say what is in them and how fast they are."""
    parser = argparse.ArgumentParser(
        prog="sparse-lab export",
        description="Write the network of a finished run as files that others can use. packed: a few bytes a live "
        "weight, for sparse_lab.load(FILE), which runs it on sparse kernels. onnx: the live channels as a dense "
        "network, for any ONNX runtime. torch: weights with zeros where they are pruned, for "
        "sparse_lab.deploy.export.read(FILE). Each file is read back, compared with the run's network and timed.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder (it holds result.json)")
    parser.add_argument(
        "--to", choices=(*SUFFIXES, "all"), help="default: whatever the packages installed here can write"
    )
    parser.add_argument("--values", choices=tuple(packed.DTYPES), default="fp32", help="of the packed file's weights")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        metavar="PATH",
        help="a file (.sparse, .onnx or .pt) or a folder; default: RUN",
    )
    args = parser.parse_args(argv)
    run = finished(args.run)
    files = _files(args.run, args.to, args.out)
    found = export(run, files, args.values)
    record(run, found)
    print("\n".join(report(run, files, found)))
    return 0
