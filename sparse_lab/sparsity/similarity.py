"""Where a sparse network looks differently from its dense one: SSIM of spatial attention maps, layer by layer.

arXiv 2511.11675: a layer whose attention map has changed most has lost most, and regrows first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_lab.sparsity.masks import layers
from sparse_lab.sparsity.scores import as_input, evaluating

SMALLEST_MAP = 3  # an SSIM window of 3x3 is the smallest that has a variance worth the name
WINDOW = 7
K1, K2 = 0.01, 0.03


def attention_maps(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """For each conv its spatial attention map [H, W], float64: channels summed, L1-normalised an image, averaged.

    Taken at the output of each counted conv, in evaluation mode; the network is left as it was.
    """
    sums: dict[str, Tensor] = {}
    seen = 0
    hooks = [
        module.register_forward_hook(_collect(sums, name))
        for name, module in layers(model).items()
        if isinstance(module, nn.Conv2d)
    ]
    weight = next(model.parameters())
    try:
        with torch.no_grad(), evaluating(model):
            for images, _ in batches:
                model(as_input(images, weight))
                seen += len(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / seen for name, total in sums.items()}


def _collect(sums: dict[str, Tensor], name: str):  # type: ignore[no-untyped-def]
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        spatial = output.detach().double().sum(1)
        norm = spatial.abs().sum((1, 2), keepdim=True).clamp_min(1e-30)
        sums[name] = sums.get(name, torch.zeros_like(spatial[0])) + (spatial / norm).sum(0)

    return hook


def ssim(first: Tensor, second: Tensor) -> float:
    """Mean structural similarity (Wang et al. 2004) of two maps [H, W], both sides at least 3.

    Uniform window of 7x7 (the largest odd one that fits, in smaller maps), K1 = 0.01, K2 = 0.03, range of both maps
    together, variances over n; only windows that lie wholly inside the maps count (as in skimage).
    """
    window = min(WINDOW, *(side if side % 2 else side - 1 for side in first.shape))
    x, y = first.double(), second.double()
    span = float(torch.maximum(x.max(), y.max()) - torch.minimum(x.min(), y.min()))
    if span == 0.0:
        return 1.0
    # not Torchmetrics': 1.9 averages over mirrored borders as well
    moments = torch.stack([x, y, x * x, y * y, x * y])[:, None]
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = functional.avg_pool2d(moments, window, stride=1)
    variances = mean_xx - mean_x**2 + mean_yy - mean_y**2
    covariance = mean_xy - mean_x * mean_y
    c1, c2 = (K1 * span) ** 2, (K2 * span) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    return float((luminance * structure).mean())


def least_similar(dense: dict[str, Tensor], sparse: dict[str, Tensor]) -> list[tuple[str, float]]:
    """Layers with their SSIM, the least similar first. Maps under 3x3 cannot be scored and are left out."""
    scored = [(name, ssim(dense[name], sparse[name])) for name in dense if min(dense[name].shape) >= SMALLEST_MAP]
    return sorted(scored, key=lambda pair: pair[1])
