"""ResRep: filters are trained away through compactors, and what is left is folded into a plain network
(arXiv 2007.03260).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from sparse_lab.algorithms.selectors import FilterSelector
from sparse_lab.config import CompactingConfig
from sparse_lab.models import compactors
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.masks import num_kept
from sparse_lab.sparsity.optimizer_state import remove_params
from sparse_lab.sparsity.structured import channels

SHORT = 1e-2  # a row of this norm adds a hundredth of what it did; the paper cuts at 1e-5, after 180 epochs


class Compaction(pl.Callback):
    """A penalty pulls every row of every compactor to zero; rows that are given up follow nothing else.

    From step `begin` on, every `config.every` steps, the rows of the smallest norms are given up: `config.channels`
    more each time, and no more than must go to reach `sparsity`. After the last step those that must go are taken
    out, what is left of the compactors is folded into convolutions and BatchNorms, and the masks say which channels
    are gone.
    """

    def __init__(
        self,
        config: CompactingConfig,
        begin: int,
        filters: FilterSelector,
        sparsity: float,
        clock: Clock,
        changed: Callable[[str, int], None],
        say: Callable[[str], None],
    ) -> None:
        self.config = config
        self.begin = begin
        self.filters = filters
        self.sparsity = sparsity
        self.clock = clock
        self.changed = changed
        self.say = say

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        network = pl_module.get_submodule("model")
        since = self.clock.step_in_round - self.begin
        if since >= 0 and since % self.config.every == 0:
            most = self.config.channels * (since // self.config.every + 1)
            self._give_up(network, most, trainer.strategy.broadcast)
        compactors.add_penalty(network, self.config.penalty)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        network = pl_module.get_submodule("model")
        if trainer.is_last_batch and self.clock.in_last_epoch and compactors.compactors(network):
            self._fuse(network, trainer.optimizers[0], trainer.strategy.broadcast)

    def _give_up(self, network: nn.Module, most: int, broadcast: Callable[[Any], Any]) -> None:
        """The rows that must go, at most `most` of them, the shortest first."""
        norms = compactors.norms(network)
        stay = broadcast(self.filters.best(norms, self.sparsity))
        going = sorted(
            (float(norms[name][row]), name, int(row)) for name, alive in stay.items() for row in (~alive).nonzero()
        )
        found = compactors.compactors(network)
        for compactor in found.values():
            compactor.alive.fill_(True)
        for _, name, row in going[:most]:
            found[name].alive[row] = False

    def _fuse(self, network: nn.Module, optimizer: torch.optim.Optimizer, broadcast: Callable[[Any], Any]) -> None:
        # what is folded are BatchNorm's statistics, of which each process has its own: the first one's count
        network.load_state_dict(broadcast(dict(network.named_buffers())), strict=False)
        norms = compactors.norms(network)
        stay = broadcast(self.filters.best(norms, self.sparsity))
        longest = max(
            (float(norms[name][~alive].max()) for name, alive in stay.items() if not alive.all()), default=0.0
        )
        remove_params(optimizer, compactors.fuse(network, stay))
        masks = self.filters.masks
        shapes = {name: weight.shape for name, weight in masks.weights().items()}
        masks.set(channels.masks_of(self.filters.groups, stay, shapes), optimizer)
        gone = sum(int((~alive).sum()) for alive in stay.values())
        warning = "" if longest < SHORT else "WARNING: cut before they had shrunk to nothing: "
        self.say(f"{warning}{gone:,} filters are gone, the longest row of their compactors had norm {longest:.2g}")
        self.changed("prune", num_kept(self.sparsity, masks.total()))
