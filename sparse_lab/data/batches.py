"""Batches of a data set that fits into the device's memory: no worker processes, no decoding, one gather a batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sparse_lab.config import AugmentConfig
from sparse_lab.data import augment as augmentation
from sparse_lab.data.loader import Batch, Loader
from sparse_lab.data.seeding import generator


@dataclass(kw_only=True, eq=False)
class Batches(Loader):
    """A Loader over images in memory.

    Attributes:
        images: uint8 [N, C, H, W] on the device; batches come out there.
        labels: int64 [N] on the same device.
        augment: crop and flip; None for evaluation.
        mirror: a mirrored image keeps its label; False switches the flip off.
        ahead: so many batches are made at a time. What they hold is the same.
        layout: how a batch of images lies in memory.
    """

    images: torch.Tensor
    augment: AugmentConfig | None = None
    mirror: bool = True
    ahead: int = 1
    layout: torch.memory_format = torch.contiguous_format

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.augment is not None:
            augmentation.check_padding(self.augment, *self.images.shape[2:])

    def _from(self, first: int) -> Iterator[Batch]:
        device = self.images.device
        order = self.plan.order(self.count, self.epoch).to(device)
        offsets, mirrored = (draws.to(device) for draws in self._draws())
        mean, std = self.statistics(device)
        places = torch.arange(self.count, device=device)
        blocks = self.plan.blocks(self.count)[first:]
        for start in range(0, len(blocks), self.ahead):
            parts = [places[block] for block in blocks[start : start + self.ahead]]
            sizes, here = [len(part) for part in parts], torch.cat(parts)
            images, labels = self.images[order[here]], self.labels[order[here]]
            if self.augment is not None:
                padding, mode = self.augment.crop_padding, self.augment.padding_mode
                images = augmentation.crop(images, padding, mode, offsets[:, here], mirrored[here])
            images = augmentation.normalise(images, mean, std).contiguous(memory_format=self.layout)
            yield from zip(images.split(sizes), labels.split(sizes), strict=True)

    def _draws(self) -> tuple[torch.Tensor, torch.Tensor]:
        # For all ranks and the whole epoch at once: what an image gets depends on its place in the order alone.
        padding, flip = (self.augment.crop_padding, self.augment.flip) if self.augment is not None else (0, False)
        source = generator("augment", self.plan.seed, self.epoch)
        return augmentation.draw(self.count, padding, flip and self.mirror, source)

    def picked(self, picks: list[torch.Tensor]) -> list[Batch]:
        mean, std = self.statistics(self.images.device)
        picks = [pick.to(self.images.device) for pick in picks]
        return [(augmentation.normalise(self.images[pick], mean, std), self.labels[pick]) for pick in picks]
