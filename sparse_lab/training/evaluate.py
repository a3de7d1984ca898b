"""Accuracy of a network over a set of batches, outside of any trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from sparse_lab.sparsity.scores import evaluating


@torch.no_grad()
def accuracy(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], answer: Callable[[Tensor], Tensor] | None = None
) -> float:
    """Top-1 accuracy in percent, in evaluation mode (restored after); inputs take the weights' device and dtype.

    answer: computes `model`'s logits, where that is not the model itself.
    """
    weight = next(model.parameters())
    hits, images = torch.zeros((), dtype=torch.long, device=weight.device), 0
    answer = model if answer is None else answer
    with evaluating(model):
        for inputs, labels in batches:
            logits = answer(inputs.to(weight))
            hits += (logits.argmax(1) == labels.to(weight.device)).sum()
            images += len(labels)
    return 100.0 * int(hits) / images
