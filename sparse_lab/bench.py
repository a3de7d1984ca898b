"""`sparse-lab bench`: speed as ratios, measured in one process on this machine, interleaved."""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from sparse_lab import models
from sparse_lab.config import RecipeConfig
from sparse_lab.outcome import commit, device_name
from sparse_lab.sparsity.masks import Masks
from sparse_lab.sparsity.selection import top_k
from sparse_lab.training.recipes import make_optimizer


def main(argv: list[str]) -> int:
    """Run one benchmark and print its table."""
    parser = argparse.ArgumentParser(prog="sparse-lab bench", description="Speed on this machine, as ratios.")
    benches = parser.add_subparsers(dest="bench", required=True)
    for name, text in (
        (
            "selection",
            "exact top-k over 25 M scores, against a ResNet-34 training step (batch 128) and other ways to select",
        ),
        ("masks", "what enforcing masks after each optimizer step costs, against the step itself"),
    ):
        one = benches.add_parser(name, help=text, description=text)
        one.add_argument("--repeats", type=int, default=5, help="interleaved rounds (default 5)")
        one.add_argument("--csv", type=Path, default=None, metavar="FILE", help="write the table there too")
    args = parser.parse_args(argv)
    rows, base = {"selection": selection, "masks": masks}[args.bench](args.repeats)
    show(args.bench, rows, base)
    if args.csv is not None:
        save(args.csv, rows, base)
    return 0


Times = dict[str, list[float]]


def interleaved(candidates: dict[str, Callable[[], object]], repeats: int) -> Times:
    """Seconds of each candidate, one after the other in turn, after one warm-up round."""
    times: Times = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def training_step(
    name: str, optimizer: str = "sgd"
) -> tuple[torch.nn.Module, torch.optim.Optimizer, Callable[[], object]]:
    """A dense CPU training step, batch 128 of 32x32, float32."""
    torch.manual_seed(0)
    model = models.build(name)
    step = make_optimizer(model.parameters(), RecipeConfig(optimizer=optimizer, lr=1e-3))
    images, labels = torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))

    def run() -> None:
        step.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        step.step()

    return model, step, run


def selection(repeats: int) -> tuple[Times, str]:
    """1% of 25 M float32 scores. Only the first candidate is exact in count and stable in ties."""
    _, _, step = training_step("resnet34")
    scores = torch.rand(25_000_000, generator=torch.Generator().manual_seed(0))
    k = scores.numel() // 100
    array = scores.numpy()
    candidates: dict[str, Callable[[], object]] = {
        "ResNet-34 training step": step,
        "sparse_lab top_k (exact, tie-stable)": lambda: top_k(scores, k),
        "numpy.partition (threshold only)": lambda: np.partition(array, array.size - k),
        "torch.topk": lambda: torch.topk(scores, k),
        "torch.kthvalue (threshold only)": lambda: torch.kthvalue(scores, scores.numel() - k),
        "torch.sort": lambda: torch.sort(scores),
    }
    return interleaved(candidates, repeats), "ResNet-34 training step"


def masks(repeats: int) -> tuple[Times, str]:
    """Enforcing masks on VGG16 and its optimizer state, beside the whole dense step."""
    candidates: dict[str, Callable[[], object]] = {}
    for optimizer in ("sgd", "adamw"):
        model, step, run = training_step("vgg16", optimizer)
        kept = Masks(model)
        kept.set({name: torch.rand(mask.shape) < 0.01 for name, mask in kept.masks().items()})
        candidates[f"VGG16 training step, {optimizer}"] = run
        candidates[f"enforcing masks, {optimizer}"] = lambda kept=kept, step=step: kept.enforce(step)  # type: ignore[misc]
    return interleaved(candidates, repeats), "VGG16 training step, sgd"


def show(name: str, times: Times, base: str) -> None:
    """One row a candidate: median, spread, share of the base."""
    print(f"bench {name} on {device_name(torch.device('cpu'))}; torch {torch.__version__}; commit {commit()}")
    print(f"{'':40} {'median ms':>10} {'min':>9} {'max':>9} {'share of base':>14}")
    for candidate, values in times.items():
        share = statistics.median(one / other for one, other in zip(values, times[base], strict=True))
        milli = [1000 * value for value in values]
        print(f"{candidate:40} {statistics.median(milli):10.1f} {min(milli):9.1f} {max(milli):9.1f} {share:14.4f}")


def save(path: Path, times: Times, base: str) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["candidate", "median_ms", "min_ms", "max_ms", "share_of_base"])
        for candidate, values in times.items():
            share = statistics.median(one / other for one, other in zip(values, times[base], strict=True))
            writer.writerow(
                [candidate, *(round(1000 * f(values), 2) for f in (statistics.median, min, max)), round(share, 5)]
            )
