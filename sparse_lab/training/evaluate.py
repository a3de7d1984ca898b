"""Accuracy of a network over a set of batches, outside of any trainer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparse_lab.sparsity.scores import evaluating


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Top-1 accuracy in percent, in evaluation mode (restored after); inputs take the weights' device and dtype."""
    weight = next(model.parameters())
    hits, images = torch.zeros((), dtype=torch.long, device=weight.device), 0
    with evaluating(model):
        for inputs, labels in batches:
            logits = model(inputs.to(weight))
            hits += (logits.argmax(1) == labels.to(weight.device)).sum()
            images += len(labels)
    return 100.0 * int(hits) / images
