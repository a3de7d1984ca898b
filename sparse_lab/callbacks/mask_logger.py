"""What the masks are after every change, a line each in updates.jsonl; says aloud when they cut the network or a
layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from sparse_lab.errors import UserError
from sparse_lab.models import dyrelu
from sparse_lab.records.run_dir import RunDir
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.connectivity import Connectivity, connectivity
from sparse_lab.sparsity.flops import layer_costs
from sparse_lab.sparsity.images import Shape
from sparse_lab.sparsity.masks import Masks, count_kept, maskable

FILE = "updates"
MASK_UPDATES = ("drop_and_grow", "cycle", "elastic_mutation")


class MaskLogger(pl.Callback):
    """Called after each mask change by the callback that made it.

    Paths are those of weights alone. While DyReLU stands it links the channels of a layer with each other, so a network
    that is cut still learns; once it has faded only weights are left.

    trained: on how many images the network has trained so far.
    apart: for mask updates that lie fewer steps behind the last look no paths are followed, and their line says nothing
    of them (on a GPU that takes as long as twenty steps); for pruning and regrowth they always are.
    explore: follow which weights were ever alive (the in-time over-parameterisation rate of ITOP, arXiv 2102.02887).
    by_layer: write the kept and effective weights of every layer too.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Masks | None,
        clock: Clock,
        folder: RunDir,
        say: Callable[[str], None],
        *,
        trained: Callable[[], int],
        shape: Shape,
        require_connected: bool,
        explore: bool,
        by_layer: bool,
        apart: int = 0,
    ) -> None:
        self.model = model
        self.masks = masks
        self.clock = clock
        self.folder = folder
        self.say = say
        self.trained = trained
        self.shape = shape
        self.require_connected = require_connected
        self.by_layer = by_layer
        self.apart = apart
        self.changes = 0  # a line each
        self._looked: int | None = None  # at which step paths were followed
        self._uses: dict[str, int] = {}
        self._other = 0
        self.macs: list[tuple[int, int]] = []
        self.ever: dict[str, Tensor] = {}
        if explore and masks is not None:
            self.ever = {name: torch.zeros_like(mask) for name, mask in masks.masks().items()}
        self._dead: set[str] = set()
        self._connected = True
        self._said_unknown = False

    def look(self) -> Connectivity:
        """How the network is connected now."""
        return connectivity(self.model, self.shape)

    def trained_macs(self) -> int:
        """Multiply-adds of kept weights in one forward pass of every image trained on, as they were then."""
        begins = [images for images, _ in self.macs]
        ends = [*begins[1:], self.trained()]
        return sum((end - images) * macs for (images, macs), end in zip(self.macs, ends, strict=True))

    def _count(self) -> None:
        """Note how many multiply-adds there are from the next image on."""
        if not self._uses:
            costs = layer_costs(self.model, self.shape)
            self._uses = {cost.name: cost.macs // cost.total for cost in costs if cost.total}
            self._other = sum(cost.macs for cost in costs if not cost.total)
        found = {name: tied.layers[0] for name, tied in maskable(self.model).items()}
        multiplied = {name: layer.weight.numel() for name, layer in found.items()}
        if self.masks is not None:  # a dense offset beside the weights multiplies everywhere
            kept = self.masks.kept_by_layer()
            multiplied |= {name: number for name, number in kept.items() if not hasattr(found[name], "offset")}
        macs = self._other + sum(self._uses[name] * number for name, number in multiplied.items())
        self.macs.append((self.trained(), macs))

    def _step(self) -> int:
        return self.clock.round * self.clock.steps_a_round + self.clock.step_in_round

    @property
    def explored(self) -> float | None:
        """Share of the weights that were ever alive; None where it is not followed."""
        if self.masks is None or not self.ever:
            return None
        return sum(count_kept(self.ever).values()) / self.masks.unique()

    def __call__(self, change: str, asked: int) -> None:
        """Write down what `change` has left, where the schedule asked for `asked` kept weights.

        Raises UserError when the network is cut and sparsity.require_connected is set.
        """
        assert self.masks is not None
        for name, ever in self.ever.items():
            mask = self.masks[name]
            self.ever[name] = ever.to(mask.device) | mask
        self._count()
        found = self.look() if self._is_due(change) else None
        if self._writes:
            self.folder.add_line(FILE, self._row(change, asked, found, self.masks))
        self.changes += 1
        if found is not None:
            self._looked = self._step()
            self._warn(found)

    def _is_due(self, change: str) -> bool:
        return change not in MASK_UPDATES or self._looked is None or self._step() - self._looked >= self.apart

    def _row(self, change: str, asked: int, found: Connectivity | None, masks: Masks) -> dict[str, Any]:
        paths = {} if found is None else found.as_dict()
        kept, total = masks.kept_by_layer(), masks.total()  # asked of the device once
        row = {
            "step": self.clock.step,
            "epoch": round(self.clock.step / self.clock.steps_an_epoch, 4),
            "change": change,
            "asked": asked,
            "total": total,
            "unique": masks.unique(),
            "sparsity": 1.0 - sum(kept.values()) / total,
            "kept": sum(kept.values()),
            **paths,
            "explored": self.explored,
        }
        if self.by_layer and found is not None:
            row["layers"] = {
                name: {"kept": kept[name], "total": mask.numel(), "effective": found.effective_by_layer[name]}
                for name, mask in masks.masks().items()
            }
        return row

    def _warn(self, found: Connectivity) -> None:
        if found.not_known is not None:
            if not self._said_unknown:
                self.say(f"which weights lie on a path is not known: {found.not_known}")
            self._said_unknown = True
            return
        assert found.connected is not None and found.live_logits is not None and found.logits is not None
        was_connected, self._connected = self._connected, found.connected
        newly, self._dead = set(found.dead_layers) - self._dead, set(found.dead_layers)
        if not found.connected:
            line = f"no path leads from the input to a logit: {found.kept} weights are kept, none has an effect"
            if self.require_connected:
                raise UserError(f"{line} (sparsity.require_connected=true)")
            if was_connected:
                self.say(f"WARNING: THE MASK CUTS THE NETWORK: {line}, {self._meaning()}")
            return
        if not was_connected:
            self.say(f"the network is connected again: {found.live_logits} of {found.logits} logits can be reached")
        elif found.live_logits < found.logits and self.changes == 1:
            self.say(f"WARNING: only {found.live_logits} of {found.logits} logits can be reached from the input")
        if newly and was_connected:
            dead = [name for name in found.dead_layers if name in newly]
            self.say(f"WARNING: at step {self.clock.step:,} no path crosses {', '.join(dead)}")

    def _meaning(self) -> str:
        if dyrelu.activations(self.model):
            return "only DyReLU still links its channels, until it has faded"
        return "so its answer is constant and nothing can be learned"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._writes = trainer.is_global_zero

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.macs:
            self._count()
        if self._writes:
            self.folder.cut_lines(FILE, lambda number, _: number < self.changes)

    def state_dict(self) -> dict[str, Any]:
        return {
            "changes": self.changes,
            "macs": [list(pair) for pair in self.macs],
            "ever": self.ever,
            "looked": self._looked,
            "dead": sorted(self._dead),
            "connected": self._connected,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.changes = state["changes"]
        self.macs = [(int(images), int(macs)) for images, macs in state["macs"]]
        self.ever = {name: torch.as_tensor(mask) for name, mask in state["ever"].items()}
        self._looked = state.get("looked")  # a checkpoint of before does not say
        self._dead = set(state["dead"])
        self._connected = state["connected"]
