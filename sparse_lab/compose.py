"""The configs of a sweep's jobs. Hydra puts each combination of choices together once; what the sweep gives single keys
is set in that afterwards, in the order in which Hydra itself would. A thousand seeds cost no more than a few choices.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparse_lab.config import Config, UserError

if TYPE_CHECKING:
    from sparse_lab.requests import Request

PLAIN_KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
FIRST_LINE = 1.0  # seconds of silence that a person can bear
NEXT_LINES = 5.0
BASES = 128  # configs of choices put together that are kept


def to_config(cfg: DictConfig) -> Config:
    """The composed config as plain dataclasses. Raises UserError when a value is missing or of the wrong type."""
    try:
        parts: dict[str, Any] = {
            name: OmegaConf.to_object(cfg[name]) if OmegaConf.is_config(cfg[name]) else cfg[name] for name in KEYS
        }
    except OmegaConfBaseException as error:
        raise UserError(first_line(error)) from None
    config = Config(**parts)
    assert all(type(getattr(config, name)) is kind for name, kind in GROUPS.items()), "composed without the schema"
    return config


KEYS = [entry.name for entry in dataclasses.fields(Config)]
GROUPS = {name: type(value) for name, value in vars(Config()).items() if dataclasses.is_dataclass(value)}


def first_line(error: BaseException) -> str:
    """What went wrong in one line, and with which key."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line for line in lines if line.startswith("full_key:")), "")
    return (lines[0] if lines else type(error).__name__) + (f" ({key})" if key else "")


@dataclass
class Composer:
    """put_together: the config that Hydra makes of choices, checked as a whole. check: what the values of a job alone
    can do wrong.
    """

    request: Request
    put_together: Callable[[list[str]], DictConfig]
    check: Callable[[Config], None]
    _values: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = field(default_factory=dict, init=False)
    _bases: dict[tuple[tuple[str, ...], tuple[str, ...]], DictConfig] = field(default_factory=dict, init=False)

    def order(self, jobs: list[dict[str, str]]) -> list[int]:
        """The numbers of the jobs, those with the same choices one after the other."""
        choices = [self._split(job)[0] for job in jobs]
        return sorted(range(len(jobs)), key=lambda number: choices[number])

    def config(self, job: dict[str, str]) -> Config:
        """The config of a job, a dict of override key -> value. Raises UserError."""
        choices, values = self._split(job)
        base = self._base(choices, tuple(values))
        try:
            for key, line in values.items():
                OmegaConf.update(base, key, self._values[line][1][key], merge=True)
        except OmegaConfBaseException as error:
            raise UserError(first_line(error)) from None
        config = to_config(base)
        if values:
            self.check(config)
        return config

    def _base(self, choices: tuple[str, ...], keys: tuple[str, ...]) -> DictConfig:
        """These choices put together, for jobs that all set the same keys in it."""
        if (choices, keys) not in self._bases:
            if len(self._bases) >= BASES:
                self._bases.clear()
            if (choices, ()) not in self._bases:
                self._bases[choices, ()] = self.put_together(list(choices))
            self._bases[choices, keys] = copy.deepcopy(self._bases[choices, ()])
        return self._bases[choices, keys]

    def _split(self, job: dict[str, str]) -> tuple[tuple[str, ...], dict[str, str]]:
        """As `split`, of a job's axes, each value parsed once: the overrides that Hydra must see, and key -> line."""
        choices, values = [], {}
        for key, value in job.items():
            line = f"{key}={value}"
            if line not in self._values:
                self._values[line] = split(self.request, [line])
            if self._values[line][1]:
                values[key] = line
            else:
                choices.append(line)
        if any(not self.request.choices(line.partition("=")[0]) for line in choices):
            return tuple(f"{key}={value}" for key, value in job.items()), {}
        return tuple(choices), values


def split(request: Request, lines: list[str]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The overrides that Hydra must see, and key -> value of those that do nothing but set one key of the schema.

    Choices are put together before any key is set, whatever their order. Where a line is neither (a dict, which is
    merged into what is there, or one of Hydra's own keys), the order of all may matter: Hydra sees them all.
    """
    choices, values = [], {}
    for line, override in zip(lines, request.parse(lines), strict=True):
        key = line.partition("=")[0]
        if request.choices(key):
            choices.append(line)
        elif PLAIN_KEY.fullmatch(key) and key.partition(".")[0] in KEYS and not isinstance(override.value(), dict):
            values[key] = override.value()
        else:
            return tuple(lines), {}
    return tuple(choices), values


@contextmanager
def telling(of: int, say: Callable[[str], None]) -> Iterator[Callable[[str, int], None]]:
    """While the block lasts, a line after a second, and one every five, of how far it is: what it does, and with which
    of how many. From a thread of its own, for the block may be importing torch.
    """
    begun, over = time.monotonic(), threading.Event()
    at: tuple[str, int] = ("reading", 0)

    def now(what: str, number: int) -> None:
        nonlocal at
        at = (what, number)

    def tell() -> None:
        wait = FIRST_LINE
        while not over.wait(wait):
            wait = NEXT_LINES
            say(f"{at[0]} job {at[1]:,} of {of:,}, {time.monotonic() - begun:.0f} s")

    thread = threading.Thread(target=tell, name="telling", daemon=True)
    thread.start()
    try:
        yield now
    finally:
        over.set()
        thread.join()
