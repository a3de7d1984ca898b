"""What the masks are after every change, a line each in updates.jsonl; says aloud when they cut the network or a
layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from sparse_lab.config import UserError
from sparse_lab.record import RunFolder
from sparse_lab.sparsity.connectivity import Connectivity, connectivity
from sparse_lab.sparsity.masks import Masks
from sparse_lab.training.clock import Clock

FILE = "updates"


class MaskLog(pl.Callback):
    """Called after each mask change by the callback that made it. Keeps the last finding for the record.

    explore: follow which weights were ever alive (the in-time over-parameterisation rate of ITOP, arXiv 2102.02887).
    by_layer: write the kept and effective weights of every layer too.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Masks | None,
        clock: Clock,
        folder: RunFolder,
        say: Callable[[str], None],
        *,
        image_size: int,
        require_connected: bool,
        explore: bool,
        by_layer: bool,
    ) -> None:
        self.model = model
        self.masks = masks
        self.clock = clock
        self.folder = folder
        self.say = say
        self.image_size = image_size
        self.require_connected = require_connected
        self.by_layer = by_layer
        self.last: Connectivity | None = None
        self.lines = 0
        self.ever: dict[str, Tensor] = {}
        if explore and masks is not None:
            self.ever = {name: torch.zeros_like(mask) for name, mask in masks.masks().items()}
        self._dead: set[str] = set()

    def look(self) -> Connectivity:
        """How the network is connected now."""
        self.last = connectivity(self.model, self.image_size)
        return self.last

    @property
    def explored(self) -> float | None:
        """Share of the weights that were ever alive; None where it is not followed."""
        if self.masks is None or not self.ever:
            return None
        return sum(int(mask.sum()) for mask in self.ever.values()) / self.masks.unique()

    def __call__(self, change: str, asked: int) -> None:
        """Write down what `change` has left, where the schedule asked for `asked` kept weights.

        Raises UserError when the network is cut and sparsity.require_connected is set.
        """
        assert self.masks is not None
        was_connected = self.last is None or self.last.connected
        found = self.look()
        for name, ever in self.ever.items():
            ever |= self.masks[name].to(ever.device)
        self.lines += 1
        if self._writes:
            self.folder.add_line(FILE, self._row(change, asked, found, self.masks))
        self._warn(found, was_connected)

    def _row(self, change: str, asked: int, found: Connectivity, masks: Masks) -> dict[str, Any]:
        row = {
            "step": self.clock.step,
            "epoch": round(self.clock.step / self.clock.steps_an_epoch, 4),
            "change": change,
            "asked": asked,
            "total": masks.total(),
            "unique": masks.unique(),
            "sparsity": masks.sparsity(),
            **found.as_dict(),
            "explored": self.explored,
        }
        if self.by_layer:
            kept = masks.kept_by_layer()
            row["layers"] = {
                name: {"kept": kept[name], "total": mask.numel(), "effective": found.effective_by_layer[name]}
                for name, mask in masks.masks().items()
            }
        return row

    def _warn(self, found: Connectivity, was_connected: bool) -> None:
        if not found.connected:
            line = f"no path leads from the input to a logit: {found.kept} weights are kept, none has an effect"
            if self.require_connected:
                raise UserError(f"{line} (sparsity.require_connected=true)")
            if was_connected or self.lines == 1:
                self.say(
                    f"WARNING: THE MASK CUTS THE NETWORK: {line}, so its answer is constant and nothing can be learned"
                )
            return
        if not was_connected:
            self.say(f"the network is connected again: {found.live_logits} of {found.logits} logits can be reached")
        elif found.live_logits < found.logits and self.lines == 1:
            self.say(f"WARNING: only {found.live_logits} of {found.logits} logits can be reached from the input")
        newly = [name for name in found.dead_layers if name not in self._dead]
        self._dead.update(newly)
        if newly:
            self.say(f"WARNING: at step {self.clock.step} no path crosses {', '.join(newly)}")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._writes = trainer.is_global_zero

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._writes:
            self.folder.cut_lines(FILE, self.lines)

    def state_dict(self) -> dict[str, Any]:
        return {"lines": self.lines, "ever": self.ever, "dead": sorted(self._dead)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lines = state["lines"]
        self.ever = {name: torch.as_tensor(mask) for name, mask in state["ever"].items()}
        self._dead = set(state["dead"])
