"""The Lightning module: a plain network, the arithmetic that computes it, its loss and its figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from sparse_lab.algorithms.base import StepHooks
from sparse_lab.config import RecipeConfig
from sparse_lab.models.surgery import rebuild_structure
from sparse_lab.sparsity.clock import Clock
from sparse_lab.training.accumulation import group_size
from sparse_lab.training.clipping import NormRatio, clip, masks_of
from sparse_lab.training.figures import Figures
from sparse_lab.training.optimizers import learning_rate, make_optimizer, parameter_groups
from sparse_lab.training.step import TrainingStep, compute

if TYPE_CHECKING:
    from sparse_lab.sparse_cpu.engine import SparseArithmetic
    from sparse_lab.sparse_cpu.sparse_weights import SparseWeight


class Classifier(pl.LightningModule):
    """Cross-entropy training of `model`.

    arithmetic: computes the model with its live weights alone; None where the model computes itself, densely.
    step: what torch has compiled of a dense training step; None: eager. norm_ratio: of clip_over=all_estimated, on the
    optimizer like other algorithms.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: RecipeConfig,
        clock: Clock,
        label_smoothing: float = 0.0,
        arithmetic: SparseArithmetic | None = None,
        step: TrainingStep | None = None,
        norm_ratio: NormRatio | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.clock = clock
        self.label_smoothing = label_smoothing
        self.arithmetic = arithmetic
        self.step = step
        self.norm_ratio = norm_ratio
        self.figures = Figures(self._over_ranks)
        self._group = 1  # batches that step together with the one that trains

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) if self.arithmetic is None else self.arithmetic(images)

    @property
    def live(self) -> Mapping[nn.Parameter, SparseWeight]:
        """What sparse arithmetic knows of each masked weight; nothing in dense arithmetic."""
        return {} if self.arithmetic is None else self.arithmetic.live

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
            ratio = None if self.norm_ratio is None or self._needs_dense_gradients() else self.norm_ratio.ratio
            masks = masks_of(self.model) if self.recipe.clip_over == "live" or ratio is not None else {}
            parameters = [one for group in optimizer.param_groups for one in group["params"]]
            clip(parameters, self.live, gradient_clip_val, masks or None, ratio)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["sums"] = self.figures.state_dict()
        checkpoint["trained"] = self.figures.trained

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        rebuild_structure(self.model, [name.removeprefix("model.") for name in checkpoint["state_dict"]])
        self.figures.load_state_dict(checkpoint["sums"] if self.trainer.is_global_zero else {})
        self.figures.trained = checkpoint["trained"]

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        rate = learning_rate(self.recipe, *self.clock.schedule_place)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        trainer = self.trainer
        self._group = group_size(batch_idx, int(trainer.num_training_batches), trainer.accumulate_grad_batches)
        loss = self._loss(batch)
        # batches are equally large, and Lightning divides by as many as a whole group has
        whole = trainer.accumulate_grad_batches
        return loss if self._group == whole else loss * (whole / self._group)

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        # shares of a training batch are equal, see data/plan: no process has to ask the others
        self.figures.trained += len(batch[1]) * self.trainer.world_size
        if self.arithmetic is not None:
            self.arithmetic.dense_gradients = self._needs_dense_gradients()
        elif self.step is not None:
            return self._counted("train", *self.step(*batch))
        return self._counted("train", *compute(self.forward, *batch, self.label_smoothing))

    def _needs_dense_gradients(self) -> bool:
        """Does anything look at the gradients of pruned weights in this step?"""
        clips_all = self.recipe.clip_norm is not None and self.recipe.clip_over == "all"
        return clips_all or StepHooks.of(self.trainer.optimizers[0]).gradients_are_read()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.step is None:
            super().backward(loss, *args, **kwargs)
        else:
            self.step.backward(loss, self._group)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._counted("validation", *compute(self.forward, *batch, 0.0))

    def _counted(self, stage: str, loss: Tensor, figures: Tensor) -> Tensor:
        self.figures.add(stage, figures)
        return loss

    def _over_ranks(self, one: Tensor) -> Tensor:
        return one if self.trainer.world_size == 1 else self.trainer.strategy.reduce(one.clone(), reduce_op="sum")
