"""The Lightning module: a plain network, the arithmetic that computes it, its loss and its figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_lab.config import RecipeConfig
from sparse_lab.models.surgery import match
from sparse_lab.training.clipping import clip, masks_of
from sparse_lab.training.clock import Clock
from sparse_lab.training.recipes import learning_rate, make_optimizer, parameter_groups

if TYPE_CHECKING:
    from sparse_lab.compute.arithmetic import SparseArithmetic
    from sparse_lab.compute.live import Live


class Classifier(pl.LightningModule):
    """Cross-entropy training of `model`. Sums of loss and hits stay on the device; one read an epoch.

    arithmetic: computes the model with its live weights alone; None where the model computes itself, densely.
    asks_for_dense: questions put before every step of such arithmetic, whether it needs the gradients of pruned
    weights too.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: RecipeConfig,
        clock: Clock,
        label_smoothing: float = 0.0,
        arithmetic: SparseArithmetic | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.clock = clock
        self.label_smoothing = label_smoothing
        self.arithmetic = arithmetic
        self.asks_for_dense: list[Callable[[], bool]] = [
            lambda: recipe.clip_norm is not None and recipe.clip_over == "all"
        ]
        self.sums: dict[str, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) if self.arithmetic is None else self.arithmetic(images)

    @property
    def live(self) -> Mapping[nn.Parameter, Live]:
        """What sparse arithmetic knows of each masked weight; nothing in dense arithmetic."""
        return {} if self.arithmetic is None else self.arithmetic.live

    def moved_live(self, optimizer: torch.optim.Optimizer) -> AbstractSet[Tensor]:
        """The weights that the last step moved at live positions alone."""
        return frozenset() if self.arithmetic is None else optimizer.stepped  # type: ignore[attr-defined]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = make_optimizer(parameter_groups(self.model), self.recipe)
        if self.arithmetic is None:
            return optimizer
        from sparse_lab.compute.optimizer import LiveOptimizer

        return LiveOptimizer(optimizer, self.live)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        masks = masks_of(self.model) if self.recipe.clip_over == "live" else {}
        if gradient_clip_val is None or (self.arithmetic is None and not masks):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        clip(parameters, self.live, gradient_clip_val, masks or None)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["sums"] = {stage: self._over_ranks(one) for stage, one in self.sums.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        match(self.model, [name.removeprefix("model.") for name in checkpoint["state_dict"]])
        # within an epoch the sums over all ranks are saved; each image counts once
        self.sums = dict(checkpoint["sums"]) if self.trainer.is_global_zero else {}

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        rate = learning_rate(self.recipe, self.clock.progress)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.arithmetic is not None:
            self.arithmetic.dense_gradients = any(asks() for asks in self.asks_for_dense)
        return self._step(batch, "train", self.label_smoothing)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "validation", 0.0)

    def _step(self, batch: tuple[Tensor, Tensor], stage: str, smoothing: float) -> Tensor:
        images, labels = batch
        logits = self.forward(images)
        loss = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        with torch.no_grad():
            hits = (logits.argmax(1) == labels).sum()
            one = torch.stack(
                [loss.detach().double() * len(labels), hits.double(), hits.new_tensor(len(labels)).double()]
            )
            self.sums[stage] = self.sums[stage].to(one) + one if stage in self.sums else one
        return loss

    def take(self, stage: str) -> tuple[float, float]:
        """(mean loss, accuracy in percent) of `stage` since the last call, over all ranks; starts counting anew."""
        loss, hits, images = self._over_ranks(self.sums.pop(stage)).tolist()
        return loss / images, 100.0 * hits / images

    def _over_ranks(self, one: Tensor) -> Tensor:
        return one if self.trainer.world_size == 1 else self.trainer.strategy.reduce(one.clone(), reduce_op="sum")
