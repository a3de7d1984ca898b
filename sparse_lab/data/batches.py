"""Batches of images of one size, cropped and mirrored as they are put together: no worker processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from sparse_lab.config import AugmentConfig
from sparse_lab.data import augment as augmentation
from sparse_lab.data.loader import Batch, Loader
from sparse_lab.data.seeding import generator


class Decoder(Protocol):
    """Images that are not in memory, in the place of a tensor [N, C, H, W] of them."""

    @property
    def shape(self) -> torch.Size: ...

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor: ...

    def chosen(self, indices: torch.Tensor) -> Decoder:
        """These images alone."""
        ...

    def batches(self, picks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The images of each of `picks` in turn, on the CPU, decoded ahead of time."""
        ...


@dataclass(kw_only=True, eq=False)
class Batches(Loader):
    """A Loader over images of one size.

    Attributes:
        images: uint8 or float32 [N, C, H, W], on the device, or on the CPU where they do not fit there; or what decodes
            them when they are asked for. What comes out is the same.
        labels: int64 [N] on the device; batches come out there.
        augment: crop and flip; None for evaluation.
        mirror: a mirrored image keeps its label; False switches the flip off.
        ahead: so many batches are made at a time. What they hold is the same.
        layout: how a batch of images lies in memory.
    """

    images: torch.Tensor | Decoder
    augment: AugmentConfig | None = None
    mirror: bool = True
    ahead: int = 1
    layout: torch.memory_format = torch.contiguous_format

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.augment is not None:
            augmentation.check_padding(self.augment, *self.images.shape[2:])

    def _from(self, first: int) -> Iterator[Batch]:
        device = self.labels.device
        order = self.plan.order(self.count, self.epoch).to(device)
        offsets, mirrored = (draws.to(device) for draws in self._draws())
        mean, std = self.statistics(device)
        groups, ahead = itertools.tee(self._places(first))
        for (sizes, here), images in zip(groups, self._pixels(order[here] for _, here in ahead), strict=True):
            if self.augment is not None:
                padding, mode = self.augment.crop_padding, self.augment.padding_mode
                images = augmentation.crop(images, padding, mode, offsets[:, here], mirrored[here])
            images = augmentation.normalise(images, mean, std).contiguous(memory_format=self.layout)
            yield from zip(images.split(sizes), self.labels[order[here]].split(sizes), strict=True)

    def _places(self, first: int) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Of the batches that are made at a time: their sizes, and the places of their images in the epoch's order."""
        places = torch.arange(self.count, device=self.labels.device)
        blocks = self.plan.blocks(self.count)[first:]
        for start in range(0, len(blocks), self.ahead):
            parts = [places[block] for block in blocks[start : start + self.ahead]]
            yield [len(part) for part in parts], torch.cat(parts)

    def _pixels(self, picks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The images of each of `picks`, on the device."""
        device = self.labels.device
        if isinstance(self.images, torch.Tensor):
            for pick in picks:
                yield self.images[pick.to(self.images.device)].to(device)
        else:
            for images in self.images.batches(picks):
                yield images.to(device)

    def _draws(self) -> tuple[torch.Tensor, torch.Tensor]:
        # For all ranks and the whole epoch at once: what an image gets depends on its place in the order alone.
        padding, flip = (self.augment.crop_padding, self.augment.flip) if self.augment is not None else (0, False)
        source = generator("augment", self.plan.seed, self.epoch)
        return augmentation.draw(self.count, padding, flip and self.mirror, source)

    def picked(self, picks: list[torch.Tensor]) -> list[Batch]:
        device = self.labels.device
        mean, std = self.statistics(device)
        picks = [pick.to(device) for pick in picks]
        return [
            (augmentation.normalise(images, mean, std), self.labels[pick])
            for pick, images in zip(picks, self._pixels(picks), strict=True)
        ]
