"""A network called with sparse arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sparse_lab.sparse_cpu.autograd import Tape
from sparse_lab.sparse_cpu.dispatch import Watch, answer
from sparse_lab.sparse_cpu.layout import Pool
from sparse_lab.sparse_cpu.maps import BatchInnermost
from sparse_lab.sparse_cpu.sparse_weights import sparse_weights

STORAGES = ("float32", "bf16")
DENSE_ABOVE = 0.25  # share of weights that live: beyond it torch's dense kernels are faster in any network measured


class SparseArithmetic:
    """`arithmetic(images)` is `model(images)`, on live weights only.

    The model stays as it is and can be called densely at any time. Counted weights, those with a `mask` beside them,
    get no `.grad` from a backward pass but `live[weight].gradient`, which holds that of kept weights alone; with
    `dense_gradients` set before the forward pass they get a dense `.grad` as well. Every other parameter gets its
    `.grad`. While more than a quarter of the weights live, torch computes, and all gradients are dense.

    storage: 'float32' (float64 where the network is), or 'bf16': maps and their gradients lie in memory as bfloat16, in
    half the room. Sums, statistics, weights and their gradients stay float32. A network in float64 keeps float64.

    CPU only, float32 or float64. Two calls may be under way only if the first one's gradients are no longer asked for.
    """

    def __init__(
        self, model: nn.Module, say: Callable[[str], None] = lambda line: None, storage: str = "float32"
    ) -> None:
        self.model = model
        self.live = sparse_weights(model)
        self.dense_gradients = False
        if storage not in STORAGES:
            raise ValueError(f"storage={storage!r} is not known: {' or '.join(STORAGES)}")
        self._bfloat16 = storage == "bf16"
        self._pool = Pool()
        self._say = say
        self._said: set[str] = set()
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]

    def __call__(self, images: Tensor) -> Any:
        """What the model gives: logits (N, classes) of images (N, 3, H, W), mostly."""
        if self.density() > DENSE_ABOVE:
            for one in self.live.values():
                one.gradient = None
            return self.model(images)
        kind = images.dtype if images.dtype in (torch.float32, torch.float64) else torch.get_default_dtype()
        tape = Tape(self._pool, self.live, kind, self.dense_gradients, self._say_once, answer, self._bfloat16)
        tape.note([images])
        with Watch(tape):
            outcome = self.model(images)
        return tree_map(lambda one: one.plain() if isinstance(one, BatchInnermost) else one, outcome)

    def density(self) -> float:
        """Kept share of the weights that have masks."""
        kept = sum(len(one.positions) for one in self.live.values())
        return kept / max(1, sum(weight.numel() for weight in self.live))

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)
