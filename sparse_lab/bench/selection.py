"""`sparse-lab bench selection`: ways to find the best of 25 M weights, beside a training step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from sparse_lab.bench.interleaved import Times, interleaved
from sparse_lab.bench.patterns import build
from sparse_lab.bench.training import DenseStep
from sparse_lab.sparsity.topk import top_k

BASE = "ResNet-34 training step"


def measure(repeats: int) -> tuple[Times, dict[str, str]]:
    """1% of 25 M float32 scores. Only the first candidate is exact in count and stable in ties."""
    scores = torch.rand(25_000_000, generator=torch.Generator().manual_seed(0))
    k = scores.numel() // 100
    array = scores.numpy()
    candidates: dict[str, Callable[[], object]] = {
        BASE: DenseStep(build("resnet34", 1.0), 128),
        "sparse_lab top_k (exact, tie-stable)": lambda: top_k(scores, k),
        "numpy.partition (threshold only)": lambda: np.partition(array, array.size - k),
        "torch.topk": lambda: torch.topk(scores, k),
        "torch.kthvalue (threshold only)": lambda: torch.kthvalue(scores, scores.numel() - k),
        "torch.sort": lambda: torch.sort(scores),
    }
    return interleaved(candidates, repeats), dict.fromkeys(candidates, BASE)
