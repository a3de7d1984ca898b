"""`sparse-lab export RUN`: the network of a finished run as files that others can use, each checked and timed."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from sparse_lab.export.export import SUFFIXES, export, record
from sparse_lab.export.load_run import Finished, finished
from sparse_lab.export.streams import DTYPES
from sparse_lab.records.run_dir import zeros_among


def report(run: Finished, files: dict[str, Path], found: dict[str, Any]) -> list[str]:
    """What was found, in lines for a terminal."""
    about = run.about()
    reuse = about["kept_with_reuse"]
    shared = f" (shared, so {reuse:,} in the plain network that it equals)" if reuse is not None else ""
    lines = [f"{about['name']}: {about['kept']:,} of {about['total']:,} weights{zeros_among(about)}{shared}, "
             f"test {about['test_accuracy']:.2f}%"]  # fmt: skip
    macs, sizes = found.get("macs"), found["bytes"]
    if macs is not None:
        told = "lie on a path from the image to a logit" if found["thinned"] else "are not zero"
        lines.append(
            f"multiply-adds of an image: {macs['dense']:,} dense, {macs['sparse']:,} with live weights "
            f"({found['weights']:,} of them {told})"
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


def _files(run: Finished, to: str | None, out: Path | None) -> dict[str, Path]:
    """Which formats go where: without a word, all that can be written here."""
    by_suffix = {suffix: kind for kind, suffix in SUFFIXES.items()}
    if to is None and out is not None and out.suffix in by_suffix:
        return {by_suffix[out.suffix]: out}
    if to in SUFFIXES:
        kinds = [to]
    else:
        installed = importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxruntime")
        missing = {"packed": False, "onnx": not installed, "torch": bool(run.unbuilt)}
        kinds = [kind for kind in SUFFIXES if to == "all" or not missing[kind]]
    if len(kinds) == 1 and out is not None and out.suffix:
        return {kinds[0]: out}
    return {kind: (out or run.path) / f"network{SUFFIXES[kind]}" for kind in kinds}


def main(argv: list[str]) -> int:
    """Export, read the files back, say what is in them and how fast they are."""
    parser = argparse.ArgumentParser(
        prog="sparse-lab export",
        description="Write the network of a finished run as files that others can use, whatever its operations. "
        "packed: a few bytes a weight that is not zero, for sparse_lab.load(FILE), which runs convolutions and linear "
        "layers on sparse kernels and the rest by torch. onnx: a dense network (of live channels alone, where it is "
        "convolutions, linear layers, BatchNorm, ReLU, additions and pools), for any ONNX runtime. torch: weights with "
        "zeros where they are pruned, for sparse_lab.export.state_dict.read(FILE); that alone needs the plugin of a "
        "network of your own. Each file is read back, compared with the run's network and timed.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder (it holds result.json)")
    parser.add_argument(
        "--to", choices=(*SUFFIXES, "all"), help="default: whatever the packages installed here can write"
    )
    parser.add_argument("--values", choices=tuple(DTYPES), default="fp32", help="of the packed file's weights")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        metavar="PATH",
        help="a file (.sparse, .onnx or .pt) or a folder; default: RUN",
    )
    args = parser.parse_args(argv)
    run = finished(args.run)
    files = _files(run, args.to, args.out)
    found = export(run, files, args.values)
    record(run, found)
    print("\n".join(report(run, files, found)))
    return 0
