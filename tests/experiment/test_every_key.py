"""Every key of the schema, set to a value of each kind that is no value for most keys.

Either one clear line that names the key, within seconds; or it is taken, and then the run is really made, or the key is
named as having no effect. The keys are those that the schema has, so that a new one is in the table at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from sparse_lab.cli.main import main
from sparse_lab.config import Config
from sparse_lab.errors import SparseLabError
from sparse_lab.experiment.compose import GROUPS, LEAVES, PARTS
from sparse_lab.experiment.identity import run_name
from sparse_lab.experiment.settings_read import without_effect
from sparse_lab.sweep.plan import Request

LONGEST = 5.0  # seconds to a line that says no
FOR_EVER = 60.0  # seconds that a small run takes at most
VALUES = {
    "null": "null",
    "empty text": "''",
    "negative": "-1",
    "zero": "0",
    "no number": "nan",
    "a large number": "1e308",
    "a huge whole number": "99999999999999999999",
    "a path": "../../x",
    "an empty list": "[]",
    "a mapping": "{a:1}",
    "true": "true",
    "a long text": "y" * 100_000,
}
SMALL = (
    *("dataset=synthetic", "model.width=0.0625", "training.epochs=1", "training.finetune.epochs=1"),
    *("training.regrow.epochs=1", "dataset.train_limit=32", "dataset.eval_limit=32", "training.batch_size=16"),
    *("trainer=cpu", "sparsity=s90", "training.select_on_few=true", "schedule.iterative.share=0.9"),
)
# of each kind of method; the first that reads a key is what the key is set for
METHODS = (
    ("method=gmp",),
    ("method=oneshot",),
    ("method=oneshot_regrow",),
    ("method=lrr",),
    ("method=acdc",),
    ("method=rigl",),
    ("method=mest",),
    ("method=east", "model=resnet20"),
    ("method=resrep", "training.finetune.optimizer=sgd"),
    ("method=hrank",),
    ("method=sfp",),
    ("method=prune_on_the_fly",),
    ("method=dctps",),
    ("method=dense",),
)
EXTRA = {  # what else it takes that a key is read
    "training.nesterov": ("training.optimizer=sgd",),
    "training.milestones": ("training.lr_schedule=step",),
    "training.gamma": ("training.lr_schedule=step",),
    "training.clip_over": ("training.clip_norm=1",),
    **{
        f"training.{part}.{name}": (f"training.{part}.{key}",)
        for part in ("finetune", "regrow")
        for name, key in (
            ("milestones", "lr_schedule=step"), ("gamma", "lr_schedule=step"), ("clip_over", "clip_norm=1"),
            ("momentum", "optimizer=sgd"), ("nesterov", "optimizer=sgd"),
        )
    },
    "model.adapt_stem": ("model=mobilenet_v2",),
    "model.options": ("model=vit",),
}  # fmt: skip
ALONE = {"method.regrow.given": ("method.regrow.distribution=given",), "logger.mlflow_uri": ("logger=mlflow",)}


@dataclass(frozen=True)
class Answer:
    """What the command said. fault: why it is not well, "" where it is."""

    status: int | None
    said: str
    error: str
    seconds: float
    fault: str = ""

    @property
    def kind(self) -> str:
        return self.fault or {2: "one clear line", 0: "accepted"}[self.status or 0]


def keys() -> list[str]:
    """Every key with a value, every part and every group."""
    return [*LEAVES, *PARTS, *GROUPS]


def lines() -> list[tuple[str, str]]:
    """(key, name of the value)"""
    return [(key, value) for key in keys() for value in VALUES]


@cache
def words_for(key: str) -> tuple[str, ...]:
    """A small run that reads `key`, where there is one."""
    extra = (*EXTRA.get(key, ()), *ALONE.get(key, ()))
    for method in METHODS:
        words = (*method, *SMALL, *extra)
        config = Request.read(list(words)).compose([]).config()
        dead = without_effect(config)
        part = ".".join(key.split(".")[:2])
        there = part not in PARTS or _part(config, part) is not None
        if there and not any(f"{key}.".startswith(f"{one}.") for one in dead):
            return words
    return (*METHODS[0], *SMALL, *extra)


def _part(config: Config, part: str) -> Any:
    group, name = part.split(".")
    return getattr(getattr(config, group), name)


class TooLong(Exception):
    pass


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    def over(number: int, frame: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def answer(words: list[str], seconds: float = FOR_EVER) -> Answer:
    """What the command says to these words, in this process."""
    out, error = io.StringIO(), io.StringIO()
    begun = time.monotonic()
    status, fault = None, ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            with within(seconds):
                status = main(words)
        except TooLong:
            fault = "hangs"
        except BaseException as caught:
            fault = f"traceback: {type(caught).__name__}: {str(caught)[:200]}"
    return Answer(status, out.getvalue(), error.getvalue(), time.monotonic() - begun, fault)


def judged(key: str, words: list[str], seconds: float = FOR_EVER) -> Answer:
    """The same, and whether it is well."""
    found = answer(words, seconds)
    fault = found.fault or _fault(key, words, found)
    return dataclasses.replace(found, fault=fault)


def _fault(key: str, words: list[str], found: Answer) -> str:
    if "Traceback" in found.said + found.error:
        return "traceback"
    lines = found.error.strip().splitlines()
    if found.status == 2:
        if len(lines) != 1 or not lines[0].startswith("sparse-lab: "):
            return "not one line"
        if not any(name in lines[0] for name in _names(key)):
            return "does not name the key"
        if len(lines[0]) > 2000:
            return "a very long line"
        if "InstantiationException" in lines[0] or "Exception:" in lines[0] or "Error:" in lines[0]:
            return "the parser's own words"
        return "slow" if found.seconds > LONGEST else ""
    if found.status != 0:
        return "accepted, then fails"
    return "" if _counts(key, words, found) else "no effect, and not named"


def _names(key: str) -> list[str]:
    """What a line may call it."""
    return [key]


def _counts(key: str, words: list[str], found: Answer) -> bool:
    """Does what is set make a difference to the run's name, is it what stood there, or is it said to have no effect?"""
    if f"note: {key}" in found.said or not _in_name(key):
        return True
    try:
        with_it, without = (Request.read(list(one)).compose([]).config() for one in (words, words[:-1]))
    except SparseLabError:
        return True
    return _value(with_it, key) == _value(without, key) or run_name(with_it) != run_name(without)


def _in_name(key: str) -> bool:
    kind: Any = Config()
    for name in key.split("."):
        entries = {entry.name: entry for entry in dataclasses.fields(kind)}
        entry = entries[name]
        if not entry.metadata.get("identity", True):
            return False
        kind = getattr(kind, name)
        kind = PARTS[key.rpartition(".")[0]]() if kind is None and key.rpartition(".")[0] in PARTS else kind
        if not dataclasses.is_dataclass(kind):
            break
    return True


def _value(config: Config, key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name, None)
    return found
