"""Photos of one's own in class folders (see `photo_files`), brought to one size.

Where they fit they are decoded once and lie in memory; else each is decoded whenever its batch comes. Both give the
same batches, bit for bit: how much memory is free has no say in a result. `dataset=imagenet` crops at random areas
instead.

A set without a test set gets one drawn (`split.drawn_test`): the same for all seeds.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sparse_lab.config import DatasetConfig
from sparse_lab.data import photo, saying
from sparse_lab.data.imagenet import files_of, md5_of_sizes
from sparse_lab.data.photo_files import Layout, Named, shown
from sparse_lab.data.source import ImageSet
from sparse_lab.data.split import drawn_test, drawn_test_count
from sparse_lab.errors import UserError
from sparse_lab.host.machine import available_memory, size

# of the memory that is available, a fourth: while the parts are cut out the photos lie there up to three times
SHARE = 4
AHEAD = 2  # batches that are decoded before they are asked for
CHUNK = 64  # photos that a thread takes at a time
FIRST_LINE, NEXT_LINES = 3.0, 10.0  # seconds between lines on how far it is
NAMED = 8  # files in a message


def check(dataset: DatasetConfig) -> None:
    """UserError: folders in no known layout, other classes in the parts, a class without a photo, not
    dataset.num_classes of them, or neither grey nor colour asked for.
    """
    files_of(dataset)


def counts(dataset: DatasetConfig) -> tuple[int, int, int]:
    """Training images, validation's among them; test images; validation images that the files hold; as if all of them
    could be read. UserError: as `check`.
    """
    layout, files = files_of(dataset)
    train = files[layout.train]
    if layout.test is not None:
        held = 0 if layout.validation is None else len(files[layout.validation])
        return len(train) + held, len(files[layout.test]), held
    test = drawn_test_count(torch.tensor([label for _, label in train]), dataset.test)
    return len(train) - test, test, 0


def load(dataset: DatasetConfig, seed: int) -> ImageSet:
    """Decode the photos, or make ready to. UserError: as `check`; photos that cannot be read, unless
    dataset.skip_corrupt leaves them out; a part or a class of which nothing is left.
    """
    layout, files = files_of(dataset)
    decoded = _decoded(layout, files, dataset)
    labels = torch.tensor([label for _, label in decoded.files], dtype=torch.int64)
    parts = [part for part, named in files.items() for _ in named]
    kept = [parts[index] for index in decoded.kept]
    tested = drawn_test(labels, dataset.test, "folder") if layout.test is None else _are(kept, layout.test)
    _check_parts(labels, tested, kept, layout, decoded)
    return ImageSet(
        _part(decoded.images, ~tested),
        labels[~tested],
        _part(decoded.images, tested),
        labels[tested],
        {"folder": md5_of_sizes(layout, files)},
        official=True,
        held=sum(part == layout.validation for part in kept),
        skipped=decoded.skipped,
    )


@dataclass(frozen=True)
class Decoded:
    """files: name and label of each photo that could be read; kept: its place among all; images: uint8 [N, C, H, W], or
    what decodes them. skipped: names of those that could not.
    """

    files: list[Named]
    kept: list[int]
    images: torch.Tensor | Undecoded
    skipped: tuple[str, ...]


_last: dict[tuple[object, ...], Decoded] = {}  # those of the last run: the next one of a sweep asks for the same


def _decoded(layout: Layout, files: dict[str, list[Named]], dataset: DatasetConfig) -> Decoded:
    named = [one for part in files.values() for one in part]
    key = (
        str(layout.base.resolve()),
        dataset.shape,
        dataset.skip_corrupt,
        dataset.exif_orientation,
        _state(layout.base, named),
    )
    if key not in _last:
        _last.clear()  # first, so that the new ones find room
        _last[key] = _decode(layout, named, dataset)
    return _last[key]


def _state(base: Path, named: list[Named]) -> str:
    """What the files are known by, without reading them."""
    digest = hashlib.sha256()
    for name, label in named:
        about = os.stat(base / name)
        line = f"{name}\0{label} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns} {about.st_ino}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _decode(layout: Layout, named: list[Named], dataset: DatasetConfig) -> Decoded:
    paths = [str(layout.base / name) for name, _ in named]
    undecoded = Undecoded(paths, dataset.shape, dataset.workers, dataset.exif_orientation)
    needed, room = math.prod(undecoded.shape), available_memory()
    fits = needed * SHARE <= room
    images = torch.empty((len(paths), *dataset.shape), dtype=torch.uint8) if fits else None
    bad: dict[int, str] = {}
    if fits or dataset.skip_corrupt:
        bad = undecoded.read_all(images, _progress(len(paths)))
    else:
        photo.check(photo.by_class((path, label) for path, (_, label) in zip(paths, named, strict=True)), [])
    _check_readable(bad, dataset.skip_corrupt)
    kept = sorted(set(range(len(paths))) - set(bad))
    skipped = tuple(named[index][0] for index in bad)
    if skipped:
        saying.say(f"folder: left out {len(bad):,} file(s) that cannot be read: {_listed(skipped)}")
    found = f"folder: {len(kept):,} photos of {dataset.num_classes:,} classes, each {saying.shape(dataset.shape)}"
    if images is None:
        saying.say(
            f"{found}: {size(needed)} are more than a quarter of the {size(room)} of memory available, so "
            f"they are decoded batch by batch, in {undecoded.threads} thread(s) (dataset.workers)"
        )
    else:
        saying.say(f"{found}: decoded once, {size(needed)} in memory")
    whole: torch.Tensor | Undecoded = undecoded if images is None else images
    return Decoded([named[index] for index in kept], kept, _part(whole, _mask(len(paths), kept)), skipped)


def _check_readable(bad: dict[int, str], skip: bool) -> None:
    if bad and not skip:
        more = f" (it and {len(bad) - 1:,} more)" if len(bad) > 1 else ""
        raise UserError(f"{bad[min(bad)]}, or leave out what cannot be read{more} with dataset.skip_corrupt=true")


def _check_parts(
    labels: torch.Tensor, tested: torch.Tensor, parts: list[str], layout: Layout, decoded: Decoded
) -> None:
    """UserError: no test photo is drawn, or nothing is left of a part, or of a class to train on."""
    if lacking := [part for part in layout.parts() if part not in parts]:
        raise UserError(f"{shown(layout.base / lacking[0])}: no photo there can be read")
    if not tested.any():
        raise UserError(
            f"{shown(layout.base)}: dataset.test draws no test photo of {len(labels):,}: raise it, or give a test/"
        )
    classes = layout.classes()
    if empty := set(range(len(classes))) - set(labels[~tested & _are(parts, layout.train)].tolist()):
        raise UserError(
            f"{shown(layout.base / layout.train / classes[min(empty)])}: no photo of the class can be read "
            f"({_listed(decoded.skipped)} cannot)"
        )


def _are(parts: list[str], part: str) -> torch.Tensor:
    return torch.tensor([one == part for one in parts], dtype=torch.bool)


def _mask(count: int, chosen: list[int]) -> torch.Tensor:
    mask = torch.zeros(count, dtype=torch.bool)
    mask[chosen] = True
    return mask


def _part(images: torch.Tensor | Undecoded, mask: torch.Tensor) -> torch.Tensor | Undecoded:
    """The images where `mask` is; no copy where that is a run of them."""
    places = mask.nonzero().flatten()
    if isinstance(images, Undecoded):
        return images.chosen(places)
    first, last = int(places[0]), int(places[-1])
    return images[first : last + 1] if last - first + 1 == len(places) else images[places]


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return shown(", ".join(names[:NAMED])) + more


def _progress(total: int) -> Callable[[int], None]:
    """Says now and then how many of them are done, from the first seconds on."""
    said, wait = time.monotonic(), FIRST_LINE

    def progress(done: int) -> None:
        nonlocal said, wait
        if time.monotonic() - said > wait:
            said, wait = time.monotonic(), NEXT_LINES
            saying.say(f"folder: {done:,} of {total:,} photos decoded")

    return progress


@dataclass(frozen=True)
class Undecoded:
    """Photos that are decoded whenever they are asked for, in threads: to Batches a tensor uint8 [N, C, H, W]. shape of
    one: (channels, height, width).
    """

    paths: list[str]
    one: tuple[int, int, int]
    workers: int
    upright: bool

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.paths), *self.one))

    @property
    def threads(self) -> int:
        return max(1, self.workers)

    def chosen(self, indices: torch.Tensor) -> Undecoded:
        return replace(self, paths=[self.paths[index] for index in indices.tolist()])

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        return next(self.batches([indices]))

    def batches(self, picks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """UserError: a photo cannot be read."""
        pool, waiting = ThreadPoolExecutor(self.threads), deque[list[Future[np.ndarray]]]()

        def first() -> torch.Tensor:
            return torch.from_numpy(np.stack([one.result() for one in waiting.popleft()]))

        try:
            for pick in picks:
                waiting.append([pool.submit(self._pixels, index) for index in pick.tolist()])
                if len(waiting) > AHEAD:
                    yield first()
            while waiting:
                yield first()
        finally:  # a loop that ends early waits for no photo that nobody will see
            pool.shutdown(cancel_futures=True)

    def _pixels(self, index: int) -> np.ndarray:
        return photo.fitted(self.paths[index], self.one[0], self.one[1:], self.upright)

    def read_all(self, into: torch.Tensor | None, progress: Callable[[int], None]) -> dict[int, str]:
        """Decode every photo, and return those that cannot be read, with a line on each. UserError: one is of a kind
        that is refused.
        """
        chunks = [range(start, min(start + CHUNK, len(self.paths))) for start in range(0, len(self.paths), CHUNK)]
        pool, bad = ThreadPoolExecutor(self.threads), dict[int, str]()
        try:
            for chunk, found in zip(chunks, pool.map(lambda chunk: self._read(chunk, into), chunks), strict=True):
                bad |= found
                progress(chunk.stop)
        finally:
            pool.shutdown(cancel_futures=True)
        return bad

    def _read(self, chunk: range, into: torch.Tensor | None) -> dict[int, str]:
        bad = {}
        for index in chunk:
            try:
                pixels = self._pixels(index)
            except photo.Unreadable as error:
                bad[index] = str(error)
            else:
                if into is not None:
                    into.numpy()[index] = pixels
        return bad
