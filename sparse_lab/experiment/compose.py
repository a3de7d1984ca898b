"""What Hydra composes of conf/ and a command's words. It puts each combination of choices together once; what a sweep
gives single keys is set in that afterwards, in the order in which Hydra itself would. A thousand seeds cost no more
than a few choices.

A method's parts are those that its own file puts together. Hydra sees every part in place, so that a key of one can be
set for all the methods of a sweep, and counts for those that have it; `method.PART={}` and `method.PART=null` on the
command line put one in and take one out.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import threading
import time
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sparse_lab import models
from sparse_lab.config import (
    CHOICES,
    FOLLOWERS,
    RENAMED_CHOICES,
    Config,
    MethodConfig,
    ScheduleConfig,
    as_written,
    check_ranges,
    parts_of,
    renamed,
)
from sparse_lab.data.facts import filled
from sparse_lab.errors import UserError, nearest
from sparse_lab.experiment.quoting import in_shell, quoted, word, written_out
from sparse_lab.experiment.security.composed import check_composed
from sparse_lab.experiment.security.files import CheckedRepository, Setting, check_files, check_settings
from sparse_lab.experiment.security.interpolations import check_interpolations
from sparse_lab.host.machine import available_memory, usable_cores
from sparse_lab.methods.read import put_together
from sparse_lab.records.run_dir import network_of

PARTS: dict[str, type] = {}  # every part that a method or a schedule can have, as method.prune -> its settings
LEAVES: dict[str, Any] = {}  # every key that has a value -> its type, where it is not null
MAPPINGS: list[str] = []  # those of them that are mappings
OF_LAYERS = ("sparsity.layers",)  # mappings whose names hold dots themselves


def _leaves(kind: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for name, of in typing.get_type_hints(kind).items():
        either = typing.get_args(of)
        one = either[0] if type(None) in either else of
        yield from _leaves(one, f"{path}{name}.") if dataclasses.is_dataclass(one) else [(f"{path}{name}", one)]


def schema(in_place: bool) -> DictConfig:
    """The types and defaults of every key; with every part in place, or with none."""
    schema = OmegaConf.structured(Config)
    for part, kind in PARTS.items():
        OmegaConf.update(schema, part, OmegaConf.structured(kind) if in_place else None, merge=False)
    for mapping in MAPPINGS:
        OmegaConf.set_struct(OmegaConf.select(schema, mapping), False)  # whatever names it holds
    return schema


def _follow_schema() -> None:
    """Look at the config's dataclasses anew: what is registered may have given them parts."""
    PARTS.clear()
    LEAVES.clear()
    PUT_TOGETHER.clear()
    for group, owner in (("method", MethodConfig), ("schedule", ScheduleConfig)):
        PARTS.update({f"{group}.{part}": kind for part, kind in parts_of(owner).items()})
    LEAVES.update(_leaves(Config))
    MAPPINGS[:] = [key for key, of in LEAVES.items() if typing.get_origin(of) is dict]
    ConfigStore.instance().store(name="schema", node=schema(in_place=True))


# choices -> the config that Hydra makes of them and our own files
PUT_TOGETHER: dict[tuple[str, ...], Composed] = {}
_follow_schema()
FOLLOWERS.append(_follow_schema)

# what Hydra and its plugins offer beside the choices in conf/
OWN_CHOICES = {
    "hydra/launcher": [],
    "hydra/sweeper": ["basic"],
    "hydra/sweeper/sampler": ["cmaes", "nsgaii", "motpe", "grid"],
}
SEVERAL = ("logger",)  # groups of which a run can have several choices; of others the last would win in silence
NO_GROUPS = ("table",)  # folders of conf/ that hold no choices of a run: the tables of `sparse-lab reproduce`
# what Hydra and its plugins register: conf/ holds our own choices of these names, or none is meant to be
PLUGINS_OWN = {
    "launcher": ("basic", "joblib", "ray", "ray_aws", "submitit_local", "submitit_slurm"),
    "sweeper": ("optuna",),
    "sweeper/sampler": ("tpe", "random"),
}
# type of a key -> what it takes, in words
WANTED: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list, as in [1,2]",
    dict: "a mapping, as in {a:1}",
}
PLAIN_KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
FIRST_LINE = 1.0  # seconds of silence that a person can bear
NEXT_LINES = 5.0
BASES = 128  # configs of choices put together that are kept


RAY_STORE = 100_000_000  # bytes: a job hands back one number
RUN_MEMORY = 5 * 2**29  # bytes that a run is taken to need: at batch 128 VGG16 has 1.5 GiB, ResNet-34 2.4 (`bench`)


def gpus_a_job(accelerator: str) -> int:
    """What a job of a Ray sweep asks for: a GPU of its own where this machine has any and the run would use it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = any(Path("/dev").glob("nvidia[0-9]*")) if visible is None else visible not in ("", "-1")
    return int(accelerator != "cpu" and there)


@cache  # a request is composed again and again: it stays one request
def places(accelerator: str) -> int:
    """Return how many runs at a time this machine has place for: one a processor that may be used, each with one
    thread, as far as memory goes; two where they would share a GPU.
    """
    if gpus_a_job(accelerator):
        return 2
    return max(1, min(usable_cores(), available_memory() // RUN_MEMORY))


OmegaConf.register_new_resolver("gpus_a_job", gpus_a_job, replace=True)
OmegaConf.register_new_resolver("places", places, replace=True)
# a cluster that runs already has a store of its own, and Ray refuses to be told its size
OmegaConf.register_new_resolver("ray_store", lambda address: None if address else RAY_STORE, replace=True)


def leave_out_plugins_own() -> None:
    """Take out what would be merged into our choices of the same name (with a warning each), and slow Hydra down."""
    Plugins.instance()  # they register when they are found
    for group, names in PLUGINS_OWN.items():
        entries: Any = ConfigStore.instance().repo["hydra"]
        for part in group.split("/"):
            entries = entries.get(part, {})
        for name in names:
            entries.pop(f"{name}.yaml", None)


@dataclass
class Composed:
    """cfg: what Hydra makes of a request, with its own node and every part in place. parts: those that the run has, as
    method.prune.
    """

    cfg: DictConfig
    parts: set[str]
    taken_out: set[str] = field(default_factory=set)

    def set(self, key: str, value: Any) -> None:
        """Set a key, as Hydra would; or put a part in or out. Raises UserError."""
        part = part_of(key)
        if key == part and value is None:
            self.parts.discard(part)
            self.taken_out.add(part)
            return
        if key == part and not isinstance(value, dict):
            raise UserError(f"{key}={value}: a part is there with settings or null since 0.2: {key}={{}} or {key}=null")
        if part in self.taken_out and key != part:  # Hydra itself would trip over it
            raise UserError(f"{key}={value} and {part}=null do not go together: leave one out")
        if isinstance(value, (float, bool)) and LEAVES.get(key) is str:
            raise UserError(
                f"{key}={value}: text that reads as a number or as true is written in quotes: {key}=\"'...'\""
            )
        if part is not None and key != part and OmegaConf.select(self.cfg, part) is None:
            raise UserError(
                f"{key}={value}: a config file sets {part} to null: {part}={{}} on the command line adds it"
            )
        try:
            OmegaConf.update(self.cfg, key, as_written(value), merge=True)
        except OmegaConfBaseException as error:
            raise UserError(first_line(error)) from None
        except OverflowError as error:
            raise UserError(f"{key}: {str(error).splitlines()[0]}") from None
        if key == part:
            self.parts.add(part)
            self.taken_out.discard(part)

    def config(self) -> Config:
        """The run's config as plain dataclasses. Raises UserError when a value is missing, of the wrong type or out of
        range, those of what the run does not have or read too: they have no say in whether it is done. What the files
        of a data set say of it (`filled`) is there.
        """
        config = to_config(self.cfg)
        check_ranges(config)
        config.dataset = filled(config.dataset)
        _look_into_folders(config)
        config.model.options = models.differing(config.model.name, config.model.options)
        for part in PARTS.keys() - self.parts:
            group, name = part.split(".")
            setattr(getattr(config, group), name, None)
        return config

    def shown(self) -> DictConfig:
        """A copy in which the parts that the run does not have are null."""
        shown = copy.deepcopy(self.cfg)
        for part in PARTS.keys() - self.parts:
            OmegaConf.update(shown, part, None, merge=False)
        return shown


def part_of(key: str) -> str | None:
    """The part of a method or schedule that a key is or lies in: method.regrow for method.regrow.budget."""
    part = ".".join(key.split(".")[:2])
    return part if part in PARTS else None


def to_config(cfg: DictConfig) -> Config:
    """A composed config as plain dataclasses. Raises UserError when a value is missing or of the wrong type."""
    try:
        groups: dict[str, Any] = {
            name: OmegaConf.to_object(cfg[name]) if OmegaConf.is_config(cfg[name]) else cfg[name] for name in KEYS
        }
    except OmegaConfBaseException as error:
        raise UserError(first_line(error)) from None
    config = Config(**groups)
    assert all(type(getattr(config, name)) is kind for name, kind in GROUPS.items()), "composed without the schema"
    return config


KEYS = [entry.name for entry in dataclasses.fields(Config)]
GROUPS = {name: type(value) for name, value in vars(Config()).items() if dataclasses.is_dataclass(value)}


def first_line(error: BaseException) -> str:
    """What went wrong in one line, and with which key."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line for line in lines if line.startswith("full_key:")), "")
    if (now := renamed(key.removeprefix("full_key: "))) is not None:
        return now
    return (lines[0] if lines else type(error).__name__) + (f" ({key})" if key else "")


@dataclass
class ConfigSource:
    """Our conf/, plugins' folders and the user's own: the choices that there are, and what Hydra composes of them."""

    conf: Path
    user_conf: Path | None = None
    _choices: dict[str, list[str]] = field(default_factory=dict, init=False)
    _repository: CheckedRepository | None = field(default=None, init=False)
    _overrides: dict[str, Override] = field(default_factory=dict, init=False)

    @property
    def folders(self) -> list[Path]:
        """Where choices lie; of two of one name the first counts."""
        return [self.conf, *CHOICES, *([] if self.user_conf is None else [self.user_conf])]

    def parse(self, lines: list[str]) -> list[Override]:
        """Overrides, in Hydra's grammar. Raises UserError, with the words that would be read."""
        try:
            return self._parsed(lines)
        except (HydraException, ValueError):  # a whole number of thousands of digits is a ValueError
            unreadable = [found for line in lines if (found := self._unreadable(line))]
            raise unreadable[0] from None

    def _parsed(self, lines: list[str]) -> list[Override]:
        """Each line is parsed once: one with thousands of numbers takes seconds, and is asked for again and again."""
        new = [line for line in dict.fromkeys(lines) if line not in self._overrides]
        found = OverridesParser.create(self._loader).parse_overrides(new)
        self._overrides.update(zip(new, found, strict=True))
        return [self._overrides[line] for line in lines]

    def _reads(self, line: str) -> bool:
        try:
            return bool(self._parsed([line]))
        except (HydraException, ValueError):
            return False

    def _unreadable(self, line: str) -> UserError | None:
        """What is wrong with a word that the grammar does not have; None where it has it."""
        key, sign, value = line.partition("=")
        if self._reads(line):
            return None
        if not sign or not self._reads(f"{key}=1"):
            return UserError(f"cannot read {line!r}: a word is KEY=VALUE, as in seed=1, without spaces around the =")
        self.check_names(self._parsed([f"{key}={quoted(value)}"])[0])  # an unknown key or choice is the nearer fault
        if (wanted := wanted_by(key.lstrip("+"))) is not None:
            return UserError(f"cannot read {line}: {key} takes {wanted}")
        if value.startswith("~"):
            value = written_out(value)
        said = word(key, value)
        if "," in value:
            pieces = [piece if self._reads(f"{key}={piece}") else quoted(piece) for piece in value.split(",")]
            said += f", or with -m for several {in_shell(f'{key}=' + ','.join(pieces))}"
        return UserError(f"cannot read {line}: put the value in quotes: {said}")

    @cached_property
    def _loader(self) -> ConfigLoaderImpl:
        searched = create_config_search_path(str(self.conf))
        if self.user_conf is not None:
            searched.prepend(  # what we ship goes first, and what plugins bring
                "command-line", f"file://{self.user_conf}", anchor=SearchPathQuery("schema")
            )
        return ConfigLoaderImpl(searched)

    def choices(self, group: str) -> list[str]:
        """Names that a config group offers, in subfolders too, the user's own among them."""
        if group not in self._choices:
            found: set[str] = set()
            for folder in () if group.partition("/")[0] in NO_GROUPS else self.folders:
                if (folder / group).is_dir():
                    found |= {
                        path.relative_to(folder / group).with_suffix("").as_posix()
                        for path in (folder / group).rglob("*.yaml")
                    }
            self._choices[group] = sorted(found)
        return list(self._choices[group])

    def sets(self, group: str, name: str) -> list[str]:
        """The keys that a choice's own file sets, as sparsity.target; none where it stands on other files."""
        for folder in self.folders:
            if (folder / group / f"{name}.yaml").is_file():
                own = OmegaConf.to_container(OmegaConf.load(folder / group / f"{name}.yaml"))
                return [] if not isinstance(own, dict) or "defaults" in own else list(_keys_below(own, group))
        return []

    def check_names(self, override: Override) -> None:
        """Unknown groups, choices and keys, each with the nearest known name."""
        key = override.key_or_group
        if not key or override.is_delete():
            raise UserError(f"{override.input_line}: give keys a value, as in seed=1; nothing can be taken out")
        if key.startswith("hydra") and override.is_sweep_override():
            raise UserError(f"{override.input_line}: a sweep cannot go over {key}: give it one value")
        if key == "hydra.searchpath":  # composing would import what it names, and read folders that nobody looked at
            raise UserError(f"{override.input_line}: other folders than ours are given by --config-dir DIR")
        if key.startswith("hydra"):
            check_interpolations(key, override.input_line)
        choices = self.choices(key)
        if key in OWN_CHOICES:
            choices += OWN_CHOICES[key]
        elif key.startswith("hydra"):
            return
        if not choices:
            check_key(key)
            _check_text(override)
            return
        values = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
        if None in values:
            raise UserError(
                f"{override.input_line}: null is no choice: name one, or leave {key} out; {nearest('', choices)}"
            )
        if key not in SEVERAL and any(isinstance(value, list) for value in values):
            raise UserError(
                f"{override.input_line}: a run has one {key}: choose one, or sweep over them with -m {key}=A,B"
            )
        for name in names_in(override):
            if (now := RENAMED_CHOICES.get(key, {}).get(name)) is not None and name not in choices:
                raise UserError(f"{key}={name} is {key}={now} since 0.2")
            if name not in choices:
                raise UserError(f"unknown {key} {name!r}; {nearest(name, choices)}")

    def compose(self, overrides: list[str]) -> Composed:
        """What these overrides ask for, checked as a whole. Raises UserError.

        Hydra puts the same choices together once a process; what sets one key is set in a copy, as it would.
        """
        choices, values = split(self, overrides)
        settings = self.check_files(choices)
        composed = self._put_together(choices)
        for key, value in values:
            composed.set(key, value)
        try:
            check_settings(composed.cfg, settings)
            check_composed(composed.cfg)
        except OmegaConfBaseException as error:  # an interpolation that leads nowhere
            raise UserError(first_line(error)) from None
        return composed

    def check_files(self, overrides: Iterable[str]) -> list[Setting]:
        """What files that are not ours and that these overrides choose set of Hydra's keys. Raises UserError."""
        if self.folders == [self.conf]:
            return []
        with _told():
            return check_files(self._loader, self.parse(list(overrides)))

    def chosen(self, method: str, schedule: str | None = None) -> tuple[DictConfig, str]:
        """What the files of a method alone say, with its schedule's or another's: a config of these two groups, without
        types and defaults; and the schedule's name. Raises UserError.

        Hydra's own rules without the rest of the config, which forty methods would wait for.
        """
        self._repository = self._repository or CheckedRepository(self._loader.repository)
        lines = [f"method={method}"] + ([] if schedule is None else [f"schedule={schedule}"])
        try:
            return put_together(self._loader, self._repository, self.parse(lines))
        except (YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"method {method}: {' '.join(str(error).split())}") from None
        except RecursionError:
            raise UserError(f"method {method}: its file is nested too deep, or asks for itself") from None
        except MissingConfigException as error:
            group, _, name = str(error.missing_cfg_file).rpartition("/")
            raise UserError(f"method {method}: {first_line(error)} {nearest(name, self.choices(group))}") from None
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(f"method {method}: {first_line(error.__cause__ or error)}") from None

    def _put_together(self, choices: tuple[str, ...]) -> Composed:
        if self.user_conf is not None:  # whose files may change
            return self._with_parts(list(choices))
        if choices not in PUT_TOGETHER:
            if len(PUT_TOGETHER) >= BASES:
                PUT_TOGETHER.clear()
            PUT_TOGETHER[choices] = self._with_parts(list(choices))
        return copy.deepcopy(PUT_TOGETHER[choices])

    def _with_parts(self, choices: list[str]) -> Composed:
        cfg = self.through_hydra(choices)
        for group in KEYS:  # Hydra names no choice where a file's defaults list several
            if group not in SEVERAL and self.choices(group) and group not in cfg.hydra.runtime.choices:
                raise UserError(f"a config file lists several choices of {group}: a run has one {group}")
        _write_floats(cfg)
        method, schedule = (cfg.hydra.runtime.choices.get(group) for group in ("method", "schedule"))
        own, _ = self.chosen(method, schedule)
        there = {part for part in PARTS if OmegaConf.select(own, part) is not None}
        return Composed(cfg, {part for part in there if OmegaConf.select(cfg, part) is not None})

    def through_hydra(self, overrides: list[str]) -> DictConfig:
        user = [] if self.user_conf is None else [f"hydra.searchpath=[{quoted(f'file://{self.user_conf}')}]"]
        with _told(), _aside(), hydra.initialize_config_dir(str(self.conf), version_base="1.3"):
            return hydra.compose("config", [*user, *overrides], return_hydra_config=True)


@contextmanager
def _told() -> Iterator[None]:
    """What Hydra finds wrong, in one line."""
    try:
        yield
    except (YAMLError, UnicodeDecodeError) as error:  # a file of --config-dir
        raise UserError(f"a config file cannot be read: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError("a config file is nested too deep, or asks for itself") from None
    except (HydraException, OmegaConfBaseException, ValueError, OverflowError) as error:
        raise UserError(first_line(error.__cause__ or error)) from None
    except (AttributeError, AssertionError) as error:  # OmegaConf trips over a mapping for what is typed and null
        raise UserError(
            f"a mapping, or a key of one, is set where null stands ({' '.join(str(error).split())}): of "
            "hydra.sweeper.params that is so where no experiment has any; a sweep's keys stand by themselves, as in "
            "-m seed=1,2"
        ) from None


def _keys_below(node: dict[Any, Any], path: str) -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _keys_below(value, f"{path}.{key}")
        else:
            yield f"{path}.{key}"


def _write_floats(cfg: DictConfig) -> None:
    """Put every float of the schema's keys as a person would write it, in place."""
    for group in KEYS:
        for node, key in _floats(cfg, group):
            with read_write(node):
                node[key] = as_written(node[key])


def _floats(node: Any, key: Any) -> Iterator[tuple[Any, Any]]:
    """Where a float stands at or below node[key]."""
    if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
        return
    value = node[key]
    if isinstance(value, float):
        yield node, key
    elif isinstance(value, DictConfig):
        for name in value:
            yield from _floats(value, name)
    elif isinstance(value, ListConfig):
        for number in range(len(value)):
            yield from _floats(value, number)


@contextmanager
def _aside() -> Iterator[None]:
    """Within a job Hydra is at work already, and takes no second start: what it has is put aside meanwhile."""
    at_work = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = at_work


def _look_into_folders(config: Config) -> None:
    """Where a run's folder stands for a network, put the network that lies in it."""
    config.model.weights = network_of(config.model.weights)
    if (regrow := config.method.regrow) is not None:
        regrow.reference = network_of(regrow.reference)


@dataclass
class Composer:
    """put_together: what Hydra makes of choices, checked as a whole. check: what the values of a job alone can do
    wrong.
    """

    source: ConfigSource
    put_together: Callable[[list[str]], Composed]
    check: Callable[[Config], None]
    _values: dict[str, tuple[tuple[str, ...], list[tuple[str, Any]]]] = field(default_factory=dict, init=False)
    _bases: dict[tuple[tuple[str, ...], tuple[str, ...]], Composed] = field(default_factory=dict, init=False)

    def order(self, jobs: list[dict[str, str]]) -> list[int]:
        """The numbers of the jobs, those with the same choices one after the other."""
        choices = [self._split(job)[0] for job in jobs]
        return sorted(range(len(jobs)), key=lambda number: choices[number])

    def config(self, job: dict[str, str]) -> Config:
        """The config of a job, a dict of override key -> value. Raises UserError."""
        choices, values = self._split(job)
        base = self._base(choices, tuple(key for key, _ in values))
        # jobs of a base set the same keys; but what is merged, and a part that comes and goes, would stay for the next
        merged = any(key in PARTS or key in MAPPINGS for key, _ in values)
        composed = copy.deepcopy(base) if merged else base
        for key, value in values:
            composed.set(key, value)
        config = composed.config()
        if values:
            self.check(config)
        return config

    def _base(self, choices: tuple[str, ...], keys: tuple[str, ...]) -> Composed:
        """These choices put together, for jobs that all set the same keys in it."""
        if (choices, keys) not in self._bases:
            if len(self._bases) >= BASES:
                self._bases.clear()
            if (choices, ()) not in self._bases:
                self._bases[choices, ()] = self.put_together(list(choices))
            self._bases[choices, keys] = copy.deepcopy(self._bases[choices, ()])
        return self._bases[choices, keys]

    def _split(self, job: dict[str, str]) -> tuple[tuple[str, ...], list[tuple[str, Any]]]:
        """As `split`, of a job's axes, each value parsed once."""
        choices: list[str] = []
        values: list[tuple[str, Any]] = []
        for key, value in job.items():
            line = f"{key}={value}"
            if line not in self._values:
                self._values[line] = split(self.source, [line])
            found, there = self._values[line]
            choices += found
            values += there
        if any(not self.source.choices(line.partition("=")[0]) for line in choices):
            return tuple(f"{key}={value}" for key, value in job.items()), []
        return tuple(choices), values


def split(source: ConfigSource, lines: list[str]) -> tuple[tuple[str, ...], list[tuple[str, Any]]]:
    """The overrides that Hydra must see, and the (key, value) of those that set one key of the schema, or a part.

    Choices are put together before any key is set, whatever their order. Where a line is neither (a dict, which is
    merged into what is there, or one of Hydra's own keys), the order of all may matter: Hydra sees them all, but for
    those on parts and mappings.
    """
    choices: list[str] = []
    values: list[tuple[str, Any]] = []
    others = False
    for line, override in zip(lines, source.parse(lines), strict=True):
        key = _key(line)
        if source.choices(key):
            choices.append(line)
        elif _apart(key) or _sets_one_key(key, override):
            values.append((key, override.value()))
        else:
            others = True
    if not others:
        return tuple(choices), values
    return tuple(line for line in lines if not _apart(_key(line))), [pair for pair in values if _apart(pair[0])]


def _apart(key: str) -> bool:
    return part_of(key) is not None or key in MAPPINGS


def unquoted(line: str) -> str:
    """A mapping's line without the quotes around its keys, for which Hydra's grammar has no place."""
    return re.sub(r"""(["'])([\w.*?\-]+)\1\s*:""", r"\2:", line) if _key(line) in MAPPINGS else line


def _key(line: str) -> str:
    """The key that an override sets, also with ++; with a single + Hydra refuses keys that are there, and says so."""
    return line.partition("=")[0].removeprefix("++")


def _sets_one_key(key: str, override: Override) -> bool:
    known = PLAIN_KEY.fullmatch(key) is not None and key.partition(".")[0] in KEYS
    return known and not isinstance(override.value(), dict)


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


def names_in(override: Override) -> list[str]:
    """The choices that an override of a group names: one, a list of them, or the values of a sweep."""
    values = override.sweep_iterator() if override.is_sweep_override() else [override.value()]
    names: list[str] = []
    for value in values:
        names += [str(one) for one in (value if isinstance(value, list) else [value])]
    return names


def wanted_by(key: str) -> str | None:
    """What a key of the schema takes, in words; None where that is any text."""
    of = LEAVES.get(key, str)
    return WANTED.get(typing.get_origin(of) or of)


def _check_text(override: Override) -> None:
    """Raise UserError where a list or a mapping stands for a key that takes a text: it is quoted, then."""
    key, raw = override.key_or_group, str(override.input_line).partition("=")[2]
    if LEAVES.get(key) is str and not override.is_sweep_override() and isinstance(override.value(), (list, dict)):
        raise UserError(f"{override.input_line}: {key} takes a text: put it in quotes: {word(key, raw)}")


def check_key(key: str) -> None:
    """Is `key` (dots between its parts) one of the schema's? Raises UserError with the nearest one."""
    if (mapping := next((one for one in MAPPINGS if key.startswith(f"{one}.")), None)) is not None:
        name = key.removeprefix(f"{mapping}.")
        if mapping not in OF_LAYERS and "." not in name:
            return
        raise UserError(f"{key}: names may hold dots themselves: {mapping}={{{name}:VALUE}}")
    walked: list[str] = []
    for part in key.split("."):
        known = _known_keys(walked)
        if known is None:
            return
        if part not in known:
            if (now := renamed(key)) is not None:
                raise UserError(now)
            where = ".".join(walked) or "the config"
            raise UserError(f"unknown key {key!r}: {where} has no {part!r}; {nearest(part, known)}")
        walked.append(part)


def _known_keys(walked: list[str]) -> list[str] | None:
    """Keys below a path of the schema; None where the schema ends (a list, say)."""
    kind: Any = Config
    for part in walked:
        kind = typing.get_type_hints(kind)[part]
        inner = [one for one in typing.get_args(kind) if dataclasses.is_dataclass(one)]
        kind = inner[0] if inner else kind
        if not dataclasses.is_dataclass(kind):
            return None
    return [field.name for field in dataclasses.fields(kind)]
