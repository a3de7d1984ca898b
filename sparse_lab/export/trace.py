"""From a plain torch network to its graph: traced symbolically, batch norms folded in float64."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from sparse_lab.errors import UserError
from sparse_lab.export.graph import Activation, AveragePool, Conv, Graph, Map, MaxPool, Node, Pair, windows
from sparse_lab.sparsity.images import Shape, full_shape

NOTHING = np.zeros(0, dtype=np.int64)


def traced(model: nn.Module, shape: Shape) -> Graph:
    """The graph of a plain network (images (N, *shape) to logits) in evaluation mode, all channels kept, weights that
    are zero left out.

    Raises UserError, in one line, for a layer or an operation that a graph has no place for.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        symbolic = fx.symbolic_trace(model.eval())
    except Exception as error:  # fx meets whatever the network's own code raises
        raise UserError(f"this network cannot be traced ({type(error).__name__}): export it with --to torch") from None
    finally:
        for module, mode in modes.items():
            module.training = mode
    building = _Building(*full_shape(shape))
    with torch.no_grad():
        for step in symbolic.graph.nodes:
            building.take(step, model)
    return building.graph()


class _Building:
    """A graph in the making: `at` says which map each step of the trace is. A map that is not `shared` by several
    readers may still take a batch norm, an addend or an activation into the convolution that makes it."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        self.maps = [_map(channels, height, width)]
        self.nodes: list[Node] = []
        self.at: dict[fx.Node, int] = {}
        self.shared: set[int] = set()

    def take(self, step: fx.Node, model: nn.Module) -> None:
        if step.op == "placeholder":
            number = 0
        elif step.op == "output":
            return
        elif step.op == "call_module":
            number = self._module(model.get_submodule(str(step.target)), step)
        elif step.target in (operator.add, operator.iadd, torch.add):
            number = self._add(step)
        elif step.target is torch.flatten:
            number = self._source(step)
        else:
            raise _unknown(str(step.target))
        self.at[step] = number
        if len(step.users) > 1:
            self.shared.add(number)

    def graph(self) -> Graph:
        if self.maps[-1].size != (1, 1):
            raise UserError("this network does not end in one number a class: export it with --to torch")
        if not isinstance(self.nodes[-1], Conv):
            self._identity(len(self.maps) - 1)
        return Graph(tuple(self.maps), tuple(self.nodes))

    def _source(self, step: fx.Node) -> int:
        return self.at[step.args[0]]  # type: ignore[index]

    def _module(self, module: nn.Module, step: fx.Node) -> int:
        source = self._source(step)
        if isinstance(module, nn.Identity | nn.Dropout | nn.Flatten):
            return source
        for kind, take in _KINDS.items():
            if type(module) is kind:
                return take(self, module, source)
        raise _unknown(type(module).__name__)

    def _put(self, node: Node, made: Map) -> int:
        self.nodes.append(node)
        self.maps.append(made)
        return len(self.maps) - 1

    def _conv(self, module: nn.Conv2d, source: int) -> int:
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise _unknown(f"{type(module).__name__} with padding {module.padding!r}, {module.padding_mode}")
        depthwise = 1 < module.groups == module.in_channels == module.out_channels
        weight = module.weight.double()
        if module.groups > 1 and not depthwise:
            weight = _ungrouped(weight, module.groups)
        kernel, stride, padding, dilation = map(
            _pair, (module.kernel_size, module.stride, module.padding, module.dilation)
        )
        return self._weighted(source, weight, module.bias, kernel, stride, padding, dilation, depthwise)

    def _linear(self, module: nn.Linear, source: int) -> int:
        """A flattened map is read whole: one kernel position a pixel."""
        height, width = self.maps[source].size
        weight = module.weight.double().view(module.out_features, -1, height, width)
        return self._weighted(source, weight, module.bias, (height, width), (1, 1), (0, 0), (1, 1))

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

    def _batch_norm(self, module: nn.BatchNorm2d, source: int) -> int:
        if module.running_mean is None or module.running_var is None:
            raise _unknown("BatchNorm2d without running statistics")
        mean, variance = module.running_mean.double(), module.running_var.double()
        ones = torch.ones_like(mean)
        gain = ones if module.weight is None else module.weight.double()
        shift = torch.zeros_like(mean) if module.bias is None else module.bias.double()
        scale = (gain / (variance + module.eps).sqrt()).numpy()
        number, node = self._open(source, bare=True)
        inputs = 1 if node.depthwise else self.maps[node.source].full
        values = node.values * scale[node.positions // (inputs * node.kernel[0] * node.kernel[1])]
        kept = np.flatnonzero(values)
        bias = (node.bias - mean.numpy()) * scale + shift.numpy()
        self.nodes[number - 1] = dataclasses.replace(
            node, positions=node.positions[kept], values=values[kept], bias=bias
        )
        return number

    def _activate(self, activation: Activation, source: int) -> int:
        number, node = self._open(source)
        self.nodes[number - 1] = dataclasses.replace(node, activation=activation)
        return number

    def _add(self, step: fx.Node) -> int:
        first, second = (self.at.get(argument) for argument in step.args)  # type: ignore[arg-type]
        if first is None or second is None or first == second or step.kwargs:
            raise _unknown("an addition of something else than two different feature maps")
        earlier, later = sorted((first, second))
        if self.maps[earlier].size != self.maps[later].size or self.maps[earlier].full != self.maps[later].full:
            raise _unknown("an addition of feature maps of different shapes")
        number, node = self._open(later, bare=True)
        self.nodes[number - 1] = dataclasses.replace(node, residual=earlier)
        return number

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

    def _max_pool(self, module: nn.MaxPool2d, source: int) -> int:
        if module.ceil_mode or module.return_indices or _pair(module.dilation) != (1, 1):
            raise _unknown("MaxPool2d with ceil_mode, indices or dilation")
        kernel, stride, padding = _pair(module.kernel_size), _pair(module.stride), _pair(module.padding)
        before = self.maps[source]
        made = _map(before.full, *windows(before.size, kernel, stride, padding, (1, 1)))
        return self._put(MaxPool(source, kernel, stride, padding), made)

    def _average_pool(self, module: nn.AdaptiveAvgPool2d, source: int) -> int:
        before, wanted = self.maps[source], _pair(module.output_size)
        if wanted == before.size:
            return source
        return self._put(AveragePool(source), _map(before.full, *wanted))


_KINDS: dict[type[nn.Module], Callable[[_Building, Any, int], int]] = {
    nn.Conv2d: _Building._conv,
    nn.Linear: _Building._linear,
    nn.BatchNorm2d: _Building._batch_norm,
    nn.ReLU: lambda building, module, source: building._activate("relu", source),
    nn.ReLU6: lambda building, module, source: building._activate("relu6", source),
    nn.MaxPool2d: _Building._max_pool,
    nn.AdaptiveAvgPool2d: _Building._average_pool,
}


def _map(channels: int, height: int, width: int) -> Map:
    return Map(np.arange(channels), channels, height, width)


def _pair(value: Any) -> Pair:
    first, second = (value, value) if isinstance(value, int) else value
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


def _unknown(what: str) -> UserError:
    return UserError(f"there is no export of {what}: export the network with --to torch")
