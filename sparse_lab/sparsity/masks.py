"""Masks: a bool buffer beside each counted weight, and the promise that what is masked is zero.

Counted are the weights of convolutions and linear layers. Biases and BatchNorm stay dense and are not counted, and
neither is anything inside a module that says `counted = False` (a dynamic activation's own layers) or a layer that was
left out by `choose` (it says `excluded`).

A weight that several places of the network share (a module whose `shares` names the layer that lends it) exists once
and has one mask. Sparsity is a share of `total`, the weights of the network before sharing: each use counts there.
Layers that are tied by one Parameter are one layer, under the first one's name: that network never had more weights.

What is not counted though it may be large (embeddings, recurrent layers, transposed convolutions, what attention packs
together, Parameters of a module's own) is named once a network.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn

from sparse_lab.errors import SparseLabError, nearest

COUNTING = "conv and linear weights; biases and BatchNorm are dense and not counted"
COUNTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMALISATION = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
NAMED = 8  # of what is not counted, in one line
_told: WeakSet[nn.Module] = WeakSet()

Counted = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


def layers(model: nn.Module) -> dict[str, Counted]:
    """The layers whose weights are counted, by name, in the model's own order; of those that are tied the first."""
    return {name: tied[0] for name, tied in tied_layers(model).items()}


def tied_layers(model: nn.Module) -> dict[str, list[Counted]]:
    """The layers as `layers` names them, each with those that are tied to it by one Parameter behind it."""
    return {name: tied.layers for name, tied in maskable(model).items() if not is_excluded(tied.layers[0])}


def excluded_layers(model: nn.Module) -> dict[str, list[Counted]]:
    """The layers that could be counted and were left out, in the same way."""
    return {name: tied.layers for name, tied in maskable(model).items() if is_excluded(tied.layers[0])}


def is_excluded(layer: nn.Module) -> bool:
    return getattr(layer, "excluded", False)


class Tied(NamedTuple):
    """Layers that are one by their Parameter; mostly a single one."""

    names: list[str]
    layers: list[Counted]


def maskable(model: nn.Module) -> dict[str, Tied]:
    """The layers that masks could be for, counted or left out, by the first name of each, in the model's own order."""
    apart = _not_counted(model)
    found: dict[int, Tied] = {}
    for name, module in model.named_modules():
        if isinstance(module, COUNTED) and module not in apart:
            # a weight that is computed from others is another tensor each time it is asked for
            weight = module._parameters.get("weight")
            tied = found.setdefault(id(module if weight is None else weight), Tied([], []))
            tied.names.append(name)
            tied.layers.append(module)
    return {tied.names[0]: tied for tied in found.values()}


def _not_counted(model: nn.Module) -> set[nn.Module]:
    """Modules that say `counted = False`, and all inside them."""
    return {part for module in model.modules() if not getattr(module, "counted", True) for part in module.modules()}


def uncounted(model: nn.Module) -> list[dict[str, Any]]:
    """Each Parameter of two or more dimensions that is not counted: its name, the kind of module that has it, and how
    many weights it holds. Neither normalisation's nor what says itself that it is not counted.
    """
    apart, seen = _not_counted(model), {id(layer.weight) for layer in layers(model).values()}
    found = []
    for prefix, module in model.named_modules():
        if module in apart or isinstance(module, NORMALISATION):
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.dim() > 1 and id(parameter) not in seen:
                seen.add(id(parameter))
                found.append({"name": name, "kind": _kind(module), "weights": parameter.numel()})
    return found


def _kind(module: nn.Module) -> str:
    """torch's name for a module; "Parameter" for one of somebody else's, whose names say nothing; "excluded" where it
    was left out.
    """
    if is_excluded(module):
        return "excluded"
    known = [kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.modules.")]
    bare = known[0] is nn.Module or isinstance(module, nn.ParameterList | nn.ParameterDict)
    return "Parameter" if bare else known[0].__name__


def tell_uncounted(model: nn.Module, say: Callable[[str], None]) -> None:
    """Say in one line what of `model` is not counted, unless that has been said of it before."""
    found = [] if model in _told else uncounted(model)
    _told.add(model)
    if found:
        named = ", ".join(f"{one['name']} ({one['kind']}, {one['weights']:,})" for one in found[:NAMED])
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        weights = sum(one["weights"] for one in found)
        say(f"{weights:,} weights are not counted, never pruned, and in no sparsity: {named}{more}")


def uses(model: nn.Module) -> dict[str, int]:
    """How many places of the network use each counted layer's weight: 1, and one more for each that shares it."""
    names = {module: name for name, module in layers(model).items()}
    times = dict.fromkeys(names.values(), 1)
    for module in model.modules():
        lender = getattr(module, "shares", None)
        if lender in names:
            times[names[lender]] += 1
    return times


def count(model: nn.Module) -> int:
    """Number of counted weights, kept or not, each shared one as often as it is used: what sparsity is a share of."""
    found = layers(model)
    return sum(times * found[name].weight.numel() for name, times in uses(model).items())


def count_nonzero(model: nn.Module) -> int:
    """Number of counted weights that are kept and not exactly zero, each shared one once."""
    found = layers(model).values()
    there = [(layer.weight != 0) & getattr(layer, "mask", True) for layer in found]
    return int(torch.stack([one.sum() for one in there]).sum())  # asked of the device once


def num_kept(sparsity: float, total: int) -> int:
    """Number of weights that `sparsity` leaves of `total`: round((1 - sparsity) * total)."""
    return round((1.0 - sparsity) * total)


def count_kept(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """How many positions of each mask are True: asked of the device all at once, for every answer waits for it."""
    if not masks:
        return {}
    return dict(zip(masks, torch.stack([mask.sum() for mask in masks.values()]).tolist(), strict=True))


class Masks:
    """The masks of one model: made once, set by name, enforced after every optimizer step.

    The bool buffers `LAYER.mask` are the truth (they are saved and moved with the model). Beside them lies a copy in
    the weight's dtype, for enforcing: multiplying by floats costs 2.5 times less than by bools.

    Warns once a network of what is not counted in it. Raises SparseLabError for one in which nothing is, and for a
    weight that is computed from other Parameters: no mask would hold there.
    """

    # who uses masks keeps them; what was made of a single layer would hold on to that layer else
    _known: ClassVar[WeakKeyDictionary[nn.Module, ref[Masks]]] = WeakKeyDictionary()

    def __init__(self, model: nn.Module) -> None:
        self._tied = tied_layers(model)
        self.layers = {name: tied[0] for name, tied in self._tied.items()}
        check_maskable(model)
        tell_uncounted(model, _warn)
        for module in self.layers.values():
            if not isinstance(getattr(module, "mask", None), Tensor):
                module.register_buffer("mask", torch.ones_like(module.weight, dtype=torch.bool))
        self._tie()
        self._factors: list[Tensor] = []
        self._seen: list[tuple[int, int]] = []  # of each mask that the factors were made of: which one, and its version
        self._enforced: dict[str, int] = {}  # version of each mask when it was last enforced on an optimizer too
        self._uses = uses(model)

    @classmethod
    def of(cls, model: nn.Module) -> Masks:
        """The masks of this model; made when they are first asked for."""
        known = cls._known.get(model)
        masks = None if known is None else known()
        if masks is None:
            masks = cls(model)
            cls._known[model] = ref(masks)
        return masks

    def __getitem__(self, name: str) -> Tensor:
        return self.layers[name].get_buffer("mask")

    def weights(self) -> dict[str, Tensor]:
        """Counted weights by layer name (the parameters themselves)."""
        return {name: module.weight for name, module in self.layers.items()}

    def masks(self) -> dict[str, Tensor]:
        """Bool masks by layer name, True where a weight is kept (the buffers themselves)."""
        return {name: self[name] for name in self.layers}

    def kept(self) -> int:
        """Number of kept weights in the whole network."""
        return sum(self.kept_by_layer().values())

    def kept_by_layer(self) -> dict[str, int]:
        return count_kept(self.masks())

    def kept_with_reuse(self) -> int:
        """Number of kept weights where each shared one counts as often as it is used."""
        return sum(self._uses[name] * kept for name, kept in self.kept_by_layer().items())

    def unique(self) -> int:
        """Number of counted weights that exist, kept or not: each shared one once."""
        return sum(module.weight.numel() for module in self.layers.values())

    def total(self) -> int:
        """Number of counted weights of the network before sharing, kept or not."""
        return sum(self._uses[name] * module.weight.numel() for name, module in self.layers.items())

    def sparsity(self) -> float:
        """1 - kept / total."""
        return 1.0 - self.kept() / self.total()

    def copy_to(self, other: nn.Module) -> None:
        """Give `other`, a network with the same layers (an average of this one's weights, say), these masks; what they
        prune becomes zero there. Raise SparseLabError where its layers are others.
        """
        theirs = tied_layers(other)
        shapes = {name: tied[0].weight.shape for name, tied in theirs.items()}
        if shapes != {name: mask.shape for name, mask in self.masks().items()}:
            raise SparseLabError("the other network has other layers: give one that was made in the same way")
        for name, tied in theirs.items():
            mask = self[name].to(tied[0].weight.device, copy=True)
            tied[0].weight.data.mul_(mask)
            for layer in tied:
                layer.register_buffer("mask", mask)

    def remove(self) -> None:
        """Take the masks off. What they prune is as it was left: zero where they were enforced."""
        for tied in self._tied.values():
            for layer in tied:
                layer._buffers.pop("mask", None)
        for model in [model for model, masks in Masks._known.items() if masks() is self]:
            del Masks._known[model]

    def set(self, new: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Take new masks (by layer name, shape of the weight). Weights outside them become zero at once, and so does
        their state in `optimizer`. Raise SparseLabError for unknown layers and other shapes.
        """
        for name, mask in new.items():
            if name not in self.layers:
                raise SparseLabError(f"no layer {name!r} has a mask; {nearest(str(name), self.layers)}")
            if mask.shape != self[name].shape:
                raise SparseLabError(
                    f"the mask of {name!r} has shape {tuple(self[name].shape)}, not {tuple(mask.shape)}"
                )
        for name, mask in new.items():
            self[name].copy_(mask)
        self.refresh()
        self.enforce(optimizer)

    def refresh(self) -> None:
        """Make the multipliers anew: after masks were loaded, moved or changed from outside."""
        self._tie()
        self._enforced = {}
        self._factors = [self[name].to(module.weight.dtype) for name, module in self.layers.items()]
        self._seen = self._versions()

    def _versions(self) -> list[tuple[int, int]]:
        masks = [module._buffers["mask"] for module in self.layers.values()]
        return [(id(mask), mask._version) for mask in masks]  # type: ignore[union-attr]

    def _follow(self) -> None:
        """Masks that were loaded, moved or changed behind our back hold too."""
        if self._seen != self._versions():
            self.refresh()

    def _tie(self) -> None:
        """The mask of a layer is that of all that are tied to it: a move to a device has made them several."""
        for name, (_, *others) in self._tied.items():
            for other in others:
                other.register_buffer("mask", self[name])

    @torch.no_grad()
    def cut_gradients(self) -> None:
        """Zero the gradient of every masked weight, in place. With weight and state zero there, SGD and Adam, with
        momentum and with either kind of weight decay, leave all three at zero.
        """
        self._follow()
        pairs = zip(self.layers.values(), self._factors, strict=True)
        there = [(module.weight.grad, factor) for module, factor in pairs if module.weight.grad is not None]
        if there:
            _multiply([gradient for gradient, _ in there], [factor for _, factor in there])

    @torch.no_grad()
    def enforce(self, optimizer: torch.optim.Optimizer | None = None, but: AbstractSet[Tensor] = frozenset()) -> None:
        """Zero every masked weight, and the optimizer state of the same shape, in place.

        Masking gradients is not enough: momentum and weight decay revive pruned weights.

        but: weights of which nothing has moved outside of the mask; they are left out, unless the mask itself has
        changed since it was enforced on the optimizer.
        """
        self._follow()
        values: list[Tensor] = []
        factors: list[Tensor] = []
        for (name, module), factor in zip(self.layers.items(), self._factors, strict=True):
            if module.weight in but and self._enforced.get(name) == self[name]._version:
                continue
            if optimizer is not None:
                self._enforced[name] = self[name]._version
            for tensor in (module.weight, *state_like(optimizer, module.weight)):
                values.append(tensor.data)
                factors.append(factor if factor.dtype == tensor.dtype else factor.to(tensor.dtype))
        if values:
            _multiply(values, factors)


def check_maskable(model: nn.Module) -> None:
    """Raise SparseLabError where nothing is counted in `model`, or a mask would not hold on a weight."""
    check_built(model)
    found = layers(model)
    if not found:
        raise SparseLabError("this network has no conv or linear weights, so no weights that a mask could be for")
    for name, layer in found.items():
        weight = layer._parameters.get("weight")
        if hasattr(weight, "device_mesh"):  # torch's DTensor
            raise SparseLabError(
                f"the weight of {name!r} is shared out over processes (FSDP), so a mask would see a part of it: use DDP"
            )
        if weight is None:
            raise SparseLabError(
                f"the weight of {name!r} is computed from others (by a parametrization, weight_norm or torch's own "
                "pruning), so no mask would hold on it: remove that first"
            )


def check_built(model: nn.Module) -> None:
    """Raise SparseLabError where a lazy module has not seen an input yet."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise SparseLabError(
                f"{name!r} has no shape yet (of a lazy module): send a batch through the network first"
            )


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=4)  # whoever makes the masks


def _multiply(values: list[Tensor], factors: list[Tensor]) -> None:
    """In place. What becomes zero has no sign: a checkpoint keeps none where a mask is, and a weight that grows there
    later starts from the same bits, whether its run was stopped in between or not.
    """
    torch._foreach_mul_(values, factors)
    torch._foreach_add_(values, 0)


def state_like(optimizer: torch.optim.Optimizer | None, weight: Tensor) -> Iterable[Tensor]:
    """The optimizer's tensors that hold one number a weight (momentum, Adam's moments)."""
    if optimizer is None:
        return []
    state = optimizer.state.get(weight, {})
    return [value for value in state.values() if isinstance(value, Tensor) and value.shape == weight.shape]
