"""Other libraries for sparse training on a CPU, each asked for by name: which layers they know, and those layers in
them. They are called as their documentation says; nothing of theirs is here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from sparse_lab.bench.cells import Unavailable
from sparse_lab.host.machine import version


@dataclass(frozen=True)
class Layer:
    """One layer as an opponent computes it, with the weights of a dense one. values: of its live weights, in some
    order, with zeros among them where it keeps room for more.
    """

    forward: Callable[[Tensor], Tensor]
    values: nn.Parameter


@dataclass(frozen=True)
class Opponent:
    """knows: the layer? make: it for inputs of a shape; its pruned weights are zero. Raises Unavailable."""

    knows: Callable[[nn.Module], bool]
    make: Callable[[nn.Module, tuple[int, ...]], Layer]


def _sparselab(layer: nn.Module, shape: tuple[int, ...]) -> Layer:
    library = _imported("sparselab")
    assert isinstance(layer, nn.Linear)
    other = library.SparseLinear(layer.in_features, layer.out_features, bias=False, sparsity=0.5)
    # its layers draw masks of their own: this one is given ours
    other._csr = library.PaddedCSR.from_dense(layer.weight.detach())
    other._values = nn.Parameter(torch.from_numpy(np.asarray(other._csr.values)))
    return Layer(other, other._values)


def _sparseprop(layer: nn.Module, shape: tuple[int, ...]) -> Layer:
    # of its two ways to compute a convolution it takes the faster one
    other = _imported("sparseprop.modules").sparsify_if_faster(layer, shape, include_dense=False)
    return Layer(other, other.W_val)


def _plain_convolution(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.stride in ((1, 1), (2, 2)) and layer.groups == 1


def _imported(name: str) -> ModuleType:
    """Raises Unavailable where the package is not installed, or cannot be loaded here."""
    package = name.partition(".")[0]
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise Unavailable(f"{package} is left out: no module {error.name} here (pip install {package})") from None
    except Exception as error:  # of a compiled extension: whatever the loader says
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Unavailable(
            f"{package} {version(package) or ''} is left out: it cannot be loaded: {line[:160]}"
        ) from None


MAKERS = {
    "sparselab": Opponent(lambda layer: isinstance(layer, nn.Linear), _sparselab),
    "sparseprop": Opponent(lambda layer: isinstance(layer, nn.Linear) or _plain_convolution(layer), _sparseprop),
}
