"""What an epoch's batches add up to: loss, hits and images, on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor


class Figures:
    """Sums of `training.step.figures` for each stage ('train', 'validation'): float64 [3], summed loss, hits, images.
    They stay on the device; one read an epoch.

    trained: images that all processes together have trained on since the run began. over_ranks: adds a tensor up over
    all processes.
    """

    def __init__(self, over_ranks: Callable[[Tensor], Tensor] = lambda one: one) -> None:
        self.sums: dict[str, Tensor] = {}
        self.over_ranks = over_ranks
        self.trained = 0

    def add(self, stage: str, figures: Tensor) -> None:
        figures = figures.detach()
        if stage in self.sums:
            self.sums[stage] = self.sums[stage].to(figures) + figures
        else:
            self.sums[stage] = figures.clone()  # the next step may write its own in the same place

    def so_far(self, stage: str) -> tuple[float, float, int]:
        """Return this process' summed loss, hits and images."""
        loss, hits, images = self.sums[stage].tolist()
        return loss, hits, int(images)

    def take(self, stage: str) -> tuple[float, float]:
        """Return mean loss and accuracy in percent since the last call, over all ranks; counting starts anew."""
        loss, hits, images = self.over_ranks(self.sums.pop(stage)).tolist()
        return loss / images, 100.0 * hits / images

    def state_dict(self) -> dict[str, Tensor]:
        """Over all ranks: within an epoch each image counts once."""
        return {stage: self.over_ranks(one) for stage, one in self.sums.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.sums = dict(state)
