"""Layers whose effective weight is `weight + offset`: a dense part that costs next to no parameters.

Surgery on a plain network; the layers stay the objects that they were, so that whoever holds one (an optimizer, a
module that shares its weight) holds it still. Two kinds: `install_dct` (DCT plus sparse, Price & Tanner 2021, arXiv
2102.07655) and `recover` (pruned values become their filter's mean: the recovery of Pruning On-the-fly, arXiv
2212.12651). Both have a property `offset`, of the weight's shape, by which others can tell. `folded` gives the plain
network that such a network equals; fold before weight sharing is undone, for an offset is shared with its weight.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

COUNTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
OWN = ("alpha", "basis", "mean", "mask")  # what such a layer may hold besides a weight and a bias


class _Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight + self.offset, self.bias)  # type: ignore[operator]


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight + self.offset, self.bias)  # type: ignore[operator]


class _DCT(nn.Module):
    """offset = alpha * basis: `alpha` a learnable scalar, `basis` fixed, of the weight's shape and not saved."""

    alpha: nn.Parameter
    basis: Tensor

    @property
    def offset(self) -> Tensor:
        return self.alpha * self.basis


class DCTConv2d(_DCT, _Conv2d):
    """A convolution plus alpha times the first coefficients of every patch's DCT; made by `install_dct`."""


class DCTLinear(_DCT, _Linear):
    """A linear layer plus alpha times the first coefficients of the input's DCT; made by `install_dct`."""


class _Recovered(nn.Module):
    """offset = mean where `mask` is False: `mean` [out] is one value a filter, saved with the model."""

    mean: Tensor
    mask: Tensor

    @property
    def offset(self) -> Tensor:
        return self.mean.reshape(-1, *(1,) * (self.mask.dim() - 1)) * ~self.mask


class RecoveredConv2d(_Recovered, _Conv2d):
    """A convolution with each filter's mean in place of its pruned weights; made by `recover`."""


class RecoveredLinear(_Recovered, _Linear):
    """A linear layer with each output's mean in place of its pruned weights; made by `recover`."""


PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    DCTConv2d: nn.Conv2d,
    DCTLinear: nn.Linear,
    RecoveredConv2d: nn.Conv2d,
    RecoveredLinear: nn.Linear,
}


def install_dct(model: nn.Module) -> None:
    """Make every counted convolution and linear layer of `model` a DCT layer, in place; their weights become zero.

    Counted are those outside modules that say `counted = False`, and not `excluded`. alpha starts at 1; biases stay.
    Raises ValueError, and changes nothing, when a counted layer is not a plain Conv2d or Linear, or when there is none.
    """
    found = _counted(model)
    if not found:
        raise ValueError("it has no convolution or linear layer")
    for name, module in found.items():
        _check_plain(name, module)
    for module in found.values():
        _add_dct(module)
        nn.init.zeros_(module.get_parameter("weight"))


def match_dct(model: nn.Module, names: Iterable[str]) -> None:
    """Make those layers DCT layers whose `LAYER.alpha` is among these names of a state dict; weights stay."""
    known = set(names)
    for name, module in _counted(model).items():
        if f"{name}.alpha" in known and not isinstance(module, _DCT):
            _check_plain(name, module)
            _add_dct(module)


def recover(model: nn.Module, means: Mapping[str, Tensor]) -> None:
    """Make the layers named in `means` use their filter's mean [out] wherever their bool buffer `mask` is False.

    In place: weights, masks and biases stay the same tensors. A layer without a mask gets one that keeps everything; a
    layer that was recovered before takes the new mean. Raises ValueError, and changes nothing, when a layer is not a
    plain Conv2d or Linear, or when a mean has another shape.
    """
    for name, mean in means.items():
        module = model.get_submodule(name)
        if not isinstance(module, _Recovered):
            _check_plain(name, module)
        outputs = module.get_parameter("weight").shape[:1]
        if mean.shape != outputs:
            raise ValueError(f"the mean of {name} has shape {tuple(mean.shape)}, not {tuple(outputs)}")
    for name, mean in means.items():
        _add_mean(model.get_submodule(name), mean)


def match_recovery(model: nn.Module, names: Iterable[str]) -> None:
    """Make those layers recovered ones whose `LAYER.mean` is among these names of a state dict; means start at 0."""
    known = set(names)
    found = {name: module.get_parameter("weight") for name, module in _counted(model).items()}
    recover(model, {name: weight.new_zeros(len(weight)) for name, weight in found.items() if f"{name}.mean" in known})


def folded(model: nn.Module) -> nn.Module:
    """A copy of `model` in which each layer with an offset is the plain Conv2d or Linear that it equals, its weight
    dense and without a mask. A network without such layers comes back as a plain copy.
    """
    plain = copy.deepcopy(model)
    fold(plain)
    return plain


def fold(model: nn.Module) -> None:
    """The same in place: weights stay the tensors that they were."""
    for module in model.modules():
        if isinstance(module, _DCT | _Recovered):
            weight = module.get_parameter("weight")
            weight.data = (weight + module.offset).detach()
            for part in OWN:
                if hasattr(module, part):
                    delattr(module, part)
            module.__class__ = PLAIN[type(module)]  # type: ignore[assignment]


def dct_matrix(size: int, rows: int, columns: int) -> Tensor:
    """The first `rows` and `columns` of the orthonormal DCT-II matrix of `size`: float64 [rows, columns] on the CPU.

    C[k, j] = sqrt(2 / size) cos(pi (2j + 1) k / (2 size)), and row 0 times sqrt(1/2). C x is the DCT-II of x.
    """
    # (2j + 1) k reaches 10^9 on ImageNet: taken modulo the period, in integers, no cosine loses digits to it
    quarter_turns = torch.arange(4 * size, dtype=torch.float64, device="cpu") / size
    cosines = torch.cos(quarter_turns * (math.pi / 2))
    cosines[[size, 3 * size]] = 0.0  # 6e-17 else, and what is not zero is a link
    odd = 2 * torch.arange(columns, device="cpu") + 1
    places = torch.outer(torch.arange(rows, device="cpu"), odd).remainder_(4 * size)
    matrix = cosines[places].mul_(math.sqrt(2.0 / size))
    matrix[0] *= math.sqrt(0.5)
    return matrix


def dct_basis(weight: Tensor) -> Tensor:
    """The DCT in the shape of `weight` (out, in / groups, ...): row o gives coefficient o of a patch that is read
    kernel position first, channel last, and filled up with zeros where it is shorter than there are outputs.
    """
    outputs, inputs, *kernel = weight.shape
    patch = weight[0].numel()
    rows = dct_matrix(max(patch, outputs), outputs, patch)
    return rows.unflatten(1, (*kernel, inputs)).movedim(-1, 1).contiguous()


def _counted(model: nn.Module) -> dict[str, nn.Module]:
    inside = {part for module in model.modules() if not getattr(module, "counted", True) for part in module.modules()}
    return {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, COUNTED) and part not in inside and not getattr(part, "excluded", False)
    }


def check_plain(model: nn.Module, names: Iterable[str]) -> None:
    """Raise ValueError where one of these layers is of a kind that no offset fits."""
    for name in names:
        _check_plain(name, model.get_submodule(name))


def _check_plain(name: str, module: nn.Module) -> None:
    if type(module) not in PLAIN.values():
        raise ValueError(f"{name} is a {type(module).__name__}, and an offset fits a plain Conv2d or Linear")


def _add_dct(module: nn.Module) -> None:
    weight = module.get_parameter("weight")
    module.register_parameter("alpha", nn.Parameter(weight.new_ones(())))
    module.register_buffer("basis", dct_basis(weight).to(weight.device, weight.dtype), persistent=False)
    module.__class__ = DCTConv2d if isinstance(module, nn.Conv2d) else DCTLinear  # type: ignore[assignment]


def _add_mean(module: nn.Module, mean: Tensor) -> None:
    weight = module.get_parameter("weight")
    if not hasattr(module, "mask"):
        module.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))
    module.register_buffer("mean", mean.detach().to(weight.device, weight.dtype, copy=True))
    module.__class__ = RecoveredConv2d if isinstance(module, nn.Conv2d) else RecoveredLinear  # type: ignore[assignment]
