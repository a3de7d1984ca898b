"""How good each filter is: each output channel of a convolution, each unit of a hidden linear layer.

One function a score; higher is better and is kept; a score is found by its own name. All return one float64 vector
[outputs] a layer, in the model's own order. The classifier has none: its outputs are the classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_lab.errors import SparseLabError, nearest
from sparse_lab.registering import check_function, enter
from sparse_lab.sparsity.masks import Counted, layers, maskable
from sparse_lab.sparsity.names import WITHOUT_DATA
from sparse_lab.sparsity.scores import SCORES, View, evaluating

FilterScores = dict[str, Tensor]

ACTIVATIONS = (nn.ReLU, nn.ReLU6)
AT_ONCE = 2**22  # numbers of feature maps that are decomposed together: bounds the copy that the decomposition makes

FILTER_SCORES: dict[str, Callable[[View], FilterScores]] = {}


FILTER_SCORES_WITHOUT_PASSES: set[str] = set()


def filter_score(function: Callable[[View], FilterScores] | None = None, *, without_passes: bool = False) -> Any:
    """Enter a score of filters under its function's name. without_passes: it runs no network."""
    if function is None:
        return partial(filter_score, without_passes=without_passes)
    FILTER_SCORES[function.__name__] = function
    FILTER_SCORES_WITHOUT_PASSES.update([function.__name__] * without_passes)
    return function


def register_filter_score(
    function: Callable[[View], FilterScores] | None = None, *, without_passes: bool = False
) -> Any:
    """Make a score of filters of your own known under its function's name, as a decorator: `@register_filter_score`.

    The function takes a `View` and returns one float64 vector [outputs] for each layer of `filtered(view.model)`;
    higher is better. Then `method.prune.score=NAME` takes it where method.filters is there.

    without_passes: it runs no network and looks at no images.

    Raise SparseLabError for a name that is taken or no plain word, and for what is no function.
    """
    if function is None:
        return partial(register_filter_score, without_passes=without_passes)
    name = check_function("filter score", function, {*SCORES, *FILTER_SCORES, *WITHOUT_DATA, "none"})

    def forget() -> None:
        del FILTER_SCORES[name]
        FILTER_SCORES_WITHOUT_PASSES.discard(name)
        WITHOUT_DATA.discard(name)

    filter_score(function, without_passes=without_passes)
    WITHOUT_DATA.update([name] * without_passes)
    enter("filter score", name, forget)
    return function


def find_filter_score(name: str) -> Callable[[View], FilterScores]:
    """The score of filters of that name. Raises SparseLabError with the nearest known one."""
    if name not in FILTER_SCORES:
        raise SparseLabError(f"unknown filter score {name!r}; {nearest(name, list(FILTER_SCORES))}")
    return FILTER_SCORES[name]


def filtered(model: nn.Module) -> dict[str, Counted]:
    """The layers whose filters are scored: counted convolutions, and counted linear layers but the network's last
    layer.
    """
    last = next(reversed(maskable(model)), None)
    return {name: layer for name, layer in layers(model).items() if name != last or not isinstance(layer, nn.Linear)}


@filter_score(without_passes=True)
def l1(view: View) -> FilterScores:
    """Sum of |w| (Li et al. 2017, arXiv 1608.08710)."""
    return {name: rows.abs().sum(1) for name, rows in _rows(view).items()}


@filter_score(without_passes=True)
def l2(view: View) -> FilterScores:
    """Euclidean norm (soft filter pruning, He et al. 2018, arXiv 1808.06866)."""
    return {name: torch.linalg.vector_norm(rows, dim=1) for name, rows in _rows(view).items()}


@filter_score(without_passes=True)
def random_filters(view: View) -> FilterScores:
    """Uniform in [0, 1): the control of every comparison."""
    return {
        name: torch.rand(len(rows), generator=view.generator, dtype=torch.float64).to(rows.device)
        for name, rows in _rows(view).items()
    }


@filter_score
def rank(view: View) -> FilterScores:
    """Mean matrix rank of the filter's feature map over all images (HRank, Lin et al. 2020, arXiv 2002.10179).

    The map is the output of the next activation (ReLU or ReLU6) that runs after the layer, if it has as many channels
    as the layer: for the last convolution of a residual block and its shortcut, the block's output. A layer without
    one (MobileNetV2's linear projections) is taken after its BatchNorm, or as it comes out. A unit's map is 1x1: its
    score is the share of images on which it is not zero. A layer that runs more than once is averaged over its uses.

    Evaluation mode; the network is left as it was. Raises ValueError when the view has no batches.
    """
    if not view.seen():
        raise ValueError("this score needs batches")
    found = filtered(view.model)
    maps = _Maps(view.model, found)
    weight = next(view.model.parameters())
    try:
        with torch.no_grad(), evaluating(view.model):
            for images, _ in view.seen():
                view.model(images.to(weight))
                maps.settle(None)
    finally:
        maps.close()
    return {name: maps.sums[name] / maps.seen[name] for name in found}


def ranks(maps: Tensor) -> Tensor:
    """Sum over images of each channel's matrix rank: (N, C, H, ...) -> float64 [C].

    A singular value counts when it is over max(H, W) eps times the largest, eps being that of the maps' dtype (float32
    for shorter ones).
    """
    rows = maps.shape[2] if maps.dim() > 2 else 1
    matrices = maps.reshape(*maps.shape[:2], rows, -1).to(torch.promote_types(maps.dtype, torch.float32))
    images = max(1, AT_ONCE // max(1, matrices[0].numel()))
    parts = [torch.linalg.matrix_rank(part).double().sum(0) for part in matrices.split(images)]
    return torch.stack(parts).sum(0)


def _rows(view: View) -> FilterScores:
    """Each filter's weights as one float64 row."""
    return {name: layer.weight.detach().double().flatten(1) for name, layer in filtered(view.model).items()}


class _Maps:
    """Follows a forward pass and adds up the ranks of every layer's maps.

    A layer's output waits (after its BatchNorm has passed over it) until an activation runs, or the pass ends.
    """

    def __init__(self, model: nn.Module, found: dict[str, Counted]) -> None:
        self.sums: dict[str, Tensor] = {}
        self.seen = dict.fromkeys(found, 0)
        self._waiting: list[tuple[str, Tensor]] = []
        self._hooks = [layer.register_forward_hook(self._start(name)) for name, layer in found.items()]
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                self._hooks.append(module.register_forward_hook(self._normalise))
            elif isinstance(module, ACTIVATIONS):
                self._hooks.append(module.register_forward_hook(lambda _, inputs, output: self.settle(output)))

    def settle(self, activated: Tensor | None) -> None:
        """Rank the maps of all that wait: `activated` where its channels fit, else what they have come to."""
        ranked: Tensor | None = None
        for name, output in self._waiting:
            if activated is None or activated.shape[1] != output.shape[1]:
                total = ranks(output)
            else:
                ranked = total = ranks(activated) if ranked is None else ranked
            self.sums[name] = self.sums[name] + total if name in self.sums else total
            self.seen[name] += len(output)
        self._waiting.clear()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _start(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, inputs, output: self._waiting.append((name, output))

    def _normalise(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._waiting = [(name, output if waits is inputs[0] else waits) for name, waits in self._waiting]
