"""What training and scores see of a data set, whether its images lie in memory or are decoded one by one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from sparse_lab.data.plan import Plan
from sparse_lab.errors import UserError

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(kw_only=True, eq=False)
class Loader(ABC):
    """Iterates over (images float32 [B, C, H, W] normalised, labels int64 [B]), both on the device.

    What an epoch holds derives from the plan's seed and `epoch` alone: two passes through one epoch are equal, and the
    global random state is neither read nor moved. Lightning calls `sampler.set_epoch` itself, and keeps `state_dict`
    in its checkpoints: a run that was stopped within an epoch goes on with the next batch.

    Raises:
        UserError: fewer images than devices.
    """

    labels: torch.Tensor
    plan: Plan
    mean: list[float]
    std: list[float]
    epoch: int = field(default=0, init=False)
    taken: int = field(default=0, init=False)
    _skip: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.count < self.plan.world_size:
            raise UserError(f"{self.count} image(s) cannot be shared over {self.plan.world_size} devices")

    @property
    def count(self) -> int:
        """Images of an epoch over all ranks, before a smaller last batch is dropped and before the limit."""
        return len(self.labels)

    @property
    def batch_size(self) -> int:
        """Images a step on this rank."""
        return self.plan.batch_size // self.plan.world_size

    @property
    def sampler(self) -> Loader:
        return self

    def statistics(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and std, float32 [C, 1, 1] on the device; asked once an epoch, as every such copy waits for a GPU."""
        mean, std = torch.tensor([self.mean, self.std], dtype=torch.float32).to(device).view(2, -1, 1, 1)
        return mean, std

    @property
    def batch_sampler(self) -> None:
        """None: Lightning looks here before it looks at `sampler`."""
        return None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches an epoch, the same on every rank."""
        return len(self.plan.blocks(self.count))

    def __iter__(self) -> Iterator[Batch]:
        # Lightning makes the iterator before it sets the epoch: nothing is decided before the first batch is asked for
        first, self._skip = self._skip, 0
        for taken, batch in enumerate(self._from(first), first + 1):
            self.taken = taken
            yield batch

    @abstractmethod
    def _from(self, first: int) -> Iterator[Batch]:
        """The epoch's batches, without the first `first`."""

    def state_dict(self) -> dict[str, int]:
        """How many batches of the epoch have been handed out; 0 at its end."""
        return {"taken": self.taken % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next pass leaves out so many batches."""
        self._skip = state["taken"]

    @abstractmethod
    def picked(self, picks: list[torch.Tensor]) -> list[Batch]:
        """One batch for each of `picks` (indices of images), without augmentation."""

    def fixed(self, count: int) -> list[Batch]:
        """`count` batches without augmentation, the same for one seed whatever the epoch or the rank, to score weights.

        Each holds `plan.batch_size` images (all of them if there are fewer).
        """
        return self.picked(self.plan.fixed(self.count, count))

    def balanced(self, per_class: int) -> list[Batch]:
        """Batches that hold up to `per_class` images of each class together, otherwise as `fixed`."""
        return self.picked(self.plan.balanced(self.labels, per_class))
