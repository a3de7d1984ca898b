"""From a trace to a graph, where convolutions, pools, additions and ReLUs are all there is; batch norms are folded in
float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sparse_lab.errors import UserError
from sparse_lab.export.graph import Activation, AveragePool, Conv, Graph, Map, MaxPool, Node, Pair, windows
from sparse_lab.sparsity.images import Shape
from sparse_lab.trace.capture import captured, state_of
from sparse_lab.trace.trace import Named, Step, Trace, Value, reads, shapes

NOTHING = np.zeros(0, dtype=np.int64)
# how a value's numbers lie on its map (C, H, W): (N, C, H, W), (N, C * H * W), or channels last (N, ..., C)
Layout = Literal["map", "flat", "last"]
Lowered = tuple[Graph, Layout]


class NoPlace(ValueError):
    """A step that a graph has no place for: which, and why. step: its number, where it is known."""

    step: int | None = None


def traced(model: nn.Module, shape: Shape) -> Graph:
    """The graph of a plain network (images (N, *shape) to logits) in evaluation mode, all channels kept, weights that
    are zero left out.

    Raises UserError, in one line, for a layer or an operation that a graph has no place for.
    """
    trace = captured(model, shape)
    try:
        return lowered(trace, {**state_of(trace, model.state_dict()), **trace.constants})
    except NoPlace as error:
        raise UserError(f"there is no graph of {error}") from None


def lowered(trace: Trace, tensors: Mapping[str, Tensor]) -> Graph:
    """The graph of a whole network. Raises NoPlace, which names the step, for a network that has none."""
    sizes = shapes(trace, tensors, 2)
    graph, layout = part(trace, tensors, sizes, range(len(trace.steps)), "map")
    if layout == "last" or graph.maps[-1].size != (1, 1):
        raise NoPlace("a network that does not end in one number a class")
    return graph


def part(trace: Trace, tensors: Mapping[str, Tensor], sizes: Sequence[Any], steps: range, layout: Layout) -> Lowered:
    """The graph of some steps in a row, all of which follow from one value, which lies as `layout`; and how what the
    last of them makes lies. sizes: the values' shapes for two images. Raises NoPlace as `lowered`.
    """
    source = next(value for value in reads(trace.steps[steps[0]]))
    building = _Building(trace, tensors, sizes, steps)
    building.begin(source, layout)
    with torch.no_grad():
        for number in steps:
            try:
                building.take(number)
            except NoPlace as error:
                error.step = number
                raise
    return building.graph(steps[-1] + 1)


class _Building:
    """A graph in the making: `at` says which map each value is, and how it lies on it. A map that is not `shared` by
    several readers may still take a batch norm, an addend or an activation into the convolution that makes it.
    """

    def __init__(self, trace: Trace, tensors: Mapping[str, Tensor], sizes: Sequence[Any], steps: range) -> None:
        self.trace, self.tensors, self.sizes = trace, tensors, sizes
        self.maps: list[Map] = []
        self.nodes: list[Node] = []
        self.at: dict[int, tuple[int, Layout]] = {}
        self.shared: set[int] = set()
        self.readers = Counter(value for number in steps for value in reads(trace.steps[number]))

    def begin(self, source: int, layout: Layout) -> None:
        size = self.sizes[source][1:]
        if layout == "map":
            self.maps = [_map(*size)]
        elif layout == "flat":
            self.maps = [_map(size[0], 1, 1)]
        else:
            self.maps = [_map(size[-1], 1, math.prod(size[:-1]))]
        self.at[source] = 0, layout
        if self.readers[source] > 1:
            self.shared.add(0)

    def take(self, number: int) -> None:
        step, value = self.trace.steps[number], number + 1
        take = KINDS.get(step.operation)
        if take is None:
            raise NoPlace(step.operation)
        made, layout = take(self, step, value)
        self.at[value] = made, layout
        size = tuple(self.sizes[value][1:])
        if self._size(made, layout) != (size if layout != "last" else (math.prod(size[:-1]), size[-1])):
            raise NoPlace(f"{step.operation} that makes {self.sizes[value]}")
        if self.readers[value] > 1:
            self.shared.add(made)

    def graph(self, result: int) -> Lowered:
        """A convolution makes the last map: it gives what does not depend on the image, too."""
        number, layout = self.at[result]
        if number != len(self.maps) - 1 or not self.nodes or not isinstance(self.nodes[-1], Conv):
            self._identity(number)
        return Graph(tuple(self.maps), tuple(self.nodes)), layout

    def _size(self, number: int, layout: Layout) -> tuple[int, ...]:
        of = self.maps[number]
        if layout == "map":
            return of.full, *of.size
        return (of.full * of.height * of.width,) if layout == "flat" else (of.width, of.full)

    def _source(self, step: Step, name: str = "self") -> tuple[int, Layout]:
        value = step[name]
        if not isinstance(value, Value) or value.number not in self.at:
            raise NoPlace(f"{step.operation} of a constant")
        return self.at[value.number]

    def _on_map(self, step: Step, name: str = "self") -> int:
        """The map of what a step reads, which lies channels first."""
        number, layout = self._source(step, name)
        if layout == "map" or (layout == "flat" and self.maps[number].size == (1, 1)):
            return number
        raise NoPlace(f"{step.operation} of numbers that do not lie as a feature map")

    def _tensor(self, step: Step, name: str) -> Tensor | None:
        named = step[name]
        if named is None:
            return None
        if not isinstance(named, Named):
            raise NoPlace(f"{step.operation} with a computed {name}")
        return self.tensors[named.name].double()

    def _weight(self, step: Step) -> Tensor:
        weight = self._tensor(step, "weight")
        assert weight is not None
        return weight

    def _put(self, node: Node, made: Map) -> int:
        self.nodes.append(node)
        self.maps.append(made)
        return len(self.maps) - 1

    def _conv(self, step: Step, value: int) -> tuple[int, Layout]:
        weight = self._weight(step)
        source = self._on_map(step, "input")
        groups = step["groups"]
        depthwise = 1 < groups == self.maps[source].full == len(weight)
        if groups > 1 and not depthwise:
            weight = _ungrouped(weight, groups)
        stride, padding, dilation = (_pair(step[name]) for name in ("stride", "padding", "dilation"))
        kernel = _pair(list(weight.shape[2:]))
        made = self._weighted(source, weight, self._tensor(step, "bias"), kernel, stride, padding, dilation, depthwise)
        return made, "map"

    def _linear(self, step: Step, value: int) -> tuple[int, Layout]:
        """A flattened map is read whole: one kernel position a pixel. Channels that lie last are read pixel by pixel.

        So is a map that has one pixel.
        """
        source, layout = self._source(step, "input")
        weight, bias = self._weight(step), self._tensor(step, "bias")
        if layout == "map":
            raise NoPlace("linear along the rows of a feature map")
        kernel = self.maps[source].size if layout == "flat" else (1, 1)
        weight = weight.view(len(weight), -1, *kernel)
        return self._weighted(source, weight, bias, kernel, (1, 1), (0, 0), (1, 1)), layout

    def _weighted(
        self,
        source: int,
        weight: Tensor,
        bias: Tensor | None,
        kernel: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        depthwise: bool = False,
    ) -> int:
        made = _map(len(weight), *windows(self.maps[source].size, kernel, stride, padding, dilation))
        flat = weight.flatten().numpy()
        seen = _seen(self.maps[source].size, made.size, kernel, stride, padding, dilation)
        positions = np.flatnonzero((weight.numpy() != 0) & seen)
        shift = np.zeros(len(weight)) if bias is None else bias.double().numpy().copy()
        empty = np.zeros((0, *made.size))
        node = Conv(
            source,
            kernel,
            stride,
            padding,
            dilation,
            depthwise,
            positions,
            flat[positions],
            shift,
            varying=NOTHING,
            maps=empty,
        )
        return self._put(node, made)

    def _batch_norm(self, step: Step, value: int) -> tuple[int, Layout]:
        mean, variance = self._tensor(step, "mean"), self._tensor(step, "variance")
        assert mean is not None and variance is not None
        gain, shift = self._tensor(step, "weight"), self._tensor(step, "bias")
        scale = (torch.ones_like(mean) if gain is None else gain) / (variance + step["eps"]).sqrt()
        shift = torch.zeros_like(mean) if shift is None else shift
        return self._scaled(self._on_map(step, "input"), scale, shift, mean)

    def _affine(self, step: Step, value: int) -> tuple[int, Layout]:
        shift = self._tensor(step, "bias")
        assert shift is not None
        return self._scaled(self._on_map(step, "input"), self._weight(step), shift, torch.zeros_like(shift))

    def _scaled(self, source: int, scale: Tensor, shift: Tensor, mean: Tensor) -> tuple[int, Layout]:
        """scale * (x - mean) + shift, a number a channel."""
        factors = scale.numpy()
        number, node = self._open(source, bare=True)
        inputs = 1 if node.depthwise else self.maps[node.source].full
        values = node.values * factors[node.positions // (inputs * node.kernel[0] * node.kernel[1])]
        kept = np.flatnonzero(values)
        bias = (node.bias - mean.numpy()) * factors + shift.numpy()
        self.nodes[number - 1] = dataclasses.replace(
            node, positions=node.positions[kept], values=values[kept], bias=bias
        )
        return number, "map"

    def _activate(self, step: Step, value: int) -> tuple[int, Layout]:
        source, layout = self._source(step)
        number, node = self._open(source)
        self.nodes[number - 1] = dataclasses.replace(node, activation=_activation(step))
        return number, layout

    def _add(self, step: Step, value: int) -> tuple[int, Layout]:
        (first, layout), (second, other) = self._source(step), self._source(step, "other")
        if first == second or layout != other or step["alpha"] != 1:
            raise NoPlace("an addition of something else than two different feature maps")
        earlier, later = sorted((first, second))
        if self.maps[earlier].size != self.maps[later].size or self.maps[earlier].full != self.maps[later].full:
            raise NoPlace("an addition of feature maps of different shapes")
        number, node = self._open(later, bare=True)
        self.nodes[number - 1] = dataclasses.replace(node, residual=earlier)
        return number, layout

    def _open(self, source: int, bare: bool = False) -> tuple[int, Conv]:
        """The convolution that makes `source` and can take in what follows it (`bare`: that adds nothing yet); an
        identity behind `source` where there is none."""
        if source > 0 and source not in self.shared:
            node = self.nodes[source - 1]
            if isinstance(node, Conv) and node.activation == "none" and not (bare and node.residual is not None):
                return source, node
        return self._identity(source)

    def _identity(self, source: int) -> tuple[int, Conv]:
        ones = torch.ones(self.maps[source].full, 1, 1, 1, dtype=torch.float64)
        number = self._weighted(source, ones, None, (1, 1), (1, 1), (0, 0), (1, 1), depthwise=True)
        return number, self.nodes[number - 1]  # type: ignore[return-value]

    def _max_pool(self, step: Step, value: int) -> tuple[int, Layout]:
        if step["ceil_mode"] or _pair(step["dilation"]) != (1, 1):
            raise NoPlace("max_pool2d with ceil_mode or dilation")
        kernel, padding = _pair(step["kernel_size"]), _pair(step["padding"])
        stride = _pair(step["stride"] or step["kernel_size"])
        source = self._on_map(step)
        before = self.maps[source]
        made = _map(before.full, *windows(before.size, kernel, stride, padding, (1, 1)))
        return self._put(MaxPool(source, kernel, stride, padding), made), "map"

    def _average_windows(self, step: Step, value: int) -> tuple[int, Layout]:
        """A convolution of each channel by itself, whose weights are all the same."""
        kernel, padding = _pair(step["kernel_size"]), _pair(step["padding"])
        if step["ceil_mode"] or step["divisor_override"] or (any(padding) and not step["count_include_pad"]):
            raise NoPlace("avg_pool2d with ceil_mode, a divisor of its own, or padding that does not count")
        source = self._on_map(step)
        share = torch.full((self.maps[source].full, 1, *kernel), 1.0 / math.prod(kernel), dtype=torch.float64)
        stride = _pair(step["stride"] or step["kernel_size"])
        return self._weighted(source, share, None, kernel, stride, padding, (1, 1), depthwise=True), "map"

    def _average_pool(self, step: Step, value: int) -> tuple[int, Layout]:
        return self._averaged(self._on_map(step), _pair(step["output_size"])), "map"

    def _mean(self, step: Step, value: int) -> tuple[int, Layout]:
        dims = sorted(dim % 4 for dim in step["dim"] or ())
        source, layout = self._source(step)
        if layout != "map" or dims != [2, 3] or step["dtype"] is not None:
            raise NoPlace("a mean over something else than a feature map")
        return self._averaged(source, (1, 1)), "map" if step["keepdim"] else "flat"

    def _averaged(self, source: int, wanted: Pair) -> int:
        before = self.maps[source]
        return source if wanted == before.size else self._put(AveragePool(source), _map(before.full, *wanted))

    def _flatten(self, step: Step, value: int) -> tuple[int, Layout]:
        """To one row of numbers an image, or the other way round where there is one pixel."""
        source, layout = self._source(step)
        size = tuple(self.sizes[value][1:])
        if layout != "last" and self._size(source, "flat") == size:
            return source, "flat"
        if self._size(source, "map") == size and (layout == "map" or self.maps[source].size == (1, 1)):
            return source, "map"
        raise NoPlace(f"{step.operation} to {size}")


KINDS: dict[str, Any] = {
    "conv2d": _Building._conv,
    "linear": _Building._linear,
    "batch_norm": _Building._batch_norm,
    "channel_affine": _Building._affine,
    "relu": _Building._activate,
    "relu6": _Building._activate,
    "hardtanh": _Building._activate,
    "clamp": _Building._activate,
    "clamp_min": _Building._activate,
    "add.Tensor": _Building._add,
    "max_pool2d": _Building._max_pool,
    "avg_pool2d": _Building._average_windows,
    "adaptive_avg_pool2d": _Building._average_pool,
    "mean.dim": _Building._mean,
    "flatten.using_ints": _Building._flatten,
    "reshape": _Building._flatten,
    "squeeze.dims": _Building._flatten,
    "squeeze.dim": _Building._flatten,
    "squeeze": _Building._flatten,
}


def _activation(step: Step) -> Activation:
    if step.operation in ("relu", "relu6"):
        return step.operation  # type: ignore[return-value]
    low, high = ("min_val", "max_val") if step.operation == "hardtanh" else ("min", "max")
    bounds = step[low], None if step.operation == "clamp_min" else step[high]
    if bounds[0] == 0 and bounds[1] in (None, 6):
        return "relu" if bounds[1] is None else "relu6"
    raise NoPlace(f"{step.operation} between {bounds[0]} and {bounds[1]}")


def _map(channels: int, height: int, width: int) -> Map:
    return Map(np.arange(channels), channels, height, width)


def _pair(value: Any) -> Pair:
    if isinstance(value, str):
        raise NoPlace(f"conv2d with padding {value!r}")
    first, second = (value, value) if isinstance(value, int) else value if len(value) == 2 else (*value, *value)
    return int(first), int(second)


def _seen(size: Pair, made: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> np.ndarray:
    """Bool, of the kernel's shape: False for a position that only ever meets padding."""

    def side_of(side: int) -> np.ndarray:
        taps = np.arange(kernel[side])[:, None] * dilation[side] - padding[side]
        pixels = taps + np.arange(made[side]) * stride[side]
        return np.asarray(((pixels >= 0) & (pixels < size[side])).any(1))

    return side_of(0)[:, None] & side_of(1)


def _ungrouped(weight: Tensor, groups: int) -> Tensor:
    """[out, in / groups, ...] -> [out, in, ...] with zeros outside the groups."""
    outputs, inputs, *kernel = weight.shape
    whole = weight.new_zeros(groups, outputs // groups, groups, inputs, *kernel)
    for group, part in enumerate(weight.view(groups, outputs // groups, inputs, *kernel)):
        whole[group, :, group] = part
    return whole.view(outputs, groups * inputs, *kernel)
