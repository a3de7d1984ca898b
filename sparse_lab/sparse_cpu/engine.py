"""A network called with sparse arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor, nn

from sparse_lab.sparse_cpu.autograd import Tape, Value
from sparse_lab.sparse_cpu.dispatch import BatchInnermost
from sparse_lab.sparse_cpu.layout import Pool, Shape, block_size
from sparse_lab.sparse_cpu.sparse_weights import sparse_weights

DENSE_ABOVE = 0.25  # share of weights that live: beyond it torch's dense kernels are faster in any network measured


class SparseArithmetic:
    """`arithmetic(images)` is `model(images)`, on live weights only.

    The model stays as it is and can be called densely at any time. Counted weights, those with a `mask` beside them,
    get no `.grad` from a backward pass but `live[weight].gradient`, which holds that of kept weights alone; with
    `dense_gradients` set before the forward pass they get a dense `.grad` as well. Every other parameter gets its
    `.grad`. While more than a quarter of the weights live, torch computes, and all gradients are dense.

    CPU only, float32 or float64. Two calls may be under way only if the first one's gradients are no longer asked for.
    """

    def __init__(self, model: nn.Module, say: Callable[[str], None] = lambda line: None) -> None:
        self.model = model
        self.live = sparse_weights(model)
        self.dense_gradients = False
        self._pool = Pool()
        self._say = say
        self._said: set[str] = set()
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, 3, H, W)."""
        if self.density() > DENSE_ABOVE:
            for one in self.live.values():
                one.gradient = None
            return self.model(images)
        recording = torch.is_grad_enabled()
        dtype = np.dtype(np.float64 if images.dtype == torch.float64 else np.float32)
        tape = Tape(self._pool, self.live, dtype, recording, self.dense_gradients, self._say_once)
        number, channels, height, width = images.shape
        shape = Shape(number, channels, height, width, block_size(number))
        logits = self.model(BatchInnermost(tape, Value(shape, tape.packed(images, shape), needs_gradient=False)))
        if not recording:
            return logits.tensor()
        anchor = torch.zeros((), dtype=images.dtype, requires_grad=True)
        return _Whole.apply(anchor, tape, logits)

    def density(self) -> float:
        """Kept share of the weights that have masks."""
        kept = sum(len(one.positions) for one in self.live.values())
        return kept / max(1, sum(weight.numel() for weight in self.live))

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)


class _Whole(torch.autograd.Function):
    """The network as torch's autograd sees it: one function, whose backward pass walks the tape."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tape: Tape, logits: BatchInnermost) -> Tensor:
        ctx.tape, ctx.value, ctx.spent = tape, logits.value(), False
        return logits.tensor()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if ctx.spent:
            raise RuntimeError("compute=sparse cannot go backward a second time through one forward pass")
        ctx.spent = True
        value: Value = ctx.value
        whole = gradients[0].contiguous().view(value.shape.images, -1, value.shape.height, value.shape.width)
        value.give(ctx.tape.packed(whole, value.shape))
        with torch.enable_grad():
            ctx.tape.backward()
        return None, None, None
