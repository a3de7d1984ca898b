"""An evaluation: a network on images, what was found, and the files that say so."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparse_lab.errors import UserError
from sparse_lab.evaluate.images import Images
from sparse_lab.evaluate.metrics import Tally
from sparse_lab.evaluate.picture import draw
from sparse_lab.evaluate.subject import Subject
from sparse_lab.host.machine import version
from sparse_lab.records.atomic_io import printable, write_record
from sparse_lab.records.record import BadRecord, read_record
from sparse_lab.records.redaction import clean
from sparse_lab.records.system import device_name
from sparse_lab.training.evaluate import DIGITS

FOLDER = "evaluations"
LONGEST = 60  # characters of a part of a file's name


@dataclass(frozen=True)
class Evaluation:
    """record: what NAME.json says. confusion: int64 [classes, classes], true by predicted. names: of the classes."""

    name: str
    record: dict[str, Any]
    confusion: torch.Tensor
    names: tuple[str, ...]


def evaluate(subject: Subject, images: Images) -> Evaluation:
    """Show the network all the images. Raise UserError where its answers are no numbers, or not one a class."""
    tally = Tally(subject.classes)
    for batch, labels in images:
        tally.add(subject.answer(batch), labels)
    names = subject.names or tuple(map(str, range(subject.classes)))
    digest = subject.digest()
    record = {
        "network": {**subject.about, "file": subject.path.name, "sha256": digest},
        "data": {
            "name": images.title,
            "said": images.said,
            "split": images.split,
            "used": images.used,
            "whole": images.whole,
            "md5": images.md5,
            "trained_on_these_files": images.own,
            "classes_matched_by": images.matched,
            "classes_without_an_image": list(images.absent),
        },
        "normalise": {"scale": subject.scale, "mean": subject.mean, "std": subject.std},
        **tally.found(),
        "per_class": _per_class(tally, names),
        "confusion": _confusion(tally.confusion, names),
        "computed": {
            "by": subject.arithmetic,
            "device": device_name(subject.device),
            "versions": {package: version(package) for package in ("sparse_lab", "torch")},
        },
    }
    key = repr((digest, images.key, record["normalise"]))
    path = subject.path
    words = [
        path.stem if path.suffix == ".ckpt" else path.name,
        images.title,
        images.split,
        hashlib.sha256(key.encode()).hexdigest()[:10],
    ]
    return Evaluation("-".join(_plain(word) for word in words), record, tally.confusion, names)


def _plain(word: str) -> str:
    """A part of a file's name: letters, digits, and what stands between them."""
    return re.sub(r"[^A-Za-z0-9_.+]+", "_", word).strip(".")[:LONGEST] or "_"


def _per_class(tally: Tally, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    hits, images = tally.confusion.diagonal().tolist(), tally.confusion.sum(1).tolist()
    return {
        name: {"images": count, "accuracy": round(100.0 * hit / count, DIGITS) if count else None}
        for name, hit, count in zip(names, hits, images, strict=True)
    }


def _confusion(confusion: torch.Tensor, names: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """True class -> predicted class -> images, where there are any."""
    found: dict[str, dict[str, int]] = {}
    for true, predicted in confusion.nonzero().tolist():
        found.setdefault(names[true], {})[names[predicted]] = int(confusion[true, predicted])
    return found


def folder_of(subject: Subject, out: Path | None) -> Path:
    """Make the folder that the evaluation goes to, and return it. Raise UserError where that cannot be."""
    folder = out or subject.folder / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): choose another folder with --out DIR") from None
    return folder


def write(done: Evaluation, folder: Path) -> str:
    """Write NAME.json and NAME.png, each whole; return what became of those that were there. Raise UserError."""
    path, picture = folder / f"{done.name}.json", folder / f"{done.name}.png"
    try:
        before = read_record(path) if path.exists() else None
    except BadRecord as error:
        before = {"damaged": str(error)}
    if before == clean(done.record) and picture.is_file():
        return f"{path} says the same already, and {picture.name} is beside it"
    try:
        write_record(path, done.record)
        title = f"{done.record['network']['name'] or done.record['network']['file']} on {done.record['data']['said']}"
        draw(done.confusion.numpy(), [printable(name) for name in done.names], printable(title), picture)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another folder with --out DIR") from None
    changed = "" if before is None or before == clean(done.record) else f", in place of {_other(before, done.record)}"
    return f"wrote {path} and {picture.name}{changed}"


def _other(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Why the same request has said something else."""
    if "damaged" in before:
        return f"a file that was {before['damaged']}"
    differ = [key for key in now if before.get(key) != clean(now[key])]
    return f"one that differed in {', '.join(differ)}"
