"""One masked network twice: computed by torch in float64, and by sparse arithmetic; how far the second is off."""

from __future__ import annotations

import copy
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from sparse_lab.sparse_cpu.engine import DENSE_ABOVE, SparseArithmetic
from sparse_lab.sparsity.masks import Masks

settings.register_profile(
    "compute", deadline=None, max_examples=60 if os.environ.get("NIGHT") else 20, derandomize=True, database=None
)
settings.load_profile("compute")


class Probed(nn.Module):
    """`layer` behind an addition, whose gradient is the gradient of the layer's input."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = layer
        self.offset = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.offset)


def relative(got: Tensor, wanted: Tensor, least: float = 1e-300) -> float:
    """||got - wanted|| / ||wanted|| in float64; NaN where either has one."""
    got, wanted = got.detach().double(), wanted.detach().double()
    return ((got - wanted).norm() / max(wanted.norm().item(), least)).item()


class Twins:
    """`dense` is the reference (torch, float64); `sparse` holds the same numbers in `dtype`.

    density: share of each layer's weights that random masks keep; None keeps what is not zero.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float64, density: float | None = 0.2) -> None:
        self.dtype = dtype
        self.sparse = copy.deepcopy(model).to(dtype)
        self.dense = copy.deepcopy(self.sparse).double()
        self.masks = Masks(self.dense), Masks(self.sparse)
        self.said: list[str] = []
        if density is None:
            self.set({name: weight != 0 for name, weight in self.masks[0].weights().items()})
        else:
            self.draw(density)
        self.arithmetic = SparseArithmetic(self.sparse, self.said.append)

    def set(self, masks: dict[str, Tensor]) -> None:
        for one in self.masks:
            one.set(masks)

    def draw(self, density: float, seed: int = 0) -> None:
        """Random masks; a layer keeps one weight at least."""
        generator = torch.Generator().manual_seed(seed)
        new = {}
        for name, mask in self.masks[0].masks().items():
            order = torch.randperm(mask.numel(), generator=generator)
            new[name] = (order < max(1, math.floor(density * mask.numel()))).view(mask.shape)
        self.set(new)

    def train(self, mode: bool) -> None:
        self.dense.train(mode)
        self.sparse.train(mode)

    def step(self, images: Tensor, seed: int = 5) -> dict[str, float]:
        """Relative errors of a forward and a backward pass: of the outputs, of each gradient and running statistic."""
        assert self.arithmetic.density() <= DENSE_ABOVE, "torch would compute both"
        images = images.to(self.dtype)
        for parameter in (*self.dense.parameters(), *self.sparse.parameters()):
            parameter.grad = None
        for live in self.arithmetic.live.values():
            live.gradient = None
        torch.manual_seed(seed)
        wanted = self.dense(images.double())
        torch.manual_seed(seed)
        got = self.arithmetic(images)
        cotangent = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(seed))
        wanted.backward(cotangent.double())
        got.backward(cotangent.to(self.dtype))
        return {"outputs": relative(got, wanted), **self.gradient_errors(), **self.statistic_errors()}

    def descend(self, rate: float = 1e-4) -> None:
        """One step of gradient descent for both: what is masked stays where it is."""
        with torch.no_grad():
            for weight, twin in zip(self.sparse.parameters(), self.dense.parameters(), strict=True):
                live = self.arithmetic.live.get(weight)
                if live is None:
                    weight -= rate * weight.grad
                else:
                    weight.view(-1)[torch.from_numpy(live.positions)] -= rate * torch.from_numpy(live.gradient)
                twin -= rate * twin.grad
        for masks in self.masks:
            masks.enforce()

    def gradient_errors(self) -> dict[str, float]:
        """By parameter; of live weights where they have a compact gradient, and of the dense one where there is one."""
        sizes = self._sizes()
        errors = {}
        pairs = zip(self.sparse.named_parameters(), self.dense.parameters(), strict=True)
        for (name, parameter), twin in pairs:
            assert twin.grad is not None, name
            live = self.arithmetic.live.get(parameter)
            if live is not None and live.gradient is not None:
                wanted = twin.grad.view(-1)[torch.from_numpy(live.positions)]
                assert live.gradient.dtype == np.dtype(str(self.dtype).removeprefix("torch."))
                errors[name] = relative(torch.from_numpy(live.gradient), wanted, sizes[name])
            if live is None or live.gradient is None or self.arithmetic.dense_gradients:
                assert parameter.grad is not None, name
                errors[f"{name}, dense"] = relative(parameter.grad, twin.grad, sizes[name])
            else:
                assert parameter.grad is None, name
        return errors

    def _sizes(self) -> dict[str, float]:
        """What an error is measured against where a gradient vanishes: its layer's largest, or 1% of all layers'.

        Behind a BatchNorm the gradient of a bias is zero, and so is that of a filter's only weight.
        """
        norms = {name: one.grad.norm().item() for name, one in self.dense.named_parameters() if one.grad is not None}
        least = 1e-2 * max(norms.values())
        layers: dict[str, float] = {}
        for name, norm in norms.items():
            layer = name.rpartition(".")[0]
            layers[layer] = max(layers.get(layer, least), norm)
        return {name: layers[name.rpartition(".")[0]] if norms[name] < least else 1e-300 for name in norms}

    def statistic_errors(self) -> dict[str, float]:
        """Of means against deviations too, for behind a norm without an activation means vanish."""
        wanted = dict(self.dense.named_buffers())
        errors = {}
        for name, buffer in self.sparse.named_buffers():
            if "running" in name:
                spread = wanted[name.replace("running_mean", "running_var")].sqrt().norm().item()
                errors[name] = relative(buffer, wanted[name], spread if "mean" in name else 1e-300)
        return errors


@pytest.fixture(scope="session")
def twins() -> type[Twins]:
    return Twins


@pytest.fixture(scope="session")
def probed() -> type[Probed]:
    return Probed
