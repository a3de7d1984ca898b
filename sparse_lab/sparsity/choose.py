"""Which layers are counted, and which have a sparsity of their own: said by name or by type, before there are masks.

The choice stands on the layers themselves, so that a copy of the network has it too: `excluded` is True on one that is
left out (it stays dense, and is in no sparsity), `own_sparsity` is there on one that has its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from sparse_lab.errors import SparseLabError, nearest
from sparse_lab.sparsity.masks import Counted, Tied, count, layers, maskable, num_kept


class OwnSparsity(NamedTuple):
    """A layer's sparsity where that of the network is `target`."""

    sparsity: float
    target: float


def choose(
    model: nn.Module,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layers: Mapping[str, float] | None = None,
    target: float = 0.0,
) -> None:
    """Say of every conv and linear layer of `model` whether it is counted, in place of what was said before.

    include: names of layers, globs over them (`layer4.*`) or names of types (`Linear`); only these are counted. Empty:
    all. exclude: those that are not. layers: the sparsity of the layers so named where the network's is `target`, which
    is that of all counted weights, these too.

    Raises SparseLabError, in a line that begins with the argument's name, for what matches no such layer, for two
    sparsities of one layer, where nothing is left to count, and where a layer to leave out has a mask already.
    """
    found = maskable(model)
    included = _matched("include", include, model, found) if include else set(found)
    counted = included - _matched("exclude", exclude, model, found)
    if not counted:
        word, names = ("exclude", exclude) if exclude else ("include", include)
        raise SparseLabError(f"{word}={list(names)} leaves no layer to count: name fewer")
    own = _own(layers or {}, target, model, found, counted)
    for name, tied in found.items():
        for layer in tied.layers:
            if name not in counted and hasattr(layer, "mask"):
                raise SparseLabError(f"exclude: {name!r} has a mask already: choose before masks are made")
            _mark(layer, "excluded", None if name in counted else True)
            _mark(layer, "own_sparsity", own.get(name))


def check_own(model: nn.Module, target: float) -> None:
    """Raise SparseLabError where layers with a sparsity of their own leave the others too much or too little at
    `target`, and say which target would fit.
    """
    found, total = layers(model), count(model)
    kept = num_kept(target, total)
    own = {name: num_own(layer) for name, layer in found.items() if hasattr(layer, "own_sparsity")}
    others = [layer.weight.numel() for name, layer in found.items() if name not in own]
    low, high = sum(own.values()) + len(others), sum(own.values()) + sum(others)
    if not own or low <= kept <= high:
        return
    said = f"layers keep {sum(own.values()):,} weights, and target={target:.12g} {kept:,} of all"
    if not others:
        raise SparseLabError(f"{said}: with every layer named, target={1.0 - low / total:.10g}")
    if kept < low:
        raise SparseLabError(
            f"{said}, which leaves too little for {len(others)} others: at most target={1.0 - low / total:.10g}"
        )
    raise SparseLabError(
        f"{said}, which is more than the {len(others)} others have: at least target={1.0 - high / total:.10g}"
    )


def num_own(layer: Counted) -> int:
    """How many weights a layer with a sparsity of its own keeps at the network's target; one at least."""
    return max(1, num_kept(layer.own_sparsity.sparsity, layer.weight.numel()))  # type: ignore[union-attr, arg-type]


def own_shares(found: Mapping[str, Counted], kept: int, total: int) -> dict[str, float]:
    """How many weights each layer with a sparsity of its own is to keep where the network keeps `kept` of `total`.

    At the target exactly what its own sparsity says; before it that sparsity times sparsity / target, beyond it its
    density times density / (1 - target): so it moves as the whole network does.
    """
    shares, sparsity = {}, 1.0 - kept / total
    for name, layer in found.items():
        own: OwnSparsity | None = getattr(layer, "own_sparsity", None)
        if own is None:
            continue
        number = layer.weight.numel()
        if kept == num_kept(own.target, total):
            shares[name] = float(num_own(layer))
        elif sparsity < own.target:
            shares[name] = number * (1.0 - own.sparsity * sparsity / own.target)
        else:
            shares[name] = number * (1.0 - own.sparsity) * (1.0 - sparsity) / (1.0 - own.target)
    return shares


def _mark(layer: nn.Module, name: str, value: object) -> None:
    if value is not None:
        setattr(layer, name, value)
    elif hasattr(layer, name):
        delattr(layer, name)


def _own(
    chosen: Mapping[str, float], target: float, model: nn.Module, found: Mapping[str, Tied], counted: Collection[str]
) -> dict[str, OwnSparsity]:
    own: dict[str, OwnSparsity] = {}
    said: dict[str, str] = {}
    for pattern, sparsity in chosen.items():
        named = [name for name in found if name in _matched("layers", [pattern], model, found) and name in counted]
        if not named:
            raise SparseLabError(f"layers: {pattern!r} names layers that are not counted alone: leave it out")
        if not 0.0 <= sparsity < 1.0:
            raise SparseLabError(f"layers: {pattern!r} has sparsity {sparsity:.12g}, outside [0, 1)")
        for name in named:
            if name in own and own[name].sparsity != sparsity:
                raise SparseLabError(
                    f"layers: {said[name]!r} gives {name!r} {own[name].sparsity:.12g} and {pattern!r} {sparsity:.12g}: "
                    "name it once"
                )
            own[name], said[name] = OwnSparsity(sparsity, target), pattern
    return own


def _matched(word: str, patterns: Sequence[str], model: nn.Module, found: Mapping[str, Tied]) -> set[str]:
    """The layers that these patterns name, by their first names."""
    matched: set[str] = set()
    for pattern in patterns:
        named = {name for name, tied in found.items() if _names(pattern, tied)}
        if not named:
            others = {type(module).__name__ for name, module in model.named_modules() if fnmatchcase(name, pattern)}
            others |= {type(module).__name__ for module in model.modules() if type(module).__name__ == pattern}
            why = f"names {', '.join(sorted(others))} alone, and masks are" if others else "matches no layer: masks are"
            raise SparseLabError(f"{word}: {pattern!r} {why} for conv and linear layers; {nearest(pattern, found)}")
        matched |= named
    return matched


def _names(pattern: str, tied: Tied) -> bool:
    kinds = {kind.__name__ for layer in tied.layers for kind in type(layer).__mro__ if issubclass(kind, nn.Module)}
    return pattern in kinds - {"Module"} or any(fnmatchcase(name, pattern) for name in tied.names)
