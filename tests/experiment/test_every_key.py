"""Every key of the schema, set to a value of each kind that is no value for most keys.

Either one clear line that names the key, within seconds; or it is taken, and then the run is really made, or the key is
named as having no effect. The keys are those that the schema has, so that a new one is in the table at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import shutil
import signal
import time
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from omegaconf import OmegaConf

from sparse_lab.cli.main import main
from sparse_lab.config import Config
from sparse_lab.errors import SparseLabError
from sparse_lab.experiment.compose import GROUPS, LEAVES, PARTS
from sparse_lab.experiment.identity import run_name
from sparse_lab.experiment.security.leaves import leaves
from sparse_lab.experiment.settings_read import without_effect
from sparse_lab.sweep.plan import Request

LONGEST = 5.0  # seconds of a processor to a line that says no
DIVERGED = "the loss became NaN or infinite"  # only training can tell
LONGEST_LINE = 2_200  # letters
PARSER = re.compile(r"InstantiationException|Lexer|no viable alternative|Got NoneType|expecting <EOF>")
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
    begun = time.process_time()
    status, fault = None, ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            with within(seconds):
                status = main(words)
        except TooLong:
            fault = "hangs"
        except BaseException as caught:
            fault = f"traceback: {type(caught).__name__}: {str(caught)[:200]}"
    return Answer(status, out.getvalue(), error.getvalue(), time.process_time() - begun, fault)


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
        if len(lines[0]) > LONGEST_LINE:
            return "a very long line"
        if PARSER.search(lines[0]):
            return "the parser's own words"
        return "slow" if found.seconds > LONGEST else ""
    if found.status != 0:
        return "" if DIVERGED in found.error and "lr" in key else "accepted, then fails"
    return "" if _counts(key, words, found) else "no effect, and not named"


def _names(key: str) -> list[str]:
    """What a line may call it: of a part also what else stands there or takes its place."""
    group = ".".join(key.split(".")[:-1])
    if key in PARTS:
        return [key, f"{group}.", f"{group}="]
    return [key, f"{group}."] if group in PARTS else [key]


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


# the sample of the default run, and that of all tests; the night sees every key: a tenth of it would take minutes
FAST, FULL = 50, 25


def _by_tier(found: list[str]) -> list[Any]:
    def marks(number: int) -> list[pytest.MarkDecorator]:
        if number % FAST == 0:
            return []
        return [pytest.mark.full if number % FULL == 0 else pytest.mark.nightly(long=True)]

    return [pytest.param(key, marks=marks(number), id=key) for number, key in enumerate(found)]


@pytest.mark.parametrize("key", _by_tier(keys()))
def test_a_hostile_value_is_refused_by_name_or_makes_a_run(key, tmp_path, monkeypatch):
    inner = tmp_path / "a" / "b" / "c"  # what leads up and out leads nowhere else
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    faults = []
    for name, value in VALUES.items():
        found = judged(key, [*words_for(key), f"paths.outputs={inner / 'out'}", f"{key}={value}"])
        shutil.rmtree(inner / "out", ignore_errors=True)
        if found.fault:
            faults.append(f"{name}: {found.kind} ({found.seconds:.1f} s): {found.error[-300:]}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("key", _by_tier(keys()))
def test_in_a_sweep_too(key, tmp_path, monkeypatch):
    """Looked at as a whole before anything runs."""
    monkeypatch.chdir(tmp_path)
    faults = []
    for name, value in VALUES.items():
        for words in ((f"{key}={value},{value}",), (f"{key}=1,{value}", "seed=1,2")):
            fault = looked_at(["-m", *words_for(key), f"paths.outputs={tmp_path / 'out'}", *words])
            if fault:
                faults.append(f"{name}: {fault}")
    assert not faults, "\n".join(faults)


def looked_at(words: list[str]) -> str:
    """What is not well with the answer to a request that does not run; "" where it is."""
    begun = time.process_time()
    try:
        with within(FOR_EVER), contextlib.redirect_stdout(io.StringIO()):
            Request.read(words).look()
    except SparseLabError as error:
        line = str(error)
        if len(line.splitlines()) != 1 or len(line) > LONGEST_LINE or PARSER.search(line):
            return f"not one plain line: {line[:300]}"
    except BaseException as error:
        return f"traceback: {type(error).__name__}: {str(error)[:200]}"
    return "slow" if time.process_time() - begun > LONGEST else ""


LISTS = {
    "no number": "[nan,0.1]",
    "infinite": "[inf]",
    "negative": "[-1]",
    "a large number": "[1e308,1,1]",
    "a text": "['']",
    "null": "[null]",
    "lists": "[[1],[2]]",
    "a mapping": "[{a:1}]",
    "very many": f"[{','.join(['0.1'] * 1_000)}]",
}


@pytest.mark.parametrize("key", _by_tier([key for key, of in LEAVES.items() if typing.get_origin(of) is list]))
def test_lists_of_what_is_none(key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    faults = []
    for name, value in LISTS.items():
        fault = looked_at([*words_for(key), f"paths.outputs={tmp_path / 'out'}", f"{key}={value}"])
        if fault:
            faults.append(f"{name}: {fault}")
    assert not faults, "\n".join(faults)


SWEEPS = {
    "hydra.launcher": ("basic", "joblib", "ray", "submitit_local", "submitit_slurm"),
    "hydra.sweeper": ("basic", "optuna"),
}


def plugin_keys() -> list[Any]:
    """(choice, key) of all that launchers and sweepers can be given: what their files set, what files may set."""
    found = []
    for group, choices in SWEEPS.items():
        for choice in choices:
            base = Request.read(["-m", f"{group.replace('.', '/')}={choice}"]).compose([]).cfg
            own = [path for path, _, _ in leaves(OmegaConf.select(base, group))]
            found += [(f"{group.replace('.', '/')}={choice}", f"{group}.{path}") for path in own]
            found += [
                (f"{group.replace('.', '/')}={choice}", group),
                (f"{group.replace('.', '/')}={choice}", f"+{group}.foo"),
            ]
    return found


@pytest.mark.parametrize(
    ("choice", "key"),
    [
        pytest.param(*one, marks=pytest.mark.nightly(long=True) if number % FULL else pytest.mark.full)
        for number, one in enumerate(plugin_keys())
    ],
    ids=lambda one: one,
)
def test_what_launchers_and_sweepers_are_given(choice, key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    swept = "training.lr=interval(0.1,0.2)" if "optuna" in choice else "seed=1,2"
    faults = []
    for name, value in VALUES.items():
        fault = looked_at(["-m", *METHODS[0], *SMALL, choice, swept, f"paths.outputs={tmp_path}", f"{key}={value}"])
        if fault:
            faults.append(f"{name}: {fault}")
    assert not faults, "\n".join(faults)
