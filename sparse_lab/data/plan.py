"""Which images make up which batch, on which device of a run: index arithmetic alone, no pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sparse_lab.data.seeding import generator


@dataclass(frozen=True)
class Plan:
    """How a set of images is walked through.

    Attributes:
        batch_size: images a step over all ranks together; each rank takes its share of every such batch, so a run on
            several devices sees the same images at every step as a run on one.
        shuffle: a fresh order every epoch, drawn from (seed, epoch) alone.
        drop_last: leave a smaller last batch out, unless it is the only one.
        limit: at most so many batches an epoch.
    """

    batch_size: int
    shuffle: bool = False
    drop_last: bool = False
    seed: int = 0
    limit: int | None = None
    rank: int = 0
    world_size: int = 1

    def order(self, count: int, epoch: int) -> torch.Tensor:
        """Order of `count` images in an epoch, int64 [count]; the same on every rank."""
        if not self.shuffle:
            return torch.arange(count)
        return torch.randperm(count, generator=generator("order", self.seed, epoch))

    def blocks(self, count: int) -> list[slice]:
        """This rank's batches of an epoch, as slices of `order`.

        All ranks get equally many batches and no image goes to two ranks. Training drops images that cannot be shared
        evenly (others each epoch). Evaluation keeps every image: shares of one batch may then differ by one image.
        """
        usable = count - count % self.world_size if self.shuffle else count
        if self.drop_last and usable >= self.batch_size:
            usable -= usable % self.batch_size
        starts = list(range(0, usable, self.batch_size))
        if len(starts) > 1 and usable - starts[-1] < self.world_size:
            # A rank without an image in the last batch would have no loss, and one batch fewer than the others.
            starts.pop()
        stops = [*starts[1:], usable]
        slices = [slice(start + self.rank, stop, self.world_size) for start, stop in zip(starts, stops, strict=True)]
        return slices[: self.limit]

    def fixed(self, count: int, batches: int) -> list[torch.Tensor]:
        """Indices of `batches` whole batches drawn by seed, int64 [min(batch_size, count)] each.

        They know neither epoch nor rank: all ranks score weights on the same images. A set too small for so many
        batches is gone through again, in another order.
        """
        picks: list[torch.Tensor] = []
        size = min(self.batch_size, count)
        passes = 0
        while len(picks) < batches:
            order = torch.randperm(count, generator=generator("fixed", self.seed, passes))
            picks += [pick for pick in order.split(size) if len(pick) == size]
            passes += 1
        return picks[:batches]

    def balanced(self, labels: torch.Tensor, per_class: int) -> list[torch.Tensor]:
        """Indices of up to `per_class` images of each label, drawn by seed, in as few batches of about equal size as
        `batch_size` allows; the labels take turns, so that each batch holds about as many of each.
        """
        order = torch.randperm(len(labels), generator=generator("balanced", self.seed))
        drawn = labels.cpu()[order]
        turns = torch.empty(len(labels), dtype=torch.int64)
        for label in drawn.unique():
            mine = drawn == label
            turns[mine] = torch.arange(int(mine.sum()))
        chosen = turns < per_class
        in_turn = order[chosen][turns[chosen].argsort(stable=True)]
        return list(in_turn.tensor_split(math.ceil(len(in_turn) / self.batch_size)))
