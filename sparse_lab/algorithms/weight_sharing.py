"""Weight sharing in residual stages (EAST, arXiv 2411.13545), as an algorithm beside the others."""

from __future__ import annotations

from torch import nn

from sparse_lab.algorithms.base import Algorithm
from sparse_lab.errors import SparseLabError
from sparse_lab.models.weight_sharing import share


class WeightSharing(Algorithm):
    """Let the blocks of `model` from the third of a stage on use the second one's convolutions, times a scalar each.

    That is done here and now, in place: make masks and optimizer afterwards. While it trains nothing more happens.
    Raises SparseLabError where no block repeats.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        try:
            share(model)
        except ValueError as error:
            raise SparseLabError(f"weights cannot be shared in {type(model).__name__}: {error}") from None
