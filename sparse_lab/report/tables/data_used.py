"""Which data a run read, and how much of it, as its record says."""

from __future__ import annotations

import json

from sparse_lab.records.record import is_number
from sparse_lab.report.load.records import Finished, section

_DONE = {"train": "trained on", "validation": "validated on", "test": "tested on"}
_OF = {"train": "training images", "validation": "validation images", "test": "test images"}
_COMPUTED = {
    "device": "device",
    "instructions": "set of CPU instructions",
    "torch": "version of torch",
    "compile": "trainer.compile",
    "deterministic": "trainer.deterministic",
}


def data_of(run: Finished) -> str:
    """Return what tells one data set from another: the fingerprint, or the files' md5 where there is none."""
    data = section(run.result, "data")
    return str(data.get("fingerprint") or json.dumps(data.get("md5"), sort_keys=True, default=str))


def data_changed(run: Finished) -> bool:
    """Did the files change while the run trained?"""
    return section(run.result, "data").get("changed") is True


def partial(run: Finished) -> list[str]:
    """Return what part of the data set was left out, one line a part: 'trained on 77 of 45,000 training images'."""
    images, skipped = section(run.result, "images"), section(run.result, "data").get("skipped")
    if not images:
        return _by_config(run)
    lines = [f"left out {skipped:,} file(s) that cannot be read"] if is_number(skipped) and skipped else []
    for part, done in _DONE.items():
        used, whole = (section(images, part).get(key) for key in ("used", "whole"))
        if is_number(used) and is_number(whole) and used < whole:
            lines.append(f"{done} {used:,} of {whole:,} {_OF[part]}")
    return lines


def few(run: Finished) -> str | None:
    """Return which images selected the run's epochs, where they were fewer than there are classes."""
    part = str(run.result.get("selected_on"))
    used = section(section(run.result, "images"), part).get("used")
    classes = section(run.config, "dataset").get("num_classes")
    if not is_number(used) or not is_number(classes) or used >= classes:
        return None
    return f"epochs were selected by {used:,} {part} image{'' if used == 1 else 's'} of {classes:,} classes"


def _by_config(run: Finished) -> list[str]:
    """Of a record that does not count its images: what its settings limit."""
    dataset, training = section(run.config, "dataset"), section(run.config, "training")
    limits = {
        "trained on": dataset.get("train_limit"),
        "validated and tested on": dataset.get("eval_limit"),
    }
    lines = [f"{done} {limit:,} images only" for done, limit in limits.items() if is_number(limit)]
    if is_number(batches := training.get("limit_batches")):
        lines.append(f"trained on {batches:,} batches an epoch only")
    return lines


def computed(run: Finished) -> list[tuple[str, str]]:
    """Return (what, value) of how the run was computed; of one that went on under another way, both."""
    ways = run.result.get("computed")
    sound = [way for way in ways if isinstance(way, dict)] if isinstance(ways, list) else []
    if not sound:
        torch = section(run.result, "versions").get("torch")
        sound = [{"device": run.result.get("device"), "torch": torch}]
    return [(said, str(way[key])) for way in sound for key, said in _COMPUTED.items() if way.get(key) is not None]
