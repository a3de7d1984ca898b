"""Diagnostic: the gradient's norm in every part of the network, a mean an epoch (EAST's figure 5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from sparse_lab.models.dyrelu import DyReLU
from sparse_lab.models.weight_sharing import SharedConv2d
from sparse_lab.records.run_dir import RunDir
from sparse_lab.sparsity.masks import Masks, is_excluded, layers

if TYPE_CHECKING:
    from sparse_lab.sparse_cpu.sparse_weights import SparseWeight

FILE = "gradients"


class GradientNorms(pl.Callback):
    """Adds up, on the device, each step's L2 norms before clipping; reads them once an epoch.

    Sparse arithmetic knows the gradients of pruned positions in a few steps alone: their mean is over those. live: what
    it knows of each masked weight; nothing in dense arithmetic.
    """

    def __init__(
        self, folder: RunDir, network: nn.Module, masks: Masks | None, live: Mapping[nn.Parameter, SparseWeight]
    ) -> None:
        self.folder = folder
        self.network = network
        self.masks = masks
        self.live = live
        self.sums: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.folder.cut_lines(FILE, lambda _, row: row["epoch"] <= trainer.current_epoch)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        for part, norm in part_norms(self.network, self.masks, self.live).items():
            # a step that the gradient scaler will skip has infinite gradients, and does not count
            counts = torch.isfinite(norm)
            pair = torch.stack([torch.where(counts, norm, 0.0), counts.to(norm)])
            self.sums[part] = self.sums[part].to(pair) + pair if part in self.sums else pair

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        means = {part: float(total) / max(float(steps), 1.0) for part, (total, steps) in self.sums.items()}
        self.sums = {}
        if trainer.is_global_zero:
            self.folder.add_line(FILE, {"epoch": trainer.current_epoch + 1, "parts": means})

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums = {part: torch.as_tensor(pair) for part, pair in state["sums"].items()}


@torch.no_grad()
def part_norms(network: nn.Module, masks: Masks | None, live: Mapping[nn.Parameter, SparseWeight]) -> dict[str, Tensor]:
    """L2 norm of the gradient of each part that the network has, as 0-D tensors in float32. `live` is looked at where
    there is no dense gradient.

    Parts: 'live weights' and 'pruned positions' of the counted weights, 'excluded weights', 'BatchNorm', 'DyReLU',
    'sharing scales', 'biases'.
    """
    squares: dict[str, list[Tensor]] = {}
    names = {id(module.weight): name for name, module in layers(network).items()}
    dynamic = {id(p) for module in network.modules() if isinstance(module, DyReLU) for p in module.parameters()}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.grad is None:
                own = live.get(parameter)
                if own is not None and own.gradient is not None:
                    found = torch.from_numpy(own.gradient).float().square().sum()
                    squares.setdefault("live weights", []).append(found)
                continue
            square = parameter.grad.float().square()
            if id(parameter) in names and masks is not None:
                mask = masks[names[id(parameter)]]
                squares.setdefault("pruned positions", []).append(square.masked_fill(mask, 0.0).sum())
                square = square.masked_fill(~mask, 0.0)
            part = "DyReLU" if id(parameter) in dynamic else _part(module, parameter, id(parameter) in names)
            squares.setdefault(part, []).append(square.sum())
    return {part: torch.stack(values).sum().sqrt() for part, values in squares.items()}


def _part(module: nn.Module, parameter: Tensor, counted: bool) -> str:
    if counted:
        return "live weights"
    if is_excluded(module) and parameter.dim() > 1:
        return "excluded weights"
    if isinstance(module, SharedConv2d):
        return "sharing scales"
    return "BatchNorm" if isinstance(module, nn.modules.batchnorm._BatchNorm) else "biases"
