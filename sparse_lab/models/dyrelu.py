"""Dynamic ReLU that fades into ReLU (EAST, arXiv 2411.13545; DyReLU-B of Chen et al., ECCV 2020).

Surgery on a plain network: `install` puts a DyReLU in place of every ReLU, `fade` moves all of them between DyReLU
(beta = 1) and ReLU (beta = 0), `remove` puts the ReLUs back. Its parameters are never masked and never counted.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

from sparse_lab.sparsity.images import Shape, image_like, send

PIECES = 2
REDUCTION = 4
SPANS = (1.0, 1.0, 0.5, 0.5)  # how far theta in (-1, 1) moves a1, a2, b1 and b2
RELU = (1.0, 0.0, 0.0, 0.0)  # the coefficients with which max(a1 x + b1, a2 x + b2) is ReLU


class DyReLU(nn.Module):
    """max_k (a_k x + b_k) per channel, with coefficients that depend on the image: (N, C, ...) -> the same shape.

    c is the mean of x over positions; theta = 2 sigmoid(W2 relu(W1 c + v1) + v2) - 1; coefficients = RELU + SPANS
    theta. Phasing blends coefficients, not outputs: beta times these plus (1 - beta) times RELU, so beta = 0 is
    exactly ReLU. Weights and biases start as torch's linear layers do: uniform in +-1/sqrt(inputs).
    """

    counted = False  # nothing in here is one of the network's weights

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // REDUCTION)
        self.reduce = nn.Linear(channels, inner)
        self.expand = nn.Linear(inner, 2 * PIECES * channels)
        self.beta: Tensor
        self.spans: Tensor
        self.relu: Tensor
        self.register_buffer("beta", torch.ones(()))
        self.register_buffer("spans", torch.tensor(SPANS), persistent=False)
        self.register_buffer("relu", torch.tensor(RELU), persistent=False)

    def coefficients(self, x: Tensor) -> Tensor:
        """(N, 4, C): a1, a2, b1 and b2 of every channel, blended by beta."""
        mean = x.flatten(2).mean(2) if x.dim() > 2 else x
        theta = 2.0 * torch.sigmoid(self.expand(functional.relu(self.reduce(mean)))) - 1.0
        moved = theta.unflatten(1, (2 * PIECES, -1)) * self.spans[:, None]
        return self.relu[:, None] + self.beta * moved

    def forward(self, x: Tensor) -> Tensor:
        return dynamic_relu(x, self.coefficients(x))


def dynamic_relu(x: Tensor, coefficients: Tensor) -> Tensor:
    """max(a1 x + b1, a2 x + b2) of x (N, C, ...), with coefficients (N, 4, C): a1, a2, b1 and b2.

    One of torch's overridable functions: what is not a tensor may bring an answer of its own.
    """
    if has_torch_function((x,)):
        return handle_torch_function(dynamic_relu, (x,), x, coefficients)
    shape = (*x.shape[:2], *(1,) * (x.dim() - 2))
    a1, a2, b1, b2 = (one.reshape(shape).to(x.dtype) for one in coefficients.unbind(1))
    # max(p, q) = q + relu(p - q): two to three times faster than torch.maximum, whose gradient looks for ties
    return a2 * x + b2 + functional.relu((a1 - a2) * x + (b1 - b2))


def install(model: nn.Module, shape: Shape) -> None:
    """A DyReLU with parameters of its own in place of every ReLU of `model`, in the order of the network.

    One image of zeros goes through the network to learn each ReLU's channels. Where one ReLU is used in several places,
    they share a DyReLU. Raises ValueError when the network has no ReLU, or another activation that DyReLU could not
    fade into, or one ReLU for maps of different channels.
    """
    if any(isinstance(module, nn.ReLU6) for module in model.modules()):
        raise ValueError("its activations are ReLU6, and DyReLU fades into ReLU")
    channels = _channels(model, shape)
    if not channels:
        raise ValueError("it has no ReLU")
    for name, number in channels.items():
        _replace(model, name, DyReLU(number))


def activations(model: nn.Module) -> dict[str, DyReLU]:
    """The DyReLUs of `model` by name; empty once they are gone."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DyReLU)}


def fade(model: nn.Module, beta: float) -> None:
    """Set every DyReLU between itself (1) and ReLU (0)."""
    for module in activations(model).values():
        module.beta.fill_(beta)


def remove(model: nn.Module) -> list[nn.Parameter]:
    """ReLU in place of every DyReLU; returns the parameters that are gone, for the optimizer to forget."""
    gone: list[nn.Parameter] = []
    for name, module in activations(model).items():
        gone += module.parameters()
        _replace(model, name, nn.ReLU())
    return gone


def rebuild_structure(model: nn.Module, names: Iterable[str]) -> None:
    """Remove the DyReLUs if a state dict with these names was written after they were gone."""
    known = set(names)
    if not any(entry.endswith(f"{name}.beta") for name in activations(model) for entry in known):
        remove(model)


def _channels(model: nn.Module, shape: Shape) -> dict[str, int]:
    found: dict[str, set[int]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: found.setdefault(name, set()).add(inputs[0].shape[1])
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.ReLU)
    ]
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            send(model.eval(), image_like(model, shape))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    for name, numbers in found.items():
        if len(numbers) > 1:
            raise ValueError(
                f"its ReLU {name!r} is used in several places, of {' and '.join(map(str, sorted(numbers)))} channels, "
                "and each needs one of its own"
            )
    return {name: channels for name, (channels,) in found.items()}


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    old = model.get_submodule(name)
    new.train(old.training)
    weight = next(model.parameters())
    setattr(model.get_submodule(parent), last, new.to(weight.device, weight.dtype))
