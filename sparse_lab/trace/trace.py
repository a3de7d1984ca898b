"""A trace: the steps from images to logits as plain data, checked, and run by torch without the network's class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_lab.trace import operations

MOST = 2**28  # numbers of one result for one image: what asks for more is no network's
MOST_OF_ALL = 2**30  # of all results for one image
MOST_PIECES = 2**12  # that a step cuts a value into

WEIGHTED = ("conv1d", "conv2d", "conv3d", "linear")  # whose weight [out, ...] has a sum of products for each output


@dataclass(frozen=True)
class Value:
    """A result: 0 is the images, k + 1 what step k makes."""

    number: int


@dataclass(frozen=True)
class Named:
    """A weight, a buffer or a constant."""

    name: str


@dataclass(frozen=True)
class Batch:
    """So many times the number of images."""

    times: int


@dataclass(frozen=True)
class Type:
    """The type of numbers; float32 stands for the images' own type, whichever that is."""

    name: str


@dataclass(frozen=True)
class Step:
    """One operation (a name of `operations`); `arguments` by name, those left out that are what they are anyway:
    numbers, text, None, lists, Value, Named, Batch, Type.
    """

    operation: str
    arguments: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        found = self.arguments.get(name, self)
        return operations.defaults(self.operation)[name] if found is self else found


@dataclass(frozen=True)
class Trace:
    """images: (C, H, W) of an image. parameters, buffers: names in the network's state dict. constants: what else the
    steps read, by name. result: which value the logits (N, classes) are.
    """

    images: tuple[int, ...]
    steps: tuple[Step, ...]
    result: int
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    constants: Mapping[str, Tensor]


TYPES = {name: getattr(torch, name) for name in ("float32", "float64", "int64", "int32", "uint8", "bool")}


def leaves(argument: Any) -> Iterator[Any]:
    """What an argument is made of, in order."""
    if isinstance(argument, list | tuple):
        for one in argument:
            yield from leaves(one)
    else:
        yield argument


def mapped(argument: Any, change: Callable[[Any], Any]) -> Any:
    """The argument with each of its leaves changed."""
    return [mapped(one, change) for one in argument] if isinstance(argument, list | tuple) else change(argument)


def reads(step: Step) -> list[int]:
    """The values that a step reads."""
    return [leaf.number for leaf in leaves(list(step.arguments.values())) if isinstance(leaf, Value)]


def names(step: Step) -> list[str]:
    """The tensors that a step reads by name."""
    return [leaf.name for leaf in leaves(list(step.arguments.values())) if isinstance(leaf, Named)]


def last_reads(trace: Trace) -> dict[int, list[int]]:
    """Step -> the values that nobody reads after it."""
    last = {value: number for number, step in enumerate(trace.steps) for value in reads(step)}
    found: dict[int, list[int]] = {}
    for value, number in last.items():
        if value != trace.result:
            found.setdefault(number, []).append(value)
    return found


Call = Callable[[Mapping[int, Any], int], Any]


def prepared(step: Step, tensors: Mapping[str, Tensor], real: torch.dtype, device: str | None = None) -> Call:
    """What computes a step from the values before it and the number of images; `real` is the type of their numbers.
    device: of what reads no tensor, where it is not torch's usual one.
    """
    function = operations.function(step.operation)
    fixed: dict[str, Any] = {}
    if device is not None and "device" in operations.defaults(step.operation):
        fixed["device"] = torch.device(device)
    moving: dict[str, Any] = {}
    for name, argument in step.arguments.items():
        moves = any(isinstance(leaf, Value | Batch) for leaf in leaves(argument))
        known = mapped(argument, lambda leaf: _known(leaf, tensors, real))
        (moving if moves else fixed)[name] = known

    def call(values: Mapping[int, Any], count: int) -> Any:
        def resolved(leaf: Any) -> Any:
            if isinstance(leaf, Value):
                return values[leaf.number]
            return count * leaf.times if isinstance(leaf, Batch) else leaf

        return function(**fixed, **{name: mapped(argument, resolved) for name, argument in moving.items()})

    return call


def _known(leaf: Any, tensors: Mapping[str, Tensor], real: torch.dtype) -> Any:
    """What does not change from one batch to the next."""
    if isinstance(leaf, Named):
        return tensors[leaf.name]
    if isinstance(leaf, Type):
        return real if leaf.name == "float32" else TYPES[leaf.name]
    return leaf


def perform(step: Step, values: Mapping[int, Any], tensors: Mapping[str, Tensor], count: int, real: torch.dtype) -> Any:
    """What a step makes of `values`, for `count` images whose numbers are of type `real`."""
    return prepared(step, tensors, real)(values, count)


def evaluate(trace: Trace, tensors: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Logits (N, classes) of images (N, C, H, W), by torch's dense operations, in the type of images and tensors."""
    values: dict[int, Any] = {0: images}
    done = last_reads(trace)
    for number, step in enumerate(trace.steps):
        values[number + 1] = perform(step, values, tensors, images.shape[0], images.dtype)
        for value in done.get(number, ()):
            del values[value]
    logits: Tensor = values[trace.result]
    return logits


def shapes(trace: Trace, tensors: Mapping[str, Tensor], count: int) -> list[Any]:
    """The shape of every value for `count` images (a list of shapes where a step makes several), nothing computed.

    Raise ValueError where the trace contradicts itself, names an operation that is not listed, or makes something
    huge.
    """
    real = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
    hollow = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    values: dict[int, Any] = {0: torch.empty(count, *trace.images, dtype=real, device="meta")}
    made = 0
    for number, step in enumerate(trace.steps):
        if not operations.is_known(step.operation):
            raise ValueError(f"step {number}: no operation {str(step.operation)[:40]!r}")
        if step.operation == "scaled_dot_product_attention" and step["dropout_p"]:
            raise ValueError(f"step {number} draws at random")
        try:
            values[number + 1] = _on_meta(step, values, hollow, count, real)
        except Exception as error:  # torch raises many kinds for arguments that do not fit
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"step {number}, {step.operation}, does not fit what it reads ({line})") from None
        sizes = [one.numel() for one in leaves(values[number + 1])]
        made += sum(sizes)
        if max(sizes, default=0) > MOST * count or made > MOST_OF_ALL * count:
            raise ValueError(f"step {number}, {step.operation}, makes more than {MOST:,} numbers")
    return [mapped(values[number], lambda one: tuple(one.shape)) for number in range(len(trace.steps) + 1)]


def _on_meta(step: Step, values: Mapping[int, Any], hollow: Mapping[str, Tensor], count: int, real: torch.dtype) -> Any:
    with torch.device("meta"), torch.no_grad():
        if step.operation in PIECES:
            _check_pieces(step, _resolved(step["self"], values, hollow))
        made = prepared(step, hollow, real, "meta")(values, count)
    if not all(isinstance(one, Tensor) and one.device.type == "meta" for one in leaves(made)):
        raise ValueError("it makes no tensor")
    return made


def _resolved(leaf: Any, values: Mapping[int, Any], tensors: Mapping[str, Tensor]) -> Any:
    return values[leaf.number] if isinstance(leaf, Value) else tensors[leaf.name] if isinstance(leaf, Named) else leaf


# operations that cut a value into pieces -> how many, of so many rows
PIECES: dict[str, Callable[[Step, int], float]] = {
    "unbind.int": lambda step, rows: rows,
    "split.Tensor": lambda step, rows: rows / max(1, step["split_size"]),
    "chunk": lambda step, rows: step["chunks"],
    "tensor_split.sections": lambda step, rows: step["sections"],
}


def _check_pieces(step: Step, whole: Tensor) -> None:
    if PIECES[step.operation](step, whole.shape[step["dim"]]) > MOST_PIECES:
        raise ValueError(f"it makes more than {MOST_PIECES:,} pieces")


def check(trace: Trace, tensors: Mapping[str, Tensor]) -> int:
    """How many classes the logits have. Raise ValueError as `shapes`, and where no logits (N, classes) come out."""
    if not 0 <= trace.result <= len(trace.steps):
        raise ValueError(f"there is no value {trace.result}")
    for count in (2, 3):
        shape = shapes(trace, tensors, count)[trace.result]
        if len(shape) != 2 or shape[0] != count:
            raise ValueError(f"{count} images give {shape}, not one row of numbers an image")
    return int(shape[1])


def numbers_of(trace: Trace, tensors: Mapping[str, Tensor]) -> int:
    """How many numbers all values of one image have together."""
    made = (value if isinstance(value, list) else [value] for value in shapes(trace, tensors, 1))
    return sum(math.prod(size) for sizes in made for size in sizes)


def weight_names(trace: Trace) -> set[str]:
    """The tensors that convolutions and linear layers multiply by."""
    weights = [step.arguments.get("weight") for step in trace.steps if step.operation in WEIGHTED]
    return {weight.name for weight in weights if isinstance(weight, Named)}


def multiply_adds(trace: Trace, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Multiplications of one image by a weight of a convolution or a linear layer: by all of them, and by those that
    are not zero. Padding counts as real.
    """
    dense = live = 0
    sizes = shapes(trace, tensors, 1)
    for number, step in enumerate(trace.steps):
        weight = step.arguments.get("weight")
        if step.operation in WEIGHTED and isinstance(weight, Named):
            numbers = tensors[weight.name]
            uses = math.prod(sizes[number + 1]) // len(numbers)
            dense += uses * numbers.numel()
            live += uses * int(torch.count_nonzero(numbers))
    return dense, live


class TracedNetwork(nn.Module):
    """A trace with its tensors as a module: images (N, C, H, W) to logits (N, classes)."""

    def __init__(self, trace: Trace, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.trace = trace
        self._places = {name: f"tensor{number}" for number, name in enumerate(tensors)}
        for name, place in self._places.items():
            if name in trace.parameters:
                self.register_parameter(place, nn.Parameter(tensors[name].detach(), requires_grad=False))
            else:
                self.register_buffer(place, tensors[name].detach())

    def tensors(self) -> dict[str, Tensor]:
        """By the names that they have in the trace."""
        return {name: getattr(self, place) for name, place in self._places.items()}

    def forward(self, images: Tensor) -> Tensor:
        return evaluate(self.trace, self.tensors(), images)
