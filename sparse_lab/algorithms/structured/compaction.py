"""ResRep: filters are trained away through compactors, and what is left is folded into a plain network
(arXiv 2007.03260).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer

from sparse_lab.algorithms.enforce import Changed, MaskAlgorithm, nobody
from sparse_lab.algorithms.structured.selector import FilterSelector
from sparse_lab.models import compactors
from sparse_lab.sparsity.masks import num_kept
from sparse_lab.sparsity.optimizer_state import remove_params
from sparse_lab.sparsity.structured import channels


class Compaction(MaskAlgorithm):
    """A penalty pulls every row of every compactor to zero; rows that are given up follow nothing else.

    From step `begin` on, every `every` steps, the rows of the smallest norms are given up: `channels` more each time,
    and no more than must go to reach `sparsity`. At the end of the last of `epochs` those that must go are taken out,
    what is left of the compactors is folded into convolutions and BatchNorms, and the masks say which channels are
    gone. fused: told how many filters are gone, and the longest norm of their rows.
    """

    order = 40

    def __init__(
        self,
        model: nn.Module,
        selector: FilterSelector,
        sparsity: float,
        *,
        epochs: int,
        penalty: float = 1e-4,
        begin: int = 0,
        every: int = 200,
        channels: int = 4,
        fused: Callable[[int, float], None] = lambda gone, longest: None,
        changed: Changed = nobody,
    ) -> None:
        super().__init__(selector.masks, 0, changed)  # nothing is left to chance
        self.model = model
        self.selector = selector
        self.sparsity = sparsity
        self.epochs = epochs
        self.penalty = penalty
        self.begin = begin
        self.every = every
        self.channels = channels
        self.fused = fused

    def gradients_ready(self, optimizer: Optimizer) -> None:
        since = self.step - self.begin
        if since >= 0 and since % self.every == 0:
            self._give_up(self.channels * (since // self.every + 1))
        compactors.add_penalty(self.model, self.penalty)

    def end_epoch(self, optimizer: Optimizer) -> None:
        if self.epoch == self.epochs - 1 and compactors.compactors(self.model):
            self._fuse(optimizer)

    def _give_up(self, most: int) -> None:
        """The rows that must go, at most `most` of them, the shortest first."""
        norms = compactors.norms(self.model)
        stay = self.broadcast(self.selector.best(norms, self.sparsity))
        going = sorted(
            (float(norms[name][row]), name, int(row)) for name, alive in stay.items() for row in (~alive).nonzero()
        )
        found = compactors.compactors(self.model)
        for compactor in found.values():
            compactor.alive.fill_(True)
        for _, name, row in going[:most]:
            found[name].alive[row] = False

    def _fuse(self, optimizer: Optimizer) -> None:
        # what is folded are BatchNorm's statistics, of which each process has its own: the first one's count
        self.model.load_state_dict(self.broadcast(dict(self.model.named_buffers())), strict=False)
        norms = compactors.norms(self.model)
        stay = self.broadcast(self.selector.best(norms, self.sparsity))
        longest = max(
            (float(norms[name][~alive].max()) for name, alive in stay.items() if not alive.all()), default=0.0
        )
        remove_params(optimizer, compactors.fuse(self.model, stay))
        shapes = {name: weight.shape for name, weight in self.masks.weights().items()}
        self.masks.set(channels.masks_of(self.selector.groups, stay, shapes), optimizer)
        self.fused(sum(int((~alive).sum()) for alive in stay.values()), longest)
        self.changed("prune", num_kept(self.sparsity, self.masks.total()))
