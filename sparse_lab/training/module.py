"""The Lightning module: a plain network, its loss and its figures. It knows nothing of masks."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_lab.config import RecipeConfig
from sparse_lab.models.surgery import match
from sparse_lab.training.clock import Clock
from sparse_lab.training.recipes import learning_rate, make_optimizer, parameter_groups


class Classifier(pl.LightningModule):
    """Cross-entropy training of `model`. Sums of loss and hits stay on the device; one read an epoch."""

    def __init__(self, model: nn.Module, recipe: RecipeConfig, clock: Clock, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.clock = clock
        self.label_smoothing = label_smoothing
        self.sums: dict[str, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(parameter_groups(self.model), self.recipe)

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
        return self._step(batch, "train", self.label_smoothing)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "validation", 0.0)

    def _step(self, batch: tuple[Tensor, Tensor], stage: str, smoothing: float) -> Tensor:
        images, labels = batch
        logits = self.model(images)
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
