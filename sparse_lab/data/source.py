"""A data set as it was read: the files it came from, and loaders over any part of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from sparse_lab.config import AugmentConfig, DatasetConfig
from sparse_lab.data.batches import Batches, Decoder
from sparse_lab.data.loader import Loader
from sparse_lab.data.plan import Plan
from sparse_lab.errors import UserError
from sparse_lab.training.device import layout_of

# On a GPU, where a call costs more than the work in it: images made for training at a time, and evaluated at a time.
MADE = 8192
EVALUATED = 1024
LOOKED_AT = 2**22  # values at a time: as a rule the first images differ
BYTE, AS_IT_IS = 255, 1  # what a value of an image is divided by before mean and std are: one of uint8, one of float32
LEVELS = 256
# a channel with a smaller standard deviation does not vary: of bytes, in 0..1; of others, as a share of their mean
CONSTANT, ROUNDING = 1e-4, 1e-6


class Source(Protocol):
    """What `registry.build` needs of a data set; `test` chooses the test images instead of the training images.

    held: so many of the last training images are the validation set, by the files' own word; 0: it is drawn. scale:
    what a value is divided by before mean and std are. skipped: files that cannot be read and were left out.
    check_images: raises a UserError where nothing can be learned from these training images. statistics: mean and
    standard deviation of each channel of these training images, of value / scale.
    """

    @property
    def md5(self) -> dict[str, str]: ...

    @property
    def official(self) -> bool: ...

    @property
    def held(self) -> int: ...

    @property
    def scale(self) -> int: ...

    @property
    def skipped(self) -> tuple[str, ...]: ...

    def count(self, *, test: bool) -> int: ...

    def check_images(self, indices: torch.Tensor, dataset: DatasetConfig) -> None: ...

    def statistics(self, indices: torch.Tensor, dataset: DatasetConfig) -> tuple[list[float], list[float]]: ...

    def loader(
        self,
        indices: torch.Tensor,
        plan: Plan,
        dataset: DatasetConfig,
        device: torch.device,
        *,
        test: bool = False,
        augment: AugmentConfig | None = None,
    ) -> Loader: ...


@dataclass(frozen=True)
class ImageSet:
    """Images of one size: uint8 or float32 [N, C, H, W] with int64 labels [N], on the CPU, or what decodes such; a
    Source.

    `md5` maps a file below dataset.root to the md5 seen; `official` says whether these are the publisher's.
    """

    images: torch.Tensor | Decoder
    labels: torch.Tensor
    test_images: torch.Tensor | Decoder
    test_labels: torch.Tensor
    md5: dict[str, str]
    official: bool
    held: int = 0
    skipped: tuple[str, ...] = ()

    @property
    def scale(self) -> int:
        return AS_IT_IS if isinstance(self.images, torch.Tensor) and self.images.is_floating_point() else BYTE

    def count(self, *, test: bool) -> int:
        return len(self.test_labels if test else self.labels)

    def check_images(self, indices: torch.Tensor, dataset: DatasetConfig) -> None:
        """UserError: these training images are of one colour each, or all the same."""
        first = self.images[indices[:1]][0]
        plain = True
        for some in indices.split(self._some()):
            images = self.images[some].flatten(2)
            plain = plain and bool((images == images[..., :1]).all())
            if not plain and bool((images != first.flatten(1)).any()):
                return
        if plain or len(indices) > 1:
            raise UserError(no_variance(f"{dataset.name} in {dataset.root}", len(indices), plain))

    def statistics(self, indices: torch.Tensor, dataset: DatasetConfig) -> tuple[list[float], list[float]]:
        kind = Levels if self.scale == BYTE else Moments
        found = kind(self.images.shape[1])
        for some in indices.split(self._some()):
            found.add(self.images[some])
        return found.mean_and_std()

    def _some(self) -> int:
        return max(1, LOOKED_AT // math.prod(self.images.shape[1:]))

    def loader(
        self,
        indices: torch.Tensor,
        plan: Plan,
        dataset: DatasetConfig,
        device: torch.device,
        *,
        test: bool = False,
        augment: AugmentConfig | None = None,
    ) -> Batches:
        """A loader over a copy of the chosen images, on `device` where they fit. UserError: a label outside
        dataset.num_classes.
        """
        images, labels = (self.test_images, self.test_labels) if test else (self.images, self.labels)
        check_labels(labels, dataset)
        mean, std = dataset.normalisation
        on_gpu = device.type == "cuda"
        if on_gpu and not plan.shuffle and plan.limit is None:
            plan = replace(plan, batch_size=max(plan.batch_size, EVALUATED))
        return Batches(
            images=_placed(images, indices, device),
            labels=labels[indices].to(device),
            plan=plan,
            mean=mean,
            std=std,
            augment=augment,
            mirror=dataset.mirror,
            ahead=max(1, MADE // plan.batch_size) if on_gpu else 1,
            layout=layout_of(device),
        )


def _placed(images: torch.Tensor | Decoder, indices: torch.Tensor, device: torch.device) -> torch.Tensor | Decoder:
    """These images where batches are cut from them: on the GPU where half of what is free there holds them."""
    if not isinstance(images, torch.Tensor):
        return images.chosen(indices)
    chosen = images[indices]
    if device.type == "cuda" and chosen.nbytes > torch.cuda.mem_get_info(device)[0] // 2:
        return chosen
    return chosen.to(device)


class Levels:
    """Mean and standard deviation of each channel of uint8 images, by how often each of the 256 levels is there: exact
    counts, whatever the images come in.
    """

    def __init__(self, channels: int) -> None:
        self._seen = torch.zeros(channels, LEVELS, dtype=torch.int64)

    def add(self, images: torch.Tensor) -> None:
        """Take in uint8 [N, C, H, W]."""
        for channel, seen in zip(images.transpose(0, 1), self._seen, strict=True):
            seen += channel.flatten().bincount(minlength=LEVELS)

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Return both, of pixels in 0..1; a channel that does not vary gets 1 as its std, and so is 0 throughout."""
        level = np.arange(LEVELS) / BYTE
        shares = self._seen.numpy() / self._seen.numpy().sum(1, keepdims=True)
        mean = (shares * level).sum(1)
        std = np.sqrt((shares * (level - mean[:, None]) ** 2).sum(1))
        return mean.tolist(), np.where(std < CONSTANT, 1.0, std).tolist()


class Moments:
    """The same of float32 images, in float64: means and squared deviations of parts are put together (Chan et al.
    1979), which loses no digits where the mean is large. By numpy, whose sums do not depend on the number of threads.
    """

    def __init__(self, channels: int) -> None:
        self._count = 0
        self._mean, self._squares = np.zeros((2, channels))

    def add(self, images: torch.Tensor) -> None:
        """Take in float32 [N, C, H, W]."""
        values = images.transpose(0, 1).flatten(1).numpy().astype(np.float64)
        count, mean = values.shape[1], values.mean(1)
        apart, whole = mean - self._mean, self._count + count
        self._squares += ((values - mean[:, None]) ** 2).sum(1) + apart**2 * (self._count * count / whole)
        self._mean += apart * (count / whole)
        self._count = whole

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Return both, of the values as they are; a channel that does not vary gets 1 as its std."""
        std = np.sqrt(self._squares / max(1, self._count))
        return self._mean.tolist(), np.where(std <= ROUNDING * abs(self._mean), 1.0, std).tolist()


def no_variance(whose: str, count: int, plain: bool) -> str:
    """Why a data set is refused: all its images are `plain`, or else the same one."""
    what = "of a single colour each" if plain else "the same image"
    return f"{whose}: {count:,} training images are {what}, so nothing can be learned; look at how they were made"


def check_labels(labels: torch.Tensor, dataset: DatasetConfig) -> None:
    """UserError: a label outside 0..num_classes-1."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= dataset.classes:
        raise UserError(
            f"{dataset.name} has labels from {low} to {high}, but dataset.num_classes={dataset.num_classes} allows "
            f"0 to {dataset.classes - 1}"
        )


def check_size(dataset: DatasetConfig, native: int) -> None:
    """UserError: the config asks for a size that this data set does not have."""
    if dataset.shape != (3, native, native):
        raise UserError(
            f"{dataset.name} gives {native}x{native} pixels of 3 channels: set dataset.image_size={native} and "
            f"dataset.channels=3, not {dataset.image_size} and {dataset.channels}"
        )


def md5_of_tensors(tensors: Iterable[torch.Tensor]) -> str:
    """One md5 over the bytes of all tensors, where a data set has no files of its own."""
    digest = hashlib.md5(usedforsecurity=False)
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
