"""Which images a network is shown: its run's own test set, or others, in the words of the command. They are normalised
as the network's were, and their labels are the network's.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_lab import data
from sparse_lab.config import Config, DatasetConfig, conf_dir
from sparse_lab.data import npz
from sparse_lab.data.facts import class_names, own_parts
from sparse_lab.data.loader import Loader
from sparse_lab.data.photo_files import shown
from sparse_lab.data.plan import Plan
from sparse_lab.data.reads import PHOTOS
from sparse_lab.data.source import Source
from sparse_lab.data.split import Parts, split
from sparse_lab.errors import UserError, nearest
from sparse_lab.evaluate.own_run import Own
from sparse_lab.evaluate.subject import Subject
from sparse_lab.experiment.compose import ConfigSource, leave_out_plugins_own
from sparse_lab.experiment.compose import split as split_words
from sparse_lab.experiment.quoting import quoted

SPLITS = ("test", "validation", "train")
ALL = "all"
BATCH, PIXELS = 256, 2**22  # images that are computed at a time, and pixels of them
ALLOWED = ("dataset", "paths.data")  # what words for data may set, and keys below dataset
NAMED = 5  # classes in a line
FROM_NETWORK = ("mean", "std")
SHARES = ("test", "validation")  # of the images, what a test set and a validation set are drawn as
DRAWN = tuple(f"dataset.{share}=" for share in SHARES)


@dataclass(frozen=True)
class Images:
    """said: which they are, for a person. split: test, validation, train, or all. used, whole: how many are shown of
    how many that there are. own: are they of the files that the network was trained on? None where that is not known.
    absent: classes of the network without an image. key: what tells them apart from others.
    """

    loaders: tuple[Loader, ...]
    translation: Tensor
    title: str
    said: str
    split: str
    used: int
    whole: int
    md5: dict[str, str]
    own: bool | None
    matched: str
    absent: tuple[str, ...] = ()
    key: str = field(default="", repr=False)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches: images normalised, float32 [N, C, H, W], and the network's labels int64 [N]."""
        for loader in self.loaders:
            for images, labels in loader:
                yield images, self.translation.to(labels.device)[labels]


def chosen(subject: Subject, words: Sequence[str], asked: str | None) -> Images:
    """Return the images that `words` ask for: none, the run's own; a path, photos in folders or an .npz file; or
    dataset=... and other words of the command.

    asked: the split. None: the test set; of other data without one, all of them. Raise UserError.
    """
    words = _as_words(words)
    dataset, seed = _dataset(subject, words)
    # other data than the run's, without a test set of their own
    whole = any(_key(word) == "dataset" for word in words) and "test" not in own_parts(dataset)
    whole = whole and not any(word.startswith(DRAWN[0]) for word in words)
    if whole and asked is None:  # whatever is drawn is put together again
        dataset = replace(dataset, test=0.5)
    source = _loaded(subject, dataset, seed)
    if subject.scale not in (None, source.scale):
        kinds = {255: "bytes, 0 to 255", 1: "numbers that are taken as they are"}
        raise UserError(
            f"{_title(dataset)} holds {kinds[source.scale]}, the network was trained on {kinds[subject.scale]}"
        )
    own = subject.own
    same = None if own is None or own.md5 is None else own.md5 == source.md5
    if same and own is not None and words:  # else images that it was trained on would be among the test set
        if given := next((word for word in words if word.startswith(DRAWN)), None):
            raise UserError(f"--data {given}: these are the files of the run itself, and stay split as they were")
        dataset, seed = replace(dataset, **{key: getattr(own.config.dataset, key) for key in SHARES}), own.config.seed
        source = _loaded(subject, dataset, seed)
    which = asked or (ALL if whole and not same else "test")
    if same:
        note = ", as its run split it"
    else:
        note = ", of files that are not those that it was trained on" if same is False and not words else ""
    return _images(subject, dataset, source, seed, which, same, note)


def _loaded(subject: Subject, dataset: DatasetConfig, seed: int) -> Source:
    try:
        return data.module_of(dataset).load(dataset, seed)
    except UserError:
        if dataset.name == "arrays":  # which knows a config and no network
            found = npz.npz_of(replace(dataset, channels=None, image_size=None))
            _check_shape(subject, found.shape, dataset)
        raise


def _check_shape(subject: Subject, shape: tuple[int, int, int], dataset: DatasetConfig) -> None:
    if shape != subject.shape:
        wanted, given = ("x".join(map(str, one)) for one in (subject.shape, shape))
        raise UserError(f"the network takes images of {wanted}, and those of {_title(dataset)} are {given}")


def _dataset(subject: Subject, words: Sequence[str]) -> tuple[DatasetConfig, int]:
    """The settings of the data and the seed that splits them."""
    own = subject.own
    if not words and own is None:
        raise UserError(
            f"{subject.path} is in no run's folder whose data are known: say which images it is shown, as in "
            "--data DIR, --data FILE.npz or --data dataset=cifar10 paths.data=DIR"
        )
    if words:
        config = _composed(subject, words, own)
        dataset, seed = config.dataset, config.seed
    else:
        assert own is not None
        dataset, seed = replace(own.config.dataset, download=False), own.config.seed
    _check_shape(subject, dataset.shape, dataset)
    if dataset.name not in PHOTOS and dataset.classes != subject.classes:
        raise UserError(
            f"the network knows {subject.classes} classes, and {_title(dataset)} has {dataset.classes} "
            "(dataset.num_classes)"
        )
    return replace(dataset, mean=subject.mean, std=subject.std), seed


def _as_words(words: Sequence[str]) -> list[str]:
    """The command's words for a path; other words as they are."""
    if not words:
        return []
    path = Path(words[0]) if len(words) == 1 else None
    if path is not None and path.is_dir():
        return ["dataset=folder", f"paths.data={quoted(path.absolute())}"]
    if path is not None and path.is_file() and path.suffix == ".npz":
        return ["dataset=arrays", f"dataset.file={quoted(path.absolute())}"]
    if len(words) != 1 or "=" in words[0]:
        if bare := next((word for word in words if "=" not in word), None):
            raise UserError(
                f"--data {bare}: give one path, or words of the command, as in dataset=folder paths.data=DIR"
            )
        return list(words)
    raise UserError(f"--data {words[0]}: no folder of photos, no .npz file, and no word as in dataset=cifar10")


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def _composed(subject: Subject, words: Sequence[str], own: Own | None) -> Config:
    """What the command makes of the words; where they choose no data set, of the run's own settings with them."""
    leave_out_plugins_own()
    source = ConfigSource(conf_dir())
    _check_words(source, words)
    keys = [_key(word) for word in words]
    if "dataset" not in keys and own is None:
        raise UserError(f"--data {words[0]}: say of which data set, as in dataset=folder")
    first = [] if "dataset" in keys or own is None else [f"dataset={own.config.dataset.name}"]
    choices, values = split_words(source, [*first, *words])
    composed = copy.deepcopy(source.compose(list(choices)))
    if first and own is not None:
        for name, value in vars(own.config.dataset).items():
            composed.set("paths.data" if name == "root" else f"dataset.{name}", value)
    elif "dataset.name" not in keys:
        for name, value in _of_the_network(subject, str(composed.cfg.dataset.name)).items():
            composed.set(f"dataset.{name}", value)
    for key, value in values:
        composed.set(key, value)
    config = composed.config()
    config.seed = config.seed if own is None else own.config.seed
    return config


def _check_words(source: ConfigSource, words: Sequence[str]) -> None:
    """Raise UserError for words that are none of data, or would show them otherwise than the network saw its own."""
    for override in source.parse(list(words)):
        key = override.get_key_element().lstrip("+~")
        source.check_names(override)
        if key not in ALLOWED and not key.startswith("dataset."):
            raise UserError(f"--data {override.input_line}: words for data are {', '.join(ALLOWED)} and dataset.KEY")
        if override.is_sweep_override():
            raise UserError(f"--data {override.input_line}: give it one value")
        if key.removeprefix("dataset.") in FROM_NETWORK:
            raise UserError(f"--data {override.input_line}: images are normalised as the network's were")


def _of_the_network(subject: Subject, name: str) -> dict[str, Any]:
    """What photos and arrays are brought to, or must be, to be shown to the network."""
    if name not in (*PHOTOS, "arrays"):
        return {}
    classes = subject.classes if name == "arrays" else None
    return {"channels": subject.shape[0], "image_size": list(subject.shape[1:]), "num_classes": classes}


def _title(dataset: DatasetConfig) -> str:
    """What a person calls the data."""
    path = dataset.root if dataset.name == "folder" else dataset.file if dataset.name == "arrays" else None
    return dataset.name if path is None else shown(Path(path).absolute().name) or dataset.name


def _images(
    subject: Subject, dataset: DatasetConfig, source: Source, seed: int, which: str, same: bool | None, note: str
) -> Images:
    picked, whole = _picked(dataset, source, seed, which)
    batch = max(1, min(BATCH, PIXELS // (subject.shape[1] * subject.shape[2])))
    loaders = tuple(
        source.loader(indices, Plan(batch), dataset, subject.device, test=test)
        for test, indices in picked
        if len(indices)
    )
    translation, matched = _translation(subject, dataset)
    there = {int(translation[label]) for loader in loaders for label in loader.labels.unique().tolist()}
    used = sum(len(indices) for _, indices in picked)
    names = subject.names or tuple(map(str, range(subject.classes)))
    sizes = f"{used:,} images" if used == whole else f"{used:,} of {whole:,} images"
    part = "all of" if which == ALL else f"the {which} set of"
    digest = hashlib.sha256(repr((dataset.name, sorted(source.md5.items()), which, dataset.size)).encode())
    for _, indices in picked:
        digest.update(indices.numpy().tobytes())
    digest.update(translation.numpy().tobytes())
    return Images(
        loaders,
        translation,
        _title(dataset),
        f"{part} {_title(dataset)}, {sizes}{note}",
        which,
        used,
        whole,
        source.md5,
        same,
        matched,
        tuple(name for label, name in enumerate(names) if label not in there),
        digest.hexdigest(),
    )


def _picked(dataset: DatasetConfig, source: Source, seed: int, which: str) -> tuple[list[tuple[bool, Tensor]], int]:
    """Indices into the test images (True) and the training images (False), and how many such images there are."""
    counts = source.count(test=False), source.count(test=True)
    if which == ALL:
        own = [(False, torch.arange(counts[0])), (True, torch.arange(counts[1]))]
        return _first(own, dataset.eval_limit), sum(counts)

    def parts(train: int | None, evaluated: int | None) -> Parts:
        return split(*counts, dataset.validation, seed, train, evaluated, source.held)

    used, whole = parts(dataset.train_limit, dataset.eval_limit), parts(None, None)
    return [(which == "test", getattr(used, which))], len(getattr(whole, which))


def _first(picked: list[tuple[bool, Tensor]], limit: int | None) -> list[tuple[bool, Tensor]]:
    """As many of them as `limit` allows, drawn evenly from the beginning to the end."""
    count = sum(len(indices) for _, indices in picked)
    if limit is None or limit >= count:
        return picked
    places = torch.arange(limit) * count // limit
    found, begin = [], 0
    for test, indices in picked:
        here = places[(places >= begin) & (places < begin + len(indices))] - begin
        found.append((test, indices[here]))
        begin += len(indices)
    return found


def _translation(subject: Subject, dataset: DatasetConfig) -> tuple[Tensor, str]:
    """The network's label for each label of the data, and by what they were matched."""
    theirs = class_names(dataset)
    if theirs and subject.names:
        if unknown := [name for name in theirs if name not in subject.names]:
            more = f" and {len(unknown) - NAMED:,} more" if len(unknown) > NAMED else ""
            raise UserError(
                f"{_title(dataset)}: the network knows no class {', '.join(map(repr, map(shown, unknown[:NAMED])))}"
                f"{more}: rename or move away what is none of its own; {nearest(unknown[0], map(shown, subject.names))}"
            )
        return torch.tensor([subject.names.index(name) for name in theirs]), "name"
    if dataset.classes != subject.classes:
        raise UserError(
            f"{_title(dataset)} has {dataset.classes} classes and the network {subject.classes}: without names on both "
            "sides they are matched by number, and must be as many"
        )
    return torch.arange(subject.classes), "number"
