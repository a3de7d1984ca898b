"""A trace with less to do and to store, and the same logits: batch norms in the weights before them, what no image
changes computed once. All in float64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_lab.trace.trace import WEIGHTED, Batch, Named, Step, Trace, Value, leaves, mapped, names, perform, reads

Folded = tuple[Trace, dict[str, Tensor]]


def folded(trace: Trace, tensors: Mapping[str, Tensor], sizes: list[Any]) -> Folded:
    """The trace and its tensors, float64 where they are numbers, all of them constants of it. sizes: the values' shapes
    for two images.
    """
    double = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    folding = _Folding(trace, double, sizes)
    for number, step in enumerate(trace.steps):
        folding.take(number, step)
    return folding.done()


class _Folding:
    """Steps in the making. at: what each value of the old trace is now, a Value or a Named."""

    def __init__(self, trace: Trace, tensors: Mapping[str, Tensor], sizes: list[Any]) -> None:
        self.old, self.sizes = trace, sizes
        self.tensors = dict(tensors)
        self.steps: list[Step] = []
        self.at: dict[int, Any] = {0: Value(0)}
        self.readers = Counter(value for step in trace.steps for value in reads(step))
        self.readers[trace.result] += 1

    def take(self, number: int, step: Step) -> None:
        moved = Step(step.operation, {key: mapped(value, self._moved) for key, value in step.arguments.items()})
        if step.operation == "batch_norm":
            self.at[number + 1] = self._batch_norm(step, moved)
        elif self._is_smaller(moved, self.sizes[number + 1]):
            self.at[number + 1] = self._named(perform(moved, {}, self.tensors, 0, torch.float64))
        else:
            self.at[number + 1] = self._put(moved)

    def done(self) -> Folded:
        read = {name for step in self.steps for name in names(step)}
        kept = {name: tensor for name, tensor in self.tensors.items() if name in read}
        result = self.at[self.old.result]
        if isinstance(result, Named):
            raise ValueError("no image changes the logits")
        return Trace(self.old.images, tuple(self.steps), result.number, (), (), kept), kept

    def _moved(self, leaf: Any) -> Any:
        return self.at[leaf.number] if isinstance(leaf, Value) else leaf

    def _put(self, step: Step) -> Value:
        self.steps.append(step)
        return Value(len(self.steps))

    def _named(self, tensor: Tensor) -> Named:
        name = f"folded{len(self.tensors)}"
        self.tensors[name] = tensor.contiguous()
        return Named(name)

    def _is_smaller(self, step: Step, size: Any) -> bool:
        """Does no image change what the step makes, and does storing that take no more than what it is made of?"""
        read = list(leaves(list(step.arguments.values())))
        if any(isinstance(leaf, Value) for leaf in read) or isinstance(size, list):
            return False
        given = sum(self.tensors[leaf.name].numel() for leaf in read if isinstance(leaf, Named))
        return 0 < torch.Size(size).numel() <= given and not any(isinstance(leaf, Batch) for leaf in read)

    def _batch_norm(self, step: Step, moved: Step) -> Value:
        mean, variance = (self.tensors[moved[name].name] for name in ("mean", "variance"))
        given = {name: self.tensors[moved[name].name] for name in ("weight", "bias") if moved[name] is not None}
        scale = given.get("weight", torch.ones_like(mean)) / (variance + moved["eps"]).sqrt()
        shift = given.get("bias", torch.zeros_like(mean)) - mean * scale
        source, before = step["input"], moved["input"]
        made_by = self.steps[before.number - 1] if before.number else None
        if made_by is not None and self.readers[source.number] == 1 and self._takes(made_by, source.number):
            self.steps[before.number - 1] = self._scaled(made_by, scale, shift)
            return before
        return self._put(
            Step("channel_affine", {"input": before, "weight": self._named(scale), "bias": self._named(shift)})
        )

    def _takes(self, step: Step, value: int) -> bool:
        """Is it a convolution, or a linear layer whose outputs are the channels?"""
        if step.operation not in WEIGHTED or (step.operation == "linear" and len(self.sizes[value]) != 2):
            return False
        return isinstance(step["weight"], Named) and isinstance(step["bias"], Named | None)

    def _scaled(self, step: Step, scale: Tensor, shift: Tensor) -> Step:
        weight = self.tensors[step["weight"].name]
        bias = shift if step["bias"] is None else self.tensors[step["bias"].name] * scale + shift
        new = {"weight": self._named(weight * scale.view(-1, *(1,) * (weight.dim() - 1))), "bias": self._named(bias)}
        return Step(step.operation, {**step.arguments, **new})
