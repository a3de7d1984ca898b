"""What a network recognises of a set of batches, outside of any trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from sparse_lab.sparsity.scores import evaluating

DIGITS = 4  # of a percentage in a record: exact for classes of half a million images


@torch.no_grad()
def recognised(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], answer: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return how many images of each class are recognised (top-1), and how many there are: int64 [2, classes], on the
    weights' device. In evaluation mode (restored after); inputs take the weights' device and dtype.

    answer: computes `model`'s logits, where that is not the model itself.
    """
    weight = next(model.parameters())
    counts = torch.zeros(2, 0, dtype=torch.long, device=weight.device)
    answer = model if answer is None else answer
    with evaluating(model):
        for inputs, labels in batches:
            logits, labels = answer(inputs.to(weight)), labels.to(weight.device)
            if not counts.numel():
                counts = counts.new_zeros(2, logits.shape[1])
            counts[0] += labels[logits.argmax(1) == labels].bincount(minlength=counts.shape[1])
            counts[1] += labels.bincount(minlength=counts.shape[1])
    return counts


def accuracy(counts: Tensor) -> float:
    """Return the top-1 accuracy in percent of what `recognised` counts."""
    hits, images = counts.sum(1).tolist()
    return 100.0 * hits / images


def class_accuracy(counts: Tensor) -> list[float | None]:
    """Return the accuracy of each class in percent; None for a class without an image."""
    pairs = zip(*counts.tolist(), strict=True)
    return [round(100.0 * hits / images, DIGITS) if images else None for hits, images in pairs]
