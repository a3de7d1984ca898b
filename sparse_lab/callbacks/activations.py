"""Diagnostic: the share of positive pre-activations of every activation, once an epoch (EAST's figure 3)."""

from __future__ import annotations

from collections.abc import Iterable

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from sparse_lab.models.dyrelu import DyReLU
from sparse_lab.records.run_dir import RunDir
from sparse_lab.sparsity.scores import evaluating

FILE = "activations"
ACTIVATIONS = (nn.ReLU, nn.ReLU6, DyReLU)


class Activations(pl.Callback):
    """After each epoch, one fixed batch of validation images goes through the network in evaluation mode.

    phased: the network has DyReLU at first; the row then says how much of it is left. The last row looks at the network
    that the run ends with.
    """

    def __init__(
        self, folder: RunDir, network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], phased: bool
    ) -> None:
        self.folder = folder
        self.network = network
        self.batches = batches
        self.phased = phased

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.folder.cut_lines(FILE, lambda _, row: row["epoch"] <= trainer.current_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        images, _ = next(iter(self.batches))
        with trainer.precision_plugin.forward_context():
            shares = positive_shares(self.network, images)
        betas = [round(float(module.beta), 6) for module in self.network.modules() if isinstance(module, DyReLU)]
        beta = (betas or [0.0])[0] if self.phased else None
        row = {"epoch": trainer.current_epoch + 1, "beta": beta, "layers": shares}
        self.folder.add_line(FILE, row)


@torch.no_grad()
def positive_shares(network: nn.Module, images: Tensor) -> dict[str, float]:
    """Share (0 to 1) of inputs above zero of every activation module, by name, in the order of the network."""
    shares: dict[str, float] = {}

    def watch(name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            shares[name] = float((inputs[0] > 0).double().mean())

        return hook

    hooks = [
        module.register_forward_pre_hook(watch(name))
        for name, module in network.named_modules()
        if isinstance(module, ACTIVATIONS)
    ]
    try:
        with evaluating(network):
            network(images.to(next(network.parameters())))
    finally:
        for one in hooks:
            one.remove()
    return shares
