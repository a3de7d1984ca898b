"""ImageNet, or any photos in its layout, train/CLASS/* and val/CLASS/*: decoded one by one in worker processes.

The official `val` folder is the test set; validation images are split off `train` by seed. ImageNet publishes no
md5 of single files: the record carries one md5 over all (path, size), and `official` is True because there is nothing
to compare with.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from sparse_lab.config import AugmentConfig, DatasetConfig
from sparse_lab.data import photo
from sparse_lab.data.augment import normalise
from sparse_lab.data.loader import Batch, Loader
from sparse_lab.data.plan import Plan
from sparse_lab.data.reads import photo_folder
from sparse_lab.data.seeding import generator, seed_of
from sparse_lab.data.source import Moments
from sparse_lab.errors import UserError

Item = tuple[torch.Tensor, int]


def check(dataset: DatasetConfig) -> None:
    """UserError: no train/ and val/, different classes in the two, or not dataset.num_classes of them."""
    base = photo_folder(dataset)
    train, val = ({entry.name for entry in (base / part).iterdir() if entry.is_dir()} for part in ("train", "val"))
    if train != val:
        raise UserError(f"{base}: train/ and val/ hold different classes, for instance {min(train ^ val)!r}")
    if len(train) != dataset.num_classes:
        raise UserError(f"{base} holds {len(train)} classes, but dataset.num_classes={dataset.num_classes}")


def load(dataset: DatasetConfig, seed: int) -> PhotoSet:
    """List all photos; none is decoded yet. UserError: as `check`, or a class without a photo."""
    check(dataset)
    base = photo_folder(dataset)
    try:
        train, test = (ImageFolder(str(base / part)).samples for part in ("train", "val"))
    except FileNotFoundError as error:
        raise UserError(f"{base}: {' '.join(str(error).split())}") from error
    return PhotoSet(train, test, {"imagenet": _md5(base, [*train, *test])}, official=True)


def _md5(base: Path, samples: list[tuple[str, int]]) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for path in sorted(Path(path) for path, _ in samples):
        digest.update(f"{path.relative_to(base).as_posix()} {path.stat().st_size}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class PhotoSet:
    """Paths and labels of all photos; a Source."""

    train: list[tuple[str, int]]
    test: list[tuple[str, int]]
    md5: dict[str, str]
    official: bool

    def count(self, *, test: bool) -> int:
        return len(self.test if test else self.train)

    def check_images(self, indices: torch.Tensor, dataset: DatasetConfig) -> None:
        """UserError: as `photo.check` of a sample of these training photos and of the test photos, by class."""
        photo.check(_by_class(self.train[index] for index in indices.tolist()), _by_class(self.test))

    def statistics(self, indices: torch.Tensor, dataset: DatasetConfig) -> tuple[list[float], list[float]]:
        found, transform = Moments(dataset.shape[0]), _eval_transform(dataset.size)
        for index in indices.tolist():
            found.add(transform(photo.decode(self.train[index][0])).unsqueeze(0))
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
            size=dataset.size,
            workers=dataset.workers,
            device=device,
            train_transform=_train_transform(dataset, augment) if augment is not None else None,
        )


def _by_class(samples: Iterable[tuple[str, int]]) -> list[list[str]]:
    found: dict[int, list[str]] = defaultdict(list)
    for path, label in samples:
        found[label].append(path)
    return list(found.values())


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
            _Decoder(self.paths, self.labels, transform, self.plan.seed, epoch),
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
            raise UserError(str(error).strip().splitlines()[-1].rsplit("UserError: ", 1)[-1]) from None


class _Decoder(Dataset[Item]):
    def __init__(self, paths: list[str], labels: torch.Tensor, transform: v2.Compose, seed: int, epoch: int) -> None:
        self.paths, self.labels, self.transform = paths, labels, transform
        self.seed, self.epoch = seed, epoch

    def __getitem__(self, index: int) -> Item:
        image = photo.decode(self.paths[index])
        with torch.random.fork_rng(devices=[]):
            # torchvision's transforms draw from the global generator; torch.manual_seed would reset CUDA's as well.
            torch.default_generator.manual_seed(seed_of("augment", self.seed, self.epoch, index))
            return self.transform(image), int(self.labels[index])
