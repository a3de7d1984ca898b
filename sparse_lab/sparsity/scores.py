"""How good each weight is. One function a score; higher is better; a new score is a function here and a YAML.

A score looks at a network through `View` and returns one tensor a counted layer, in the weight's shape. It is found
by its own name: `method.prune.score=lamp` runs `lamp`. Gradients are computed only for the scores that ask for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_lab.config import UserError, nearest
from sparse_lab.sparsity.masks import layers

Scores = dict[str, Tensor]
Batches = Sequence[tuple[Tensor, Tensor]]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; then each module has its own mode again (a frozen BatchNorm stays frozen)."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass
class View:
    """What a score may look at: the network, batches of (images, labels), and a random generator (on the CPU).

    `batches` may be a function that makes them: decoding photos for a score of weights alone would be for nothing.
    `taken`: dense gradients that are at hand already (those of a training step); then no batch is looked at.
    """

    model: nn.Module
    batches: Batches | Callable[[], Batches] = ()
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    reference: Scores | None = None
    taken: Scores | None = None

    def weights(self) -> Scores:
        return {name: module.weight.detach() for name, module in layers(self.model).items()}

    def gradients(self, power: int = 1) -> Scores:
        """Mean over batches of gradient ** power, dense: pruned positions too. Leaves the network as it was.

        The network is in evaluation mode, so that BatchNorm's running statistics are used and not moved.
        """
        if self.taken is not None:
            return {name: grad.pow(power) for name, grad in self.taken.items()}
        batches = self.batches() if callable(self.batches) else self.batches
        if not batches:
            raise ValueError("this score needs batches")
        found = layers(self.model)
        weight = next(iter(found.values())).weight
        sums = {name: torch.zeros_like(module.weight) for name, module in found.items()}
        with evaluating(self.model):
            for images, labels in batches:
                with torch.enable_grad():
                    loss = functional.cross_entropy(self.model(images.to(weight)), labels.to(weight.device))
                    grads = torch.autograd.grad(loss, [module.weight for module in found.values()])
                for total, grad in zip(sums.values(), grads, strict=True):
                    total += grad.pow(power)
        return {name: total / len(batches) for name, total in sums.items()}


SCORES: dict[str, Callable[[View], Scores]] = {}


def score(function: Callable[[View], Scores]) -> Callable[[View], Scores]:
    """Enter a score under its function's name."""
    SCORES[function.__name__] = function
    return function


def find(name: str) -> Callable[[View], Scores]:
    """The score of that name. Raises UserError with the nearest known one."""
    if name not in SCORES:
        raise UserError(f"unknown score {name!r}; {nearest(name, list(SCORES))}")
    return SCORES[name]


@score
def magnitude(view: View) -> Scores:
    """|w|."""
    return {name: weight.abs() for name, weight in view.weights().items()}


@score
def lamp(view: View) -> Scores:
    """Layer-adaptive magnitude (Lee et al. 2021, arXiv 2010.07611), to be ranked over all layers at once."""
    return {name: lamp_of(weight) for name, weight in view.weights().items()}


def lamp_of(weight: Tensor) -> Tensor:
    """LAMP of one layer: w^2 over the sum of it and all larger squares; the largest weight scores 1.

    Among equal weights the lowest index counts as the largest. Zeros score 0, also in a layer of zeros. Sums run in
    float64: over 2 M squares float32 would lose the small ones.
    """
    squares = weight.detach().reshape(-1).double().square()
    descending, order = torch.sort(squares, descending=True, stable=True)
    values = torch.where(descending > 0, descending / descending.cumsum(0), 0.0)
    return torch.empty_like(squares).index_copy_(0, order, values).reshape(weight.shape)


@score
def gradient(view: View) -> Scores:
    """|mean gradient| of the loss (RigL's growth score)."""
    return {name: grad.abs() for name, grad in view.gradients().items()}


@score
def taylor(view: View) -> Scores:
    """g^2 w^2, the mean over batches: the squared first-order change of the loss (Molchanov et al. 2019)."""
    squares = view.gradients(power=2)
    return {name: squares[name] * weight.square() for name, weight in view.weights().items()}


@score
def random(view: View) -> Scores:
    """Uniform in [0, 1): the control of every comparison."""
    return {
        name: torch.rand(weight.shape, generator=view.generator, dtype=torch.float64).to(weight.device)
        for name, weight in view.weights().items()
    }


@score
def reference(view: View) -> Scores:
    """Weights alive in a less sparse reference network first, by |w| there; then the rest by |w| in the network
    viewed.
    """
    if view.reference is None:
        raise UserError("score=reference needs a reference network: set method.regrow.reference, or leave it null")
    result = {}
    for name, weight in view.weights().items():
        there = view.reference[name].to(weight).abs().double()
        here = weight.abs().double()
        result[name] = torch.where(
            there > 0, 1.0 + there / there.max().clamp_min(1e-30), here / (here.max() * 2.0).clamp_min(1e-30)
        )
    return result
