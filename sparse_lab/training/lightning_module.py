"""The Lightning module: a plain network, the arithmetic that computes it, its loss and its figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from sparse_lab.config import RecipeConfig
from sparse_lab.models.surgery import rebuild_structure
from sparse_lab.sparsity.clock import Clock
from sparse_lab.training.clipping import clip, masks_of
from sparse_lab.training.optimizers import learning_rate, make_optimizer, parameter_groups
from sparse_lab.training.step import TrainingStep, compute

if TYPE_CHECKING:
    from sparse_lab.sparse_cpu.engine import SparseArithmetic
    from sparse_lab.sparse_cpu.sparse_weights import SparseWeight


class Classifier(pl.LightningModule):
    """Cross-entropy training of `model`. Sums of loss and hits stay on the device; one read an epoch.

    arithmetic: computes the model with its live weights alone; None where the model computes itself, densely.
    step: what torch has compiled of a dense training step; None: eager.
    readers: questions put in every step, whether the gradients of pruned weights are read once the step is done.
    after_clipping: called when gradients are as the optimizer is to see them.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: RecipeConfig,
        clock: Clock,
        label_smoothing: float = 0.0,
        arithmetic: SparseArithmetic | None = None,
        step: TrainingStep | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.clock = clock
        self.label_smoothing = label_smoothing
        self.arithmetic = arithmetic
        self.step = step
        self.readers: list[Callable[[], bool]] = []
        self.after_clipping: list[Callable[[], None]] = []
        self.sums: dict[str, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) if self.arithmetic is None else self.arithmetic(images)

    @property
    def live(self) -> Mapping[nn.Parameter, SparseWeight]:
        """What sparse arithmetic knows of each masked weight; nothing in dense arithmetic."""
        return {} if self.arithmetic is None else self.arithmetic.live

    def gradients_are_read(self) -> bool:
        """Does anything look at the gradients of pruned weights after this step?"""
        return any(reads() for reads in self.readers)

    def moved_live(self, optimizer: torch.optim.Optimizer) -> AbstractSet[Tensor]:
        """The weights that the last step moved at live positions alone."""
        return frozenset() if self.arithmetic is None else optimizer.stepped  # type: ignore[attr-defined]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # a fused optimizer would want to unscale what a gradient scaler has scaled, and clipping comes before it
        fused = self.device.type == "cuda" and self.trainer.precision != "16-mixed"
        optimizer = make_optimizer(parameter_groups(self.model), self.recipe, fused)
        if self.arithmetic is None:
            return optimizer
        from sparse_lab.sparse_cpu.optimizer import LiveOptimizer

        return LiveOptimizer(optimizer, self.live)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_val is not None:
            masks = masks_of(self.model) if self.recipe.clip_over == "live" else {}
            parameters = [one for group in optimizer.param_groups for one in group["params"]]
            clip(parameters, self.live, gradient_clip_val, masks or None)
        for call in self.after_clipping:
            call()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["sums"] = {stage: self._over_ranks(one) for stage, one in self.sums.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        rebuild_structure(self.model, [name.removeprefix("model.") for name in checkpoint["state_dict"]])
        # within an epoch the sums over all ranks are saved; each image counts once
        self.sums = dict(checkpoint["sums"]) if self.trainer.is_global_zero else {}

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        rate = learning_rate(self.recipe, self.clock.progress)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.arithmetic is not None:
            clips_all = self.recipe.clip_norm is not None and self.recipe.clip_over == "all"
            self.arithmetic.dense_gradients = clips_all or self.gradients_are_read()
        elif self.step is not None:
            return self._counted("train", *self.step(*batch))
        return self._counted("train", *compute(self.forward, *batch, self.label_smoothing))

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.step is None:
            super().backward(loss, *args, **kwargs)
        else:
            self.step.backward(loss)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._counted("validation", *compute(self.forward, *batch, 0.0))

    def _counted(self, stage: str, loss: Tensor, figures: Tensor) -> Tensor:
        figures = figures.detach()
        if stage in self.sums:
            self.sums[stage] = self.sums[stage].to(figures) + figures
        else:
            self.sums[stage] = figures.clone()  # the next step may write its own in the same place
        return loss

    def take(self, stage: str) -> tuple[float, float]:
        """(mean loss, accuracy in percent) of `stage` since the last call, over all ranks; starts counting anew."""
        loss, hits, images = self._over_ranks(self.sums.pop(stage)).tolist()
        return loss / images, 100.0 * hits / images

    def _over_ranks(self, one: Tensor) -> Tensor:
        return one if self.trainer.world_size == 1 else self.trainer.strategy.reduce(one.clone(), reduce_op="sum")
