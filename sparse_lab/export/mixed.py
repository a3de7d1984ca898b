"""A trace that can be called: convolutions and linear layers on the sparse kernels, what they have no kernel for by
torch.

Steps in a row that a graph has a place for become one program of the kernels; the others are torch's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_lab.errors import UserError
from sparse_lab.export import lowering
from sparse_lab.export.dead_channels import reduced
from sparse_lab.export.lowering import Layout, NoPlace
from sparse_lab.export.runtime import Images, compiled, fitting
from sparse_lab.records.atomic_io import printable
from sparse_lab.sparse_cpu.program import Executor
from sparse_lab.trace.trace import Step, Trace, last_reads, names, prepared, reads, shapes, weight_names

DENSE = 0.3  # share of a layer's weights that is not zero, above which torch's dense kernels are as fast
LINE = 200  # characters of what went wrong
BEGINS = ("conv2d", "linear", "batch_norm", "channel_affine")  # what is worth a program


@dataclass(frozen=True)
class Part:
    """Steps from the first of them on that one program computes, how its input lies, and its output."""

    steps: range
    source: int
    taken: Layout
    run: Executor
    given: Layout


class MixedNetwork:
    """Logits (N, classes) of normalised images (N, C, H, W), N from 0 up: float32 on the CPU, without gradients; an
    array of an array, a tensor of a tensor.

    `about`: what the file says of the network. One network answers one caller at a time.
    """

    def __init__(self, trace: Trace, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        self.trace, self.about = trace, dict(about)
        sizes = shapes(trace, tensors, 2)
        self.classes = int(sizes[trace.result][1])
        self.parts = {part.steps[0]: part for part in _parts(trace, tensors, sizes)}
        inside = {number for part in self.parts.values() for number in part.steps}
        real = {name: one.float() if one.is_floating_point() else one for name, one in tensors.items()}
        self._calls = {
            number: prepared(step, real, torch.float32)
            for number, step in enumerate(trace.steps)
            if number not in inside
        }
        self._weights = sum(int(torch.count_nonzero(tensors[name])) for name in weight_names(trace))
        self._done = last_reads(trace)

    def weights(self) -> int:
        """Weights of convolutions and linear layers that are not zero."""
        return self._weights

    def __call__(self, images: Images) -> Images:
        logits = self._logits(torch.from_numpy(fitting(images, self.trace.images)))
        return logits.numpy() if isinstance(images, np.ndarray) else logits

    @torch.no_grad()
    def _logits(self, images: Tensor) -> Tensor:
        if not len(images):
            return torch.empty(0, self.classes)
        values: dict[int, Any] = {0: images}
        number = 0
        while number < len(self.trace.steps):
            part = self.parts.get(number)
            if part is None:
                done = range(number, number + 1)
                values[number + 1] = self._made(number, values, len(images))
            else:
                done = part.steps
                values[done[-1] + 1] = _computed(part, values[part.source])
            for step in done:
                for value in self._done.get(step, ()):
                    values.pop(value, None)
            number = done[-1] + 1
        logits: Tensor = values[self.trace.result]
        return logits

    def _made(self, number: int, values: Mapping[int, Any], count: int) -> Any:
        """What torch makes of a step. Raises UserError where it cannot: nobody has looked at the numbers before."""
        try:
            return self._calls[number](values, count)
        except Exception as error:
            line = printable(" ".join(str(error).split())[:LINE])
            raise UserError(
                f"step {number}, {self.trace.steps[number].operation}, of this network cannot be computed ({line}): "
                "export it again"
            ) from None

    def __repr__(self) -> str:
        return f"MixedNetwork({self.about.get('name', '')}, {self._weights:,} weights)"


def _computed(part: Part, source: Tensor) -> Tensor:
    """Bring the source to (N, C, H, W), run the program, bring what it makes to where the trace has it."""
    channels, height, width = part.run.shape
    rows: tuple[int, ...] = ()
    if part.taken == "last":
        rows = source.shape[1:-1]
        source = source.reshape(len(source), height * width, channels).transpose(1, 2)
    pixels = source.reshape(len(source), channels, height, width).contiguous()
    made = torch.from_numpy(part.run(pixels.numpy()))
    if part.given == "last":
        return made.flatten(2).transpose(1, 2).reshape(len(made), *rows, -1)
    return made.flatten(1) if part.given == "flat" else made


def _parts(trace: Trace, tensors: Mapping[str, Tensor], sizes: Sequence[Any]) -> list[Part]:
    """The longest runs of steps that a graph has a place for, each from one value to one value."""
    found, number = [], 0
    fitting = [_fits(step, tensors) for step in trace.steps]
    last = {value: step for step, one in enumerate(trace.steps) for value in reads(one)}
    last[trace.result] = len(trace.steps)
    while number < len(trace.steps):
        part = None
        if trace.steps[number].operation in BEGINS:
            part = _longest(trace, tensors, sizes, number, fitting, last)
        if part is not None:
            found.append(part)
        number += 1 if part is None else len(part.steps)
    return found


def _longest(
    trace: Trace,
    tensors: Mapping[str, Tensor],
    sizes: Sequence[Any],
    first: int,
    fitting: Sequence[bool],
    last: Mapping[int, int],
) -> Part | None:
    """fitting: may a step stand in a program? last: which step is the last to read a value."""
    source = reads(trace.steps[first])[0] if reads(trace.steps[first]) else None
    if source is None or not isinstance(sizes[source], tuple):
        return None
    taken: Layout = "map" if trace.steps[first].operation != "linear" else "last"
    if len(sizes[source]) == 2:
        taken = "flat"
    if taken == "map" and len(sizes[source]) != 4:
        return None
    failed: int | None = None
    for end in reversed(_ends(trace, source, first, fitting, last)):
        steps = range(first, end)
        if failed is not None and end > failed:
            continue
        try:
            graph, given = lowering.part(trace, tensors, sizes, steps, taken)
        except NoPlace as error:
            failed = error.step
            continue
        return Part(steps, source, taken, compiled(reduced(graph)).finish(), given)
    return None


def _ends(trace: Trace, source: int, first: int, fitting: Sequence[bool], last: Mapping[int, int]) -> list[int]:
    """Where a program that begins with step `first` and reads `source` may end: nothing that it makes on the way is
    read behind it.
    """
    ends, furthest = [], 0
    for number in range(first, len(trace.steps)):
        if not fitting[number] or any(value != source and value <= first for value in reads(trace.steps[number])):
            break
        if furthest <= number:
            ends.append(number + 1)
        furthest = max(furthest, last.get(number + 1, 0))
    return ends


def _fits(step: Step, tensors: Mapping[str, Tensor]) -> bool:
    """Has a program a place for the operation, and are its weights few?"""
    if step.operation not in lowering.KINDS:
        return False
    for name in names(step):
        tensor = tensors[name]
        if tensor.dim() > 1 and int(torch.count_nonzero(tensor)) > DENSE * math.prod(tensor.shape):
            return False
    return True
