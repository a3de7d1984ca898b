"""The data sets by name, and the one way from a config to loaders."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sparse_lab.config import DatasetConfig, TrainingConfig
from sparse_lab.data import reads
from sparse_lab.data.facts import CLASSES, class_names, filled
from sparse_lab.errors import SparseLabError, UserError, nearest
from sparse_lab.registering import check_name, enter

if TYPE_CHECKING:
    import torch

    from sparse_lab.data.loader import Loader
    from sparse_lab.data.source import ImageSet, Source

# Each module has check(dataset) and load(dataset, seed) -> Source.
_MODULES = {
    "digits": "digits",
    "folder": "folder",
    "arrays": "arrays",
    "cifar10": "cifar",
    "cifar100": "cifar",
    "imagenet": "imagenet",
    "fashion_mnist": "fashion_mnist",
    "synthetic": "synthetic",
}


Arrays = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor", "torch.Tensor"]
_OWN: dict[str, Own] = {}


@dataclass(frozen=True)
class Own:
    """A registered data set, in the place of a module."""

    name: str
    read: Callable[[DatasetConfig, int], Arrays]

    def check(self, dataset: DatasetConfig) -> None:
        if self.name in reads.OWN:
            reads.own_files(dataset)

    def load(self, dataset: DatasetConfig, seed: int) -> ImageSet:
        """Raises UserError where it does not return what it is to return."""
        import torch

        from sparse_lab.data.source import ImageSet, md5_of_tensors

        found = self.read(dataset, seed)
        whole = isinstance(found, tuple) and len(found) == 4 and all(isinstance(one, torch.Tensor) for one in found)
        if not whole:
            raise UserError(f"data set {self.name!r}: images, labels, test images and test labels are to be returned")
        shape = dataset.shape
        for part, images, labels in (("training", *found[:2]), ("test", *found[2:])):
            kinds = (torch.uint8, torch.float32) if part == "training" else (found[0].dtype,)
            if images.dtype not in kinds or images.shape[1:] != shape or not len(images):
                wanted = f"{' or '.join(map(_plain, kinds))} [N, {', '.join(map(str, shape))}]"
                raise UserError(
                    f"data set {self.name!r}: {part} images are to be {wanted} (dataset.channels={dataset.channels} "
                    f"dataset.image_size={dataset.image_size}), not {_plain(images.dtype)} {list(images.shape)}"
                )
            if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
                raise UserError(
                    f"data set {self.name!r}: {part} labels are to be int64 [{len(images)}], not "
                    f"{_plain(labels.dtype)} {list(labels.shape)}"
                )
        return ImageSet(*found, {self.name: md5_of_tensors(found)}, official=True)


def _plain(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def register_dataset(name: str, load: Callable[[DatasetConfig, int], Arrays], *, files: reads.Files | None) -> None:
    """Make a data set of your own known: `dataset=NAME`, with a file dataset/NAME.yaml (`sparse_lab.register_choices`)
    that sets at least `name: NAME`, `root: ${paths.data}`, `num_classes`, `image_size` and `channels` (3 where it is
    not set; mean and std are computed from the training images where they are not set).

    load: takes the config group `dataset` and the run's seed, and returns images, labels, test images and test labels:
    [N, *dataset.shape], uint8 or float32 (whose values are taken as they are), and int64 [N] tensors. It neither
    splits, augments nor normalises them.
    files: takes `dataset` and returns the names below dataset.root of all files that load reads: a run is known by what
    they hold. None: the data set is made, and no file below dataset.root is read.

    Raise SparseLabError for a name that is taken or no plain word, and where load or files is no function.
    """
    check_name("data set", name, {*_MODULES, *_OWN})
    if not callable(load) or not (files is None or callable(files)):
        raise SparseLabError(f"data set {name!r}: load and files are functions, or files=None where it is made")

    def forget() -> None:
        del _OWN[name]
        reads.OWN.pop(name, None)
        reads.MADE.discard(name)

    _OWN[name] = Own(name, load)
    if files is None:
        reads.MADE.add(name)
    else:
        reads.OWN[name] = files
    enter("data set", name, forget)


@dataclass(frozen=True)
class Data:
    """Three loaders, and what a run's record says about the data.

    Attributes:
        train: shuffled and augmented; validation, test: in a fixed order, plain.
        md5: file below dataset.root -> md5 seen. Key "digits", "synthetic": of the arrays; "imagenet", "folder": of all
            (path, size).
        official: the md5s are the publisher's. True as well where there is nothing to compare (digits, synthetic,
            imagenet, folder, arrays).
        shape: (channels, height, width) of an image.
        scale: what a value of an image is divided by first: 255 where they are bytes, 1 where they are floats.
        mean, std: by which images are normalised then, a number a channel.
        skipped: files below dataset.root that cannot be read and were left out.
        images: train, validation, test -> how many images are used of how many that there are, before any limit.
        class_names: by label, where the files name them.
    """

    train: Loader
    validation: Loader
    test: Loader
    num_classes: int
    shape: tuple[int, int, int]
    scale: int
    mean: list[float]
    std: list[float]
    md5: dict[str, str]
    official: bool
    images: dict[str, tuple[int, int]]
    skipped: tuple[str, ...]
    class_names: tuple[str, ...] = ()


def names() -> list[str]:
    """All known data sets."""
    return [*_MODULES, *_OWN]


def check(dataset: DatasetConfig) -> None:
    """Quick test that the files are there and intact, without decoding them.

    Files that dataset.download would fetch may still be missing: `build` fetches them.

    Raises:
        UserError: as `build`, for an unknown name, missing or foreign files, or sizes that do not fit.
    """
    module, dataset = module_of(dataset), filled(dataset)
    if (there := CLASSES.get(dataset.name, 0)) > dataset.classes:
        raise UserError(
            f"{dataset.name} has labels from 0 to {there - 1}, but dataset.num_classes={dataset.classes} allows 0 to "
            f"{dataset.classes - 1}"
        )
    module.check(dataset)
    if dataset.mean is not None or dataset.std is not None:
        _check_normalisation(_spread(dataset))


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

    module, dataset = module_of(dataset), filled(dataset)
    check_shares(training, world_size)
    source = module.load(dataset, seed)
    parts = split(
        source.count(test=False),
        source.count(test=True),
        dataset.validation,
        seed,
        dataset.train_limit,
        dataset.eval_limit,
        source.held,
    )
    source.check_images(parts.train, dataset)
    dataset = _normalised(dataset, source, parts.train)
    device = torch.device(device)

    def plan(limit: int | None, train: bool = False) -> Plan:
        return Plan(training.batch_size, train, train, seed, limit, rank, world_size)

    limit = training.limit_batches
    return Data(
        train=source.loader(parts.train, plan(limit, train=True), dataset, device, augment=training.augment),
        validation=source.loader(parts.validation, plan(limit), dataset, device),
        test=source.loader(parts.test, plan(None), dataset, device, test=True),
        num_classes=dataset.classes,
        shape=dataset.shape,
        scale=source.scale,
        mean=dataset.normalisation[0],
        std=dataset.normalisation[1],
        md5=source.md5,
        official=source.official,
        images=_used(source.count(test=False), source.count(test=True), source.held, dataset, training),
        skipped=source.skipped,
        class_names=class_names(dataset),
    )


def _normalised(dataset: DatasetConfig, source: Source, train: torch.Tensor) -> DatasetConfig:
    """With mean and std: those of the training images where the config has none. Numbers that are all the same stand
    for any number of channels. UserError: one of them is missing, or they are not a number a channel.
    """
    dataset = _spread(dataset)
    if dataset.mean is None and dataset.std is None:
        mean, std = source.statistics(train, dataset)
        return replace(dataset, mean=mean, std=std)
    _check_normalisation(dataset)
    return dataset


def _spread(dataset: DatasetConfig) -> DatasetConfig:
    """With one number for all channels written out for each."""
    for name in ("mean", "std"):
        if len(set(numbers := getattr(dataset, name) or [])) == 1:
            dataset = replace(dataset, **{name: numbers[:1] * dataset.shape[0]})  # type: ignore[arg-type]
    return dataset


def _check_normalisation(dataset: DatasetConfig) -> None:
    channels = dataset.shape[0]
    for name, numbers in (("mean", dataset.mean), ("std", dataset.std)):
        if numbers is None or len(numbers) != channels or (name == "std" and min(numbers) <= 0):
            raise UserError(
                f"dataset.{name}={'null' if numbers is None else numbers}: {channels} number(s), one a channel, std "
                "above 0; dataset.mean=null dataset.std=null are computed from the training images"
            )


def check_shares(training: TrainingConfig, world_size: int) -> None:
    """Raise UserError where a batch cannot be shared out evenly over the processes of a run."""
    if training.batch_size % world_size:
        raise UserError(f"training.batch_size={training.batch_size} does not divide over {world_size} devices")


def expected_images(dataset: DatasetConfig, training: TrainingConfig) -> dict[str, tuple[int, int]] | None:
    """Return what `Data.images` will say, before anything is read; None where only the data set's own code knows. Of
    photos that cannot be read nothing is known yet. UserError: as `check`, or fewer than two training images.
    """
    module, dataset = module_of(dataset), filled(dataset)
    if not hasattr(module, "counts"):
        return None
    train, test, held = module.counts(dataset)
    return _used(train, test, held, dataset, training)


def _used(
    train_count: int, test_count: int, held: int, dataset: DatasetConfig, training: TrainingConfig
) -> dict[str, tuple[int, int]]:
    from sparse_lab.data.split import validation_count

    most = train_count + test_count if training.limit_batches is None else training.limit_batches * training.batch_size
    held = held or validation_count(train_count, dataset.validation)
    train = min(train_count - held, dataset.train_limit or train_count)
    validation, test = (min(count, dataset.eval_limit or count) for count in (held, test_count))
    return {
        "train": (min(train, most), train_count - held),
        "validation": (min(validation, most), held),
        "test": (test, test_count),
    }


def module_of(dataset: DatasetConfig) -> Any:
    """What reads the data set: torchvision, for some. Raises UserError for an unknown name."""
    if dataset.name in _OWN:
        return _OWN[dataset.name]
    if dataset.name not in _MODULES:
        raise UserError(f"dataset.name: unknown data set {dataset.name!r}; {nearest(dataset.name, names())}")
    return importlib.import_module(f"sparse_lab.data.{_MODULES[dataset.name]}")
