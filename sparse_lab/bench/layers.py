"""Single layers under the same masks: in torch, in sparse arithmetic, and in other libraries that know them.

A call takes and gives what torch's own layer would: whatever order its maps have inside counts. Forward and backward
gives the gradients of the input and of the weight. Each candidate is compared with float64 once before it is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_lab.bench.cells import BACKWARD, DENSE, FORWARD, SPARSE, Cell, Entry, Settings, Unavailable
from sparse_lab.bench.opponents import MAKERS
from sparse_lab.bench.patterns import SEED
from sparse_lab.sparse_cpu.engine import SparseArithmetic
from sparse_lab.sparsity.masks import Masks, num_kept

MASK = "erk"  # which in a single layer is random positions
TOLERANCE = 1e-3  # of the largest value: float32 over thousands of products
CHECKED = 16  # images of the batch are compared


@dataclass(frozen=True)
class Kind:
    """A layer and the rows and columns of its maps; features: of a linear one, which has none."""

    inputs: int
    outputs: int
    kernel: int = 1
    size: int = 0
    stride: int = 1

    def __str__(self) -> str:
        if not self.size:
            return f"linear {self.inputs}-{self.outputs}"
        halved = f" / {self.stride}" if self.stride > 1 else ""
        return f"conv {self.inputs}-{self.outputs}, {self.kernel}x{self.kernel}{halved}, {self.size}x{self.size}"

    def build(self) -> nn.Module:
        torch.manual_seed(SEED)
        if not self.size:
            return nn.Linear(self.inputs, self.outputs, bias=False)
        return nn.Conv2d(self.inputs, self.outputs, self.kernel, self.stride, self.kernel // 2, bias=False)

    def shape(self, images: int) -> tuple[int, ...]:
        return (images, self.inputs, *(self.size, self.size)[: 2 * bool(self.size)])


# of VGG16 and of ResNet-34 on 32x32 images, early and late; a linear layer as wide as VGG16's are on ImageNet
KINDS = (
    Kind(64, 64, 3, 32),
    Kind(64, 128, 3, 32, stride=2),
    Kind(256, 256, 3, 8),
    Kind(512, 512, 3, 4),
    Kind(4096, 4096),
)


def kinds(width: float) -> list[Kind]:
    """The layers whose channel counts `width` multiplies."""

    def scaled(channels: int) -> int:
        return max(1, round(channels * width))

    return [replace(kind, inputs=scaled(kind.inputs), outputs=scaled(kind.outputs)) for kind in KINDS]


@dataclass(frozen=True)
class Call:
    """One candidate on one layer. forward: of images; gradient: of the live weights after a backward pass, in any
    order; clear: forget it.
    """

    forward: Callable[[Tensor], Any]
    gradient: Callable[[], Tensor]
    clear: Callable[[], None]

    def step(self, images: Tensor, upstream: Tensor) -> None:
        """Forward and backward; `images` requires a gradient."""
        images.grad = None
        self.clear()
        self.forward(images).backward(upstream)


def entries(kind: Kind, settings: Settings) -> Iterator[Entry]:
    """Forward, and forward and backward, of one layer: dense, and at each sparsity in sparse arithmetic and others."""
    images = torch.randn(kind.shape(settings.batch), generator=torch.Generator().manual_seed(SEED))
    layer = kind.build()
    others = [name for name in settings.against if name in MAKERS and MAKERS[name].knows(layer)]
    candidates = []
    for sparsity in reversed(settings.sparsities):
        masked = cache(partial(_masked, kind, sparsity))
        for name in (SPARSE, *others):
            made = cache(partial(_checked, name, masked, images, f"{kind} at {sparsity:g}%"))
            candidates.append((name, sparsity, made))
    for what in (FORWARD, BACKWARD):
        yield _entry(Cell(str(kind), what, settings.batch, DENSE), images, partial(_dense, layer))
        for name, sparsity, made in candidates:
            yield _entry(Cell(str(kind), what, settings.batch, name, MASK, sparsity), images, made)


def _entry(cell: Cell, images: Tensor, made: Callable[[], Call]) -> Entry:
    def ready() -> Callable[[], object]:
        call = made()
        if cell.what == FORWARD:
            return torch.no_grad()(lambda: call.forward(images))
        moved = images.clone().requires_grad_()
        upstream = torch.randn(call.forward(moved).shape, generator=torch.Generator().manual_seed(SEED))
        return lambda: call.step(moved, upstream)

    return Entry(cell, cache(ready))


def _masked(kind: Kind, sparsity: float) -> nn.Sequential:
    network = nn.Sequential(kind.build())
    masks = Masks(network)
    generator = torch.Generator().manual_seed(SEED)
    for name, one in masks.masks().items():
        mask = torch.zeros(one.numel(), dtype=torch.bool)
        mask[torch.randperm(one.numel(), generator=generator)[: num_kept(sparsity / 100.0, one.numel())]] = True
        masks.set({name: mask.view_as(one)})
    return network


def _dense(layer: nn.Module) -> Call:
    weight = layer.get_parameter("weight")
    return Call(layer, lambda: _there(weight), partial(_forget, weight))


def _sparse(network: nn.Sequential) -> Call:
    arithmetic = SparseArithmetic(network)
    (live,) = arithmetic.live.values()

    def clear() -> None:
        live.gradient = live.weight.grad = None

    def gradient() -> Tensor:
        if live.gradient is None:  # so dense that torch has computed it
            return _there(live.weight)[live.layer.get_buffer("mask")]
        return torch.from_numpy(live.gradient)

    return Call(arithmetic, gradient, clear)


def _other(name: str, layer: nn.Module, shape: tuple[int, ...]) -> Call:
    made = MAKERS[name].make(layer, shape)

    def gradient() -> Tensor:
        return _there(made.values)[made.values.detach() != 0.0]

    return Call(made.forward, gradient, partial(_forget, made.values))


def _there(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def _checked(name: str, masked: Callable[[], nn.Sequential], images: Tensor, where: str) -> Call:
    """Raises Unavailable for an opponent that is not here, fails, or is wrong."""
    network = masked()
    layer, shape = network[0], tuple(images.shape)
    call = _sparse(network) if name == SPARSE else _other(name, layer, shape)
    try:
        wrong = _error(call, layer, images[:CHECKED])
    except Exception as error:  # an opponent's own, whatever it is
        if name == SPARSE:
            raise
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Unavailable(f"{name} fails on {where}, and is not counted there: {line[:160]}") from None
    if not wrong <= TOLERANCE:
        raise Unavailable(
            f"{name} is wrong on {where}, and is not counted there: off by {wrong:.2g} of the largest value"
        )
    return call


def _error(call: Call, layer: nn.Module, images: Tensor) -> float:
    """The largest difference from float64, as a share of the largest value: of the outputs, of the gradient of the
    input and, sorted, of those of the live weights.
    """
    exact = copy.deepcopy(layer).double()
    wanted, moved = images.double().requires_grad_(), images.clone().requires_grad_()
    outputs, found = exact(wanted), call.forward(moved)
    upstream = torch.randn(outputs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
    outputs.backward(upstream)
    call.step(moved, upstream.float())
    mask = layer.get_buffer("mask")
    pairs = (
        (outputs, found),
        (wanted.grad, moved.grad),
        (exact.weight.grad[mask].sort().values, call.gradient().flatten().sort().values),  # type: ignore[union-attr,index]
    )
    return max(float(((one - other).abs().max() / one.abs().max()).detach()) for one, other in pairs)  # type: ignore[operator,union-attr]
