"""ImageNet, or any photos in its layout, train/CLASS/* and val/CLASS/*: decoded one by one in worker processes.

The official `val` folder is the test set; validation images are split off `train` by seed. ImageNet publishes no
md5 of single files: the record carries one md5 over all (path, size), and `official` is True because there is nothing
to compare with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from sparse_lab.config import AugmentConfig, DatasetConfig
from sparse_lab.data import photo, photo_files
from sparse_lab.data.augment import normalise
from sparse_lab.data.loader import Batch, Loader
from sparse_lab.data.plan import Plan
from sparse_lab.data.seeding import generator, seed_of
from sparse_lab.data.source import BYTE, Levels
from sparse_lab.errors import UserError

Item = tuple[torch.Tensor, int]


def check(dataset: DatasetConfig) -> None:
    """UserError: no train/ and val/, different classes in the two, a class without a photo, not dataset.num_classes of
    them, or neither grey nor colour asked for.
    """
    files_of(dataset)


def counts(dataset: DatasetConfig) -> tuple[int, int, int]:
    """Training images, validation's among them; test images; validation images that the files hold. UserError: as
    `check`.
    """
    layout, files = files_of(dataset)
    train, test = (len(files[part]) for part in layout.parts())
    return train, test, 0


def load(dataset: DatasetConfig, seed: int) -> PhotoSet:
    """List all photos; none is decoded yet. UserError: as `check`."""
    layout, files = files_of(dataset)
    train, test = ([(str(layout.base / name), label) for name, label in files[part]] for part in layout.parts())
    return PhotoSet(train, test, {"imagenet": md5_of_sizes(layout, files)}, official=True)


def files_of(dataset: DatasetConfig) -> tuple[photo_files.Layout, dict[str, list[photo_files.Named]]]:
    """Where the photos lie, and those of each part. UserError: as `check`."""
    layout = photo_files.layout_of(dataset)
    files, classes = photo_files.listed(layout), len(layout.classes())
    if classes != dataset.num_classes:
        raise UserError(
            f"{photo_files.shown(layout.base)} holds {classes:,} classes, but dataset.num_classes="
            f"{dataset.num_classes}: dataset.num_classes=null counts them"
        )
    if dataset.channels not in (1, 3):
        raise UserError(f"dataset.channels={dataset.channels}: photos are read in colour (3) or in grey (1)")
    return layout, files


def md5_of_sizes(layout: photo_files.Layout, files: dict[str, list[photo_files.Named]]) -> str:
    """One md5 over the name and size of every photo."""
    digest = hashlib.md5(usedforsecurity=False)
    for path in sorted(layout.base / name for part in files.values() for name, _ in part):
        line = f"{path.relative_to(layout.base).as_posix()} {path.stat().st_size}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


@dataclass(frozen=True)
class PhotoSet:
    """Paths and labels of all photos; a Source."""

    train: list[tuple[str, int]]
    test: list[tuple[str, int]]
    md5: dict[str, str]
    official: bool
    held: int = 0
    scale: int = BYTE
    skipped: tuple[str, ...] = ()

    def count(self, *, test: bool) -> int:
        return len(self.test if test else self.train)

    def check_images(self, indices: torch.Tensor, dataset: DatasetConfig) -> None:
        """UserError: as `photo.check` of a sample of these training photos and of the test photos, by class."""
        photo.check(photo.by_class(self.train[index] for index in indices.tolist()), photo.by_class(self.test))

    def statistics(self, indices: torch.Tensor, dataset: DatasetConfig) -> tuple[list[float], list[float]]:
        channels = dataset.shape[0]
        found, transform = Levels(channels), _eval_transform(dataset.size)
        for index in indices.tolist():
            found.add(transform(photo.decode(self.train[index][0], channels, dataset.exif_orientation)).unsqueeze(0))
        return found.mean_and_std()

    def loader(
        self,
        indices: torch.Tensor,
        plan: Plan,
        dataset: DatasetConfig,
        device: torch.device,
        *,
        test: bool = False,
        augment: AugmentConfig | None = None,
    ) -> Photos:
        samples = self.test if test else self.train
        mean, std = dataset.normalisation
        chosen = [samples[index] for index in indices.tolist()]
        return Photos(
            paths=[path for path, _ in chosen],
            labels=torch.tensor([label for _, label in chosen], dtype=torch.int64),
            plan=plan,
            mean=mean,
            std=std,
            channels=dataset.shape[0],
            upright=dataset.exif_orientation,
            size=dataset.size,
            workers=dataset.workers,
            device=device,
            train_transform=_train_transform(dataset, augment) if augment is not None else None,
        )


def _train_transform(dataset: DatasetConfig, augment: AugmentConfig) -> v2.Compose:
    """Random area and shape (Szegedy et al. 2015), then the flip; crop_padding and padding_mode have no say here."""
    flip = 0.5 if augment.flip and dataset.mirror else 0.0
    return v2.Compose([v2.RandomResizedCrop(dataset.size), v2.RandomHorizontalFlip(flip), v2.PILToTensor()])


def _eval_transform(size: tuple[int, int]) -> v2.Compose:
    shorter = round(max(size) * 256 / 224)
    return v2.Compose([v2.Resize(shorter), v2.CenterCrop(size), v2.PILToTensor()])


@dataclass(kw_only=True, eq=False)
class Photos(Loader):
    """A Loader that decodes. What a photo looks like depends on (seed, epoch, photo), not on the number of workers."""

    paths: list[str]
    channels: int
    upright: bool
    size: tuple[int, int]
    workers: int
    device: torch.device
    train_transform: v2.Compose | None = None

    def _from(self, first: int) -> Iterator[Batch]:
        order = self.plan.order(self.count, self.epoch)
        picks = [order[block] for block in self.plan.blocks(self.count)[first:]]
        return self._decoded(picks, self.train_transform or _eval_transform(self.size), self.epoch)

    def picked(self, picks: list[torch.Tensor]) -> list[Batch]:
        return list(self._decoded(picks, _eval_transform(self.size), 0))

    def _decoded(self, picks: list[torch.Tensor], transform: v2.Compose, epoch: int) -> Iterator[Batch]:
        batches = DataLoader(
            _Decoder(self.paths, self.labels, (self.channels, self.upright), transform, self.plan.seed, epoch),
            batch_sampler=[pick.tolist() for pick in picks],
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=generator("workers", self.plan.seed, epoch),  # else it draws from the global one
        )
        mean, std = self.statistics(self.device)
        try:
            for images, labels in batches:
                images, labels = (part.to(self.device, non_blocking=True) for part in (images, labels))
                yield normalise(images, mean, std), labels
        except UserError as error:
            # A worker's error arrives with its whole traceback as text; the last line is the message.
            raise UserError(str(error).strip().splitlines()[-1].rsplit(f"{type(error).__name__}: ", 1)[-1]) from None


class _Decoder(Dataset[Item]):
    """read: what `photo.decode` is told beside the path."""

    def __init__(
        self,
        paths: list[str],
        labels: torch.Tensor,
        read: tuple[int, bool],
        transform: v2.Compose,
        seed: int,
        epoch: int,
    ) -> None:
        self.paths, self.labels, self.read, self.transform = paths, labels, read, transform
        self.seed, self.epoch = seed, epoch

    def __getitem__(self, index: int) -> Item:
        image = photo.decode(self.paths[index], *self.read)
        with torch.random.fork_rng(devices=[]):
            # torchvision's transforms draw from the global generator; torch.manual_seed would reset CUDA's as well.
            torch.default_generator.manual_seed(seed_of("augment", self.seed, self.epoch, index))
            return self.transform(image), int(self.labels[index])
