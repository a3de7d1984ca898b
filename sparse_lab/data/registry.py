"""The data sets by name, and the one way from a config to loaders."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparse_lab.config import DatasetConfig, TrainingConfig
from sparse_lab.errors import UserError, nearest

if TYPE_CHECKING:
    import torch

    from sparse_lab.data.loader import Loader
    from sparse_lab.data.split import Parts

# Each module has check(dataset) and load(dataset, seed) -> Source.
_MODULES = {
    "digits": "digits",
    "cifar10": "cifar",
    "cifar100": "cifar",
    "imagenet": "imagenet",
    "fashion_mnist": "fashion_mnist",
    "synthetic": "synthetic",
}


@dataclass(frozen=True)
class Data:
    """Three loaders, and what a run's record says about the data.

    Attributes:
        train: shuffled and augmented; validation, test: in a fixed order, plain.
        md5: file below dataset.root -> md5 seen. Key "digits", "synthetic": of the arrays; "imagenet": of all
            (path, size).
        official: the md5s are the publisher's. True as well where there is nothing to compare (digits, synthetic,
            imagenet).
        images: train, validation, test -> how many images are used of how many that there are, before any limit.
    """

    train: Loader
    validation: Loader
    test: Loader
    num_classes: int
    image_size: int
    md5: dict[str, str]
    official: bool
    images: dict[str, tuple[int, int]]


def names() -> list[str]:
    """All known data sets."""
    return list(_MODULES)


def check(dataset: DatasetConfig) -> None:
    """Quick test that the files are there and intact, without decoding them.

    Files that dataset.download would fetch may still be missing: `build` fetches them.

    Raises:
        UserError: as `build`, for an unknown name, missing or foreign files, or sizes that do not fit.
    """
    module_of(dataset).check(dataset)


def build(
    dataset: DatasetConfig,
    training: TrainingConfig,
    seed: int,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> Data:
    """Read (fetch, if dataset.download) a data set, split it by seed, and make its loaders.

    Args:
        dataset, training: the config groups; training gives batch_size, limit_batches and augment.
        seed: draws the split, the limits, the order and the augmentation.
        device: where batches come out.
        rank, world_size: this process among those of one run. training.batch_size counts the images of all of them.

    Raises:
        UserError: unknown data set; files missing, foreign, truncated or malicious; a failed download; labels, sizes or
            a batch size that do not fit; training images without any variance.
    """
    import torch

    from sparse_lab.data.plan import Plan
    from sparse_lab.data.split import split

    module = module_of(dataset)
    if training.batch_size % world_size:
        raise UserError(f"training.batch_size={training.batch_size} does not divide over {world_size} devices")
    source = module.load(dataset, seed)
    parts = split(
        source.count(test=False),
        source.count(test=True),
        dataset.validation,
        seed,
        dataset.train_limit,
        dataset.eval_limit,
    )
    source.check_images(parts.train, dataset)
    device = torch.device(device)

    def plan(limit: int | None, train: bool = False) -> Plan:
        return Plan(training.batch_size, train, train, seed, limit, rank, world_size)

    limit = training.limit_batches
    return Data(
        train=source.loader(parts.train, plan(limit, train=True), dataset, device, augment=training.augment),
        validation=source.loader(parts.validation, plan(limit), dataset, device),
        test=source.loader(parts.test, plan(None), dataset, device, test=True),
        num_classes=dataset.num_classes,
        image_size=dataset.image_size,
        md5=source.md5,
        official=source.official,
        images=_used(source.count(test=False), source.count(test=True), parts, dataset, training),
    )


def _used(
    train_count: int, test_count: int, parts: Parts, dataset: DatasetConfig, training: TrainingConfig
) -> dict[str, tuple[int, int]]:
    from sparse_lab.data.split import validation_count

    most = train_count + test_count if training.limit_batches is None else training.limit_batches * training.batch_size
    held = validation_count(train_count, dataset.validation)
    return {
        "train": (min(len(parts.train), most), train_count - held),
        "validation": (min(len(parts.validation), most), held),
        "test": (len(parts.test), test_count),
    }


def module_of(dataset: DatasetConfig) -> Any:
    """What reads the data set: torchvision, for some. Raises UserError for an unknown name."""
    if dataset.name not in _MODULES:
        raise UserError(f"unknown data set {dataset.name!r}: {nearest(dataset.name, names())}")
    return importlib.import_module(f"sparse_lab.data.{_MODULES[dataset.name]}")
