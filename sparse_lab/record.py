"""A run's identity, its folder, its status and its results on disk. CSV and JSON here are the source of truth.

A run's name is a hash of what matters in its config, so the same request finds the same folder: a finished run is
not run again, an interrupted one goes on. Everything is written whole: a temporary file, then a rename.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sparse_lab import stages
from sparse_lab.compute.choice import settled
from sparse_lab.config import Config, MethodConfig, UserError
from sparse_lab.secrets import clean, redact
from sparse_lab.whole import CHECKSUM, damaged, seal_holds, write_record, write_whole

RESULT_KEYS = {"name", "test_accuracy", "kept", "total", "seconds"}
SCHEDULE_KEYS = {
    "one_shot": (),
    "constant": (),
    "iterative": ("share", "round_epochs"),
    "cubic": ("begin", "end", "every", "initial"),
    "alternating": ("begin", "end", "turn", "last_dense"),
    "soft": (),
    "layerwise": ("round_epochs",),
    "at_end": (),
}


def identity(config: Config) -> dict[str, Any]:
    """What matters in a config: no paths, loggers or devices, and no part or schedule that the method does not use.

    A file that a run starts from counts by its content, compute=auto as what it picks here. Dense arithmetic and
    clipping over all positions go without saying: they were there before there was a choice.
    """
    config = settled(config)
    plain = _matters(config)
    if config.compute == "dense":
        del plain["compute"]
    for recipe in (plain["training"], plain["training"]["finetune"], plain["training"]["regrow"]):
        if recipe["clip_norm"] is None or recipe["clip_over"] == "all" or not config.method.prunes:
            del recipe["clip_over"]
    for group, key in (("model", "weights"), ("regrow", "reference")):
        part = plain["model"] if group == "model" else plain["method"]["regrow"]
        if part[key] not in (None, "torchvision"):
            part[key] = _fingerprint(part[key])
    method = config.method
    if not method.prunes:
        for group, key in (("training", "finetune"), ("method", "prune")):
            del plain[group][key]
        del plain["sparsity"], plain["schedule"]
    else:
        used = SCHEDULE_KEYS[config.schedule.name]
        plain["schedule"] = {key: value for key, value in plain["schedule"].items() if key in ("name", *used)}
        if method.from_scratch:
            del plain["training"]["finetune"]
        if not config.sparsity.connect:
            del plain["sparsity"]["connect"]
    for path, key in _unread(config):
        del plain["method"][path][key]
    if config.schedule.name == "cubic" and method.rewires:  # pruned whenever weights are exchanged
        del plain["schedule"]["every"]
    if config.training.stop_after is None:
        del plain["training"]["stop_after"]
    if not method.goes_on:
        del plain["training"]["regrow"]
    if not method.regrows:
        plain["method"]["regrow"] = {"steps": method.regrow.steps} if method.goes_on else {}
    for key in _unused(method):
        del plain["method"][key]
    return plain


def _unused(method: MethodConfig) -> list[str]:
    """Keys of the method that what it does not do would read."""
    unused = [] if method.rewires else ["rewire"]
    unused += [] if method.cyclic else ["cyclic", "cycles"]
    unused += [] if method.dyrelu else ["dyrelu", "phasing"]
    unused += [] if method.sharing else ["sharing"]
    unused += [] if method.dct else ["dct"]
    unused += [] if method.compactors else ["compactors", "compacting"]
    unused += [] if method.hypersphere else ["hypersphere", "sphere"]
    unused += [] if method.prunes_filters else ["filters"]
    return unused + ([] if method.rewires or method.cyclic else ["gradients"])


def _unread(config: Config) -> list[tuple[str, str]]:
    """Keys of pruning and rewiring that the rest of their part leaves without a say."""
    method, unread = config.method, []
    if method.prunes:
        prune = method.prune
        idle = {
            "unit": prune.unit == "weights",
            "per_class": prune.per_class is None,
            "iterations": prune.iterations == 1,
        }
        idle |= {"batches": prune.per_class is not None, "rewind_weights": prune.rewind_weights is None}
        unread += [("prune", key) for key, without in idle.items() if without]
    if method.rewires:
        bounds = ("low", "high", "milestones")
        fractions = ("fraction", "fraction_end", "fraction_shape", "end")
        unread += [("rewire", key) for key in (fractions if method.rewire.low else bounds)]
        if method.rewire.unit == "steps":
            unread.append(("rewire", "unit"))
        if not method.rewire.low and config.schedule.name != "cubic":
            unread.append(("rewire", "allocation"))
    return unread


def _fingerprint(path: str) -> str:
    """SHA-256 of a file's content; the path itself where there is none to read (the request is refused elsewhere)."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return path


def _matters(part: Any) -> dict[str, Any]:
    result = {}
    for field in dataclasses.fields(part):
        if not field.metadata.get("identity", True):
            continue
        value = getattr(part, field.name)
        result[field.name] = _matters(value) if dataclasses.is_dataclass(value) else value
    return {key: value for key, value in result.items() if value != {}}


def digest(plain: dict[str, Any]) -> str:
    """First 10 hex digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:10]


def cell(config: Config) -> str:
    """The hash of everything but the seed: runs of one cell belong into one mean."""
    return digest({key: value for key, value in identity(config).items() if key != "seed"})


def run_name(config: Config) -> str:
    """Readable, then unique: vgg16-cifar10-oneshot-98.85-seed1-1a2b3c4d5e."""
    sparsity = [] if not config.method.prunes else [f"{100 * stages.final_sparsity(config):.6g}"]
    parts = [config.model.name, config.dataset.name, config.method.name, *sparsity, f"seed{config.seed}"]
    return "-".join([*parts, digest(identity(config))])


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class Elsewhere(UserError):
    """Another process has this run."""


class RunFolder:
    """One run on disk: config.yaml, status.json, metrics.csv, result.json, checkpoints/."""

    def __init__(self, config: Config) -> None:
        self.config = settled(config)
        self.name = run_name(self.config)
        self.path = Path(config.paths.outputs).expanduser().resolve() / "runs" / self.name
        self.last = self.path / "checkpoints" / "last.ckpt"
        self.previous = self.path / "checkpoints" / "previous.ckpt"
        self.best = self.path / "checkpoints" / "best.ckpt"
        self.small = self.path / "checkpoints" / "small.ckpt"
        self.status: dict[str, Any] = {}

    @property
    def has_result(self) -> bool:
        """Does a result lie here? Whether it is whole is seen when the run is asked for it."""
        return (self.path / "result.json").is_file()

    def result(self) -> dict[str, Any] | None:
        """The result of a finished run, or None. A run is finished when its result and its network are there, whole."""
        try:
            result = json.loads((self.path / "result.json").read_text(encoding="utf-8"))
            if not isinstance(result, dict) or damaged(result) or not result.keys() >= RESULT_KEYS:
                return None
            if seal_holds(self.best) is False:
                return None
        except (OSError, ValueError):  # what is torn is no result: the run is finished again from its checkpoint
            return None
        return {key: value for key, value in result.items() if key != CHECKSUM}

    @contextmanager
    def claim(self, say: Callable[[str], None], wait: bool) -> Iterator[None]:
        """Hold the run for this process. The lock goes when its holder dies.

        Raises Elsewhere while another process has it, unless `wait`; UserError when the folder cannot be written.
        """
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            lock = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - held open as long as the claim
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror}; set paths.outputs=DIR") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read().strip() or "another process"
                if not wait:
                    raise Elsewhere(f"{holder} runs it already") from None
                say(f"waiting for {self.name}: {holder} runs it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
            yield

    def set_aside_damaged(self, say: Callable[[str], None]) -> None:
        """Rename checkpoints that are not what was saved, so that the one before them is used."""
        for path, sealed in ((self.last, True), (self.previous, True), (self.best, False), (self.small, False)):
            try:
                holds = seal_holds(path)
            except FileNotFoundError:
                continue
            if holds is False or (sealed and holds is None):
                aside = path.with_name(f"{path.name}.damaged")
                os.replace(path, aside)
                say(f"WARNING: {path} is damaged (torn or changed since it was saved): set aside as {aside.name}")

    def newest(self) -> Path | None:
        """The checkpoint to go on from; damaged ones have been set aside."""
        return next((path for path in (self.last, self.previous) if path.is_file()), None)

    def begin(self) -> None:
        (self.path / "error.txt").unlink(missing_ok=True)
        write_whole(
            self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(clean(dataclasses.asdict(self.config))))
        )
        self.status = {
            "state": "running",
            "error": None,
            "started": now(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        self._write_status()

    def progress(self, epoch: int, epochs: int) -> None:
        self.status.update(epoch=epoch, epochs=epochs)
        self._write_status()

    def fail(self, error: str, details: str) -> None:
        """Mark the run failed: one line in status.json, the whole traceback in error.txt."""
        self.status.update(state="failed", error=error)
        write_whole(self.path / "error.txt", redact(details))
        self._write_status()

    def settle(self) -> None:
        """A finished run was killed before its status said so."""
        try:
            status = json.loads((self.path / "status.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            status = {}
        if isinstance(status, dict) and status.get("state") != "done":
            self.status = {**status, "state": "done", "error": None}
            self._write_status()

    def interrupt(self, line: str) -> None:
        """Mark the run stopped on demand: the same command goes on from here."""
        self.status.update(state="interrupted", error=line)
        self._write_status()

    def finish(self, result: dict[str, Any]) -> None:
        write_record(self.path / "result.json", result)
        self.previous.unlink(missing_ok=True)  # last.ckpt is enough to write the result again
        self.status.update(state="done", error=None)
        self._write_status()

    def _write_status(self) -> None:
        self.status["updated"] = now()
        write_whole(self.path / "status.json", json.dumps(clean(self.status), indent=2) + "\n")

    def add_metrics(self, row: dict[str, Any]) -> None:
        """Append one epoch to metrics.csv (with a head line if it is new)."""
        path = self.path / "metrics.csv"
        new = not path.exists()
        with open(path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)

    def cut_metrics(self, epochs: int) -> None:
        """Keep only the first `epochs` rows: later ones were written after the checkpoint that the run goes on from."""
        path = self.path / "metrics.csv"
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            write_whole(path, "".join(lines[: epochs + 1] if epochs else []))
            if not epochs:
                path.unlink()

    def add_line(self, name: str, row: dict[str, Any]) -> None:
        """Append one line to NAME.jsonl."""
        with open(self.path / f"{name}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(clean(row), allow_nan=False) + "\n")

    def cut_lines(self, name: str, keep: Callable[[int, dict[str, Any]], bool]) -> None:
        """Keep only the lines of NAME.jsonl of which `keep(number from 0, row)` is true, and none that is torn."""
        path = self.path / f"{name}.jsonl"
        if not path.exists():
            return
        kept = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True)):
            try:
                row = json.loads(line)
            except ValueError:
                break
            if keep(number, row):
                kept.append(line)
        write_whole(path, "".join(kept))
