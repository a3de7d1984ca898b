"""From a plain torch network to its trace, by torch.export: functional calls, reshapes and attention as they come."""

from __future__ import annotations

import dataclasses
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from sparse_lab.errors import UserError
from sparse_lab.sparsity.images import Shape, full_shape
from sparse_lab.sparsity.scores import evaluating
from sparse_lab.trace import operations
from sparse_lab.trace.trace import TYPES, Batch, Named, Step, Trace, Type, Value, check, leaves, mapped, names, reads

COUNTS = (3, 5)  # images to trace with, where torch does not follow any number of them
FACTORIES = ("new_zeros", "new_ones", "new_full")  # read nothing of a tensor but its type


def captured(model: nn.Module, shape: Shape) -> Trace:
    """The trace of a plain network (images (N, *shape) to logits (N, classes)) in evaluation mode, for any N.

    Raise UserError, in one line, where torch cannot follow its code, and for an operation that a trace has no place
    for.
    """
    images = full_shape(shape)
    try:
        trace = _Capture(_exported(model, images, None), images).trace()
    except _Specialised:
        first, second = (_Capture(_exported(model, images, count), images).trace() for count in COUNTS)
        trace = _merged(first, second)
    try:
        check(trace, {**state_of(trace, model.state_dict()), **trace.constants})
    except ValueError as error:
        raise UserError(f"this network has no export but --to torch: {error}") from None
    return trace


def state_of(trace: Trace, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict that the trace reads. Raise KeyError for one that is not there."""
    return {name: state[name] for name in (*trace.parameters, *trace.buffers)}


class _Specialised(Exception):
    """The network's code asks for the number of images as a plain number (len(x), say)."""


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns, logs and prints whole graphs where it cannot follow a network: ours is one line."""
    torch_log = logging.getLogger("torch")
    level = torch_log.level
    torch_log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch_log.setLevel(level)


def _exported(model: nn.Module, shape: tuple[int, ...], count: int | None) -> ExportedProgram:
    """torch's own trace, without operations in place that others would see. count: of images; None for any."""
    images = torch.zeros(count or COUNTS[0], *shape, dtype=next(model.parameters()).dtype)
    any_number = ({0: Dim.DYNAMIC},) if count is None else None
    try:
        with evaluating(model), torch.no_grad(), _quiet():
            exported = torch.export.export(model, (images,), dynamic_shapes=any_number, strict=False)
            return exported.run_decompositions({}) if _mutates_views(exported.graph) else exported
    except Exception as error:  # it meets whatever the network's own code raises
        why = (str(error).strip() or "no reason given").splitlines()[0]
        if "data-dependent" in str(error):
            why = f"what it does depends on the numbers in an image: {why}"
        elif "specializ" in str(error) and count is None:
            raise _Specialised from None
        raise UserError(f"torch.export cannot follow this network ({why}): export it with --to torch") from None


def _merged(first: Trace, second: Trace) -> Trace:
    """One trace of two for different numbers of images: a number that grows with it is so many times it."""

    def grown(one: Any, other: Any) -> Any:
        if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
            return [grown(*pair) for pair in zip(one, other, strict=True)]
        if one == other:
            return one
        if type(one) is int and type(other) is int and one % COUNTS[0] == 0 and one * COUNTS[1] == other * COUNTS[0]:
            return Batch(one // COUNTS[0])
        raise differs

    differs = UserError(
        "torch.export cannot follow this network (what it does depends on how many images there are): export it with "
        "--to torch"
    )
    steps = [(one.operation, one.arguments.keys()) for one in first.steps]
    alike = [torch.equal(*pair) for pair in zip(first.constants.values(), second.constants.values(), strict=False)]
    if steps != [(one.operation, one.arguments.keys()) for one in second.steps] or not all(alike):
        raise differs
    merged = tuple(
        Step(one.operation, {key: grown(value, other.arguments[key]) for key, value in one.arguments.items()})
        for one, other in zip(first.steps, second.steps, strict=True)
    )
    return dataclasses.replace(first, steps=merged)


def _name(target: Any) -> str:
    """ATen's name of an operation, without what is the same for most."""
    if not isinstance(target, torch._ops.OpOverload):
        return str(target)
    name = target.name().removeprefix("aten::")
    return name.removesuffix(".default")


def _in_place(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def _mutates_views(graph: fx.Graph) -> bool:
    """Is a tensor changed in place that may share its memory with another one that somebody reads?"""
    shared = operations.VIEWS | operations.PASSED | {"<built-in function getitem>"}
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if _in_place(node):
            base = node.args[0]
            before = [reader for reader in base.users if order[reader] < order[node]]
            if _name(base.target) in shared or any(_name(reader.target) in shared for reader in before):
                return True
    return False


class _Capture:
    """A trace in the making: `at` says what each node of torch's graph is: a Value, a Named, or a tensor that no image
    and no weight has a say in.
    """

    def __init__(self, exported: ExportedProgram, shape: tuple[int, ...]) -> None:
        self.graph, self.shape = exported.graph, shape
        self.at: dict[fx.Node, Any] = {}
        self.steps: list[Step] = []
        self.constants: dict[str, Tensor] = {}
        self.kinds: dict[str, list[str]] = {"parameter": [], "buffer": []}
        self.result = -1
        self.batch: Any = None
        self._inputs(exported)
        if any(one.kind is not OutputKind.USER_OUTPUT for one in exported.graph_signature.output_specs):
            raise _unknown("a network that changes its own buffers in evaluation mode")

    def trace(self) -> Trace:
        for node in self.graph.nodes:
            if node.op == "output":
                given = list(leaves(node.args))
                found = self.at.get(given[0]) if len(given) == 1 else None
                if not isinstance(found, Value):
                    raise _unknown("a network that does not give logits, and them alone")
                self.result = found.number
            elif node.op == "call_function":
                self._take(node)
            elif node.op != "placeholder":
                raise _unknown(f"{node.op} {node.target}")
        return self._pruned()

    def _inputs(self, exported: ExportedProgram) -> None:
        nodes = {node.name: node for node in self.graph.nodes if node.op == "placeholder"}
        for spec in exported.graph_signature.input_specs:
            node = nodes[spec.arg.name]
            if spec.kind is InputKind.USER_INPUT:
                self.at[node] = Value(0)
                self.batch = node.meta["val"].shape[0]
            elif spec.kind is InputKind.PARAMETER or (spec.kind is InputKind.BUFFER and spec.persistent):
                assert spec.target is not None
                self.at[node] = Named(spec.target)
                self.kinds["parameter" if spec.kind is InputKind.PARAMETER else "buffer"].append(spec.target)
            else:
                self.at[node] = exported.constants[str(spec.target)].detach()

    def _take(self, node: fx.Node) -> None:
        name = _name(node.target)
        if isinstance(node.meta.get("val"), torch.SymInt | torch.SymBool | int | None) or name in operations.LOOKS:
            return  # a size; whoever reads it knows what it is
        if name == "<built-in function getitem>":
            source, number = node.args
            whole = self.at[source]  # type: ignore[index]
            if isinstance(whole, tuple) and len(whole) == 1 and number == 0:
                self.at[node] = whole[0]
            else:
                self.at[node] = self._put("item", {"values": whole, "number": number})
            return
        if _in_place(node):
            name = name.replace("_.", ".") if "_." in name else name.removesuffix("_")
        arguments = self._arguments(node)
        if name in operations.PASSED or (name in ("to.dtype", "_to_copy") and _same_type(node)):
            if name.endswith("dropout") and arguments.get("train"):
                raise _unknown(f"{name} while training", node)
            made = arguments[next(iter(arguments))]
        elif name in ("batch_norm", "_native_batch_norm_legit_no_training"):
            made = self._batch_norm(name, arguments, node)
        elif name in operations.COPIED:
            made = self._computed("reshape", {"self": arguments["self"], "shape": arguments["size"]})
        elif operations.is_known(name):
            made = self._computed(name, arguments)
        else:
            raise _unknown(str(node.target).removesuffix(".default"), node)
        self.at[node] = made
        while _in_place(node):  # who reads the tensor from here on reads it changed
            node = node.args[0]  # type: ignore[assignment]
            self.at[node] = made

    def _arguments(self, node: fx.Node) -> dict[str, Any]:
        """By name, those left out that are what they are anyway."""
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
            raise _unknown(str(node.target), node)
        schema = node.target._schema.arguments
        given = dict(zip([one.name for one in schema], node.args, strict=False)) | node.kwargs
        defaults = {one.name: one.default_value for one in schema if one.has_default_value()}
        found = {}
        for name, argument in given.items():
            if name in operations.ELSEWHERE or (name in defaults and _same(argument, defaults[name])):
                continue
            found[name] = mapped(argument, lambda leaf: self._leaf(leaf, node))
        return found

    def _leaf(self, leaf: Any, node: fx.Node) -> Any:
        if isinstance(leaf, fx.Node):
            known = leaf.meta.get("val")
            return self._size(known, node) if isinstance(known, torch.SymInt) else self.at.get(leaf, known)
        if isinstance(leaf, torch.SymInt):
            return self._size(leaf, node)
        if isinstance(leaf, torch.dtype):
            name = str(leaf).removeprefix("torch.")
            if name not in TYPES:
                raise _unknown(f"numbers of type {name}", node)
            return Type(name)
        if leaf is None or isinstance(leaf, bool | int | float | str):
            return leaf
        raise _unknown(f"{node.target} of {leaf}", node)

    def _size(self, size: torch.SymInt, node: fx.Node) -> Batch | int:
        times = (size.node.expr / self.batch.node.expr).simplify() if not size.node.expr.is_Integer else None
        if times is None:
            return int(size.node.expr)
        if not times.is_Integer or times <= 0:
            raise _unknown(f"{node.target} with a size that is not a number times that of the batch", node)
        return Batch(int(times))

    def _computed(self, name: str, arguments: dict[str, Any]) -> Any:
        """A step, or its result where nothing but constants goes into it."""
        parts = list(leaves([argument for key, argument in arguments.items()
                             if not (name in FACTORIES and key == "self")]))  # fmt: skip
        if any(isinstance(part, Value | Named | Batch) for part in parts):
            return self._put(name, arguments)
        if name.partition(".")[0] in ("zeros_like", "ones_like", "full_like") and not isinstance(parts[0], Tensor):
            return self._put(name, arguments)
        plain = {key: mapped(argument, _plain) for key, argument in arguments.items()}
        return operations.function(name)(**plain)

    def _batch_norm(self, name: str, arguments: dict[str, Any], node: fx.Node) -> Any:
        if arguments.get("training") or arguments.get("running_mean") is None:
            raise _unknown("batch_norm without running statistics", node)
        renamed = {"running_mean": "mean", "running_var": "variance"}
        kept = {renamed.get(key, key): argument for key, argument in arguments.items()}
        step = {key: kept.get(key) for key in operations.defaults("batch_norm")}
        made = self._put("batch_norm", step)
        return made if name == "batch_norm" else (made,)

    def _put(self, name: str, arguments: dict[str, Any]) -> Value:
        kept = {key: mapped(argument, self._constant) for key, argument in arguments.items()}
        self.steps.append(Step(name, kept))
        return Value(len(self.steps))

    def _constant(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        for name, known in self.constants.items():
            if known.shape == leaf.shape and known.dtype == leaf.dtype and torch.equal(known, leaf):
                return Named(name)
        name = f"constant{len(self.constants)}"
        self.constants[name] = leaf.clone().contiguous()
        return Named(name)

    def _pruned(self) -> Trace:
        """Without the steps and tensors that nothing reads."""
        wanted = {self.result}
        for number in range(len(self.steps), 0, -1):
            if number in wanted:
                wanted |= set(reads(self.steps[number - 1]))
        new = {old: number for number, old in enumerate(sorted(wanted | {0}))}

        def moved(leaf: Any) -> Any:
            return Value(new[leaf.number]) if isinstance(leaf, Value) else leaf

        kept = [step for number, step in enumerate(self.steps, 1) if number in wanted]
        steps = tuple(
            Step(step.operation, {key: mapped(value, moved) for key, value in step.arguments.items()}) for step in kept
        )
        read = {name for step in steps for name in names(step)}
        return Trace(
            self.shape,
            steps,
            new[self.result],
            tuple(name for name in self.kinds["parameter"] if name in read),
            tuple(name for name in self.kinds["buffer"] if name in read),
            {name: tensor for name, tensor in self.constants.items() if name in read},
        )


def _plain(leaf: Any) -> Any:
    if isinstance(leaf, Value | Named):  # of a factory: only its type is asked for
        return torch.empty(0)
    return TYPES[leaf.name] if isinstance(leaf, Type) else leaf


def _same(argument: Any, default: Any) -> bool:
    if isinstance(argument, list | tuple) and isinstance(default, list):
        return list(argument) == default
    return type(argument) is type(default) and argument == default


def _same_type(node: fx.Node) -> bool:
    source = node.args[0]
    return isinstance(source, fx.Node) and source.meta["val"].dtype == node.meta["val"].dtype


def _unknown(what: str, node: fx.Node | None = None) -> UserError:
    stack = (node.meta.get("nn_module_stack") or {}) if node is not None else {}
    path = str(next(reversed(stack.values()))[0]).removeprefix("L['self'].") if stack else ""
    where = f" (in {path})" if path else ""
    return UserError(f"there is no export of {what}{where}: export the network with --to torch")
