"""A command line read as a whole before anything runs: how many jobs it asks for, and what is wrong with it.

Hydra finds mistakes too, but one at a time, job by job, in many lines; a sweep that is wrong in its last axis should
not train for a day first.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import typing
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import IntervalSweep, Override, ValueType
from hydra.core.plugins import Plugins
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sparse_lab.config import Config, as_written, conf_dir, present
from sparse_lab.errors import UserError, nearest
from sparse_lab.experiment.compose import (
    GROUPS,
    LEAVES,
    NO_GROUPS,
    OWN_CHOICES,
    PARTS,
    Composed,
    Composer,
    ConfigSource,
    first_line,
    leave_out_plugins_own,
    part_of,
    telling,
    unquoted,
)
from sparse_lab.experiment.quoting import word
from sparse_lab.experiment.security.flags import check_flags
from sparse_lab.experiment.security.secrets import check_line, check_values
from sparse_lab.experiment.security.writes import real
from sparse_lab.records.sweep_dir import MOST_JOBS

ANSWERS = ("help", "hydra_help", "cfg", "info", "shell_completion")
# what runs or searches -> the extra that brings it, and what that extra must have brought
EXTRAS = {
    "JoblibLauncher": ("joblib", ["joblib"]),
    "RayLauncher": ("ray", ["ray"]),
    "LocalLauncher": ("slurm", ["submitit"]),
    "SlurmLauncher": ("slurm", ["submitit"]),
    "OptunaSweeper": ("optuna", ["hydra_plugins.hydra_optuna_sweeper", "optuna"]),
}
AWAY = ("ray", "submitit_slurm")  # launchers whose jobs may run on other machines than this one
MANY_CORNERS = 256
SETTLED = ("launcher", "sweeper", "mode")  # by Hydra, before it reads what is swept


@dataclass
class Request:
    """One command line.

    `axes`: override key -> the values that a sweep gives it (the ends of an interval, where a sweeper searches one).
    What `check` finds out: `multirun`, `launcher` and its settings, `sweeper`, `outputs`, `configs`: of each job, in
    order (of a long search, of some); and `plan`: what each job will run.
    """

    argv: list[str]
    source: ConfigSource
    runs: bool
    fixed: list[str]
    axes: dict[str, list[str]]
    help: bool = False
    cfg: str | None = None  # job, hydra or all
    package: str | None = None
    resolve: bool = False
    multirun: bool = False
    launcher: str = "basic"
    sweeper: str = "basic"
    outputs: Path = Path("outputs")
    launching: DictConfig = field(default_factory=lambda: DictConfig({}))  # hydra.launcher
    trials: int | None = None  # how many jobs a sweeper makes up as it goes
    configs: list[Config] = field(default_factory=list)
    plan: list[dict[str, Any]] = field(default_factory=list)
    swept: list[Override] = field(default_factory=list)
    first: list[int] | None = None  # of jobs that ask for the same run the first ones, where there are such
    _composed: dict[tuple[str, ...], Composed] = field(default_factory=dict)

    @classmethod
    def read(cls, argv: list[str]) -> Request:
        """Parse with Hydra's own grammar. Raises UserError for what it cannot read."""
        argv = [unquoted(word) for word in argv]
        check_line(argv)
        check_flags(argv)
        args = _parse(argv)
        leave_out_plugins_own()
        argv = _flags_first(argv, args.overrides)
        user_conf = real("--config-dir", args.config_dir) if args.config_dir else None
        if user_conf is not None and not user_conf.is_dir():
            raise UserError(f"--config-dir {args.config_dir}: no such folder")
        if user_conf is not None and (not str(user_conf).isprintable() or set("$\\") & set(str(user_conf))):
            raise UserError(
                f"--config-dir {args.config_dir!r}: Hydra would read $ and \\ in its name: rename the folder"
            )
        asked = [f"--{name}" for name in ("cfg", "info", "multirun", "run", "shell_completion") if getattr(args, name)]
        if len(asked) > 1:
            raise UserError(f"{' and '.join(asked)} do not go together")
        runs = not any(getattr(args, name) for name in ANSWERS)
        request = cls(argv, ConfigSource(conf_dir(), user_conf), runs, [], {}, help=args.help, multirun=args.multirun)
        request.cfg, request.package, request.resolve = args.cfg, args.package, args.resolve
        if args.shell_completion:  # completes half-typed overrides: nothing to read yet
            return request
        for override in request.source.parse(args.overrides):
            request.source.check_names(override)
            if override.is_sweep_override():
                request.add_axis(override)
            else:
                request.fixed.append(str(override.input_line))
        if request.axes and runs and not args.multirun:
            raise UserError(_without_m(request.swept[0]))
        if args.cfg or args.info or args.hydra_help:  # for which Hydra sets its logging up
            request.compose([])
        return request

    def add_axis(self, override: Override) -> None:
        """Let the sweep go over what `override` gives its key. Raises UserError where that is nothing."""
        self.swept.append(override)
        self.axes[override.get_key_element()] = values = values_of(override)
        if not values:
            raise UserError(f"{override.input_line} gives {override.key_or_group} no value, so that nothing would run")

    @property
    def jobs(self) -> int:
        if self.trials is not None:
            return self.trials
        if self.first is not None:
            return len(self.first)
        return math.prod(len(values) for values in self.axes.values())

    def check(self) -> None:
        """Compose every job and check it, before the first one starts, and say what has no effect. Raises UserError."""
        for line in self.look():
            print(f"note: {line}", flush=True)

    def look(self) -> list[str]:
        """Compose every job and check it, and return what has no effect, a line each. Raises UserError."""
        base = self.read_experiment_axes()
        if self.multirun:
            self.check_plugins(base)
        if self.jobs > MOST_JOBS:
            raise UserError(f"a sweep has at most {MOST_JOBS:,} jobs: give its axes fewer values, or search them")
        jobs = self.corners()
        with telling(len(jobs), self._say) as at:
            composer = self.composer()
            configs: dict[int, Config] = {}
            for number in composer.order(jobs):
                configs[number] = composer.config(jobs[number])
                self.check_job(configs[number])
                at("composing", len(configs))
            self.configs = [configs[number] for number in range(len(jobs))]
            if self.trials is None:
                self.plan = [planned(config) for config in self.configs]
            notes = self._without_effect() + self._leave_out_twins()
            self._check_runs(at)
        return notes

    def check_plugins(self, base: DictConfig) -> None:
        """Are launcher and sweeper installed, and do they take what they are given? Raises UserError."""
        for name in ("launcher", "sweeper"):
            settings = base.hydra[name]
            check_extra(str(settings.get("_target_")))
            try:
                made = Plugins.instance()._instantiate(settings)  # as Hydra does once the sweep is planned
            except InstantiationException as error:
                cause = error.__cause__ or error
                raise UserError(f"hydra.{name}: {type(cause).__name__}: {first_line(cause)}") from None
            if about := getattr(made, "about", ""):
                self._say(about)

    def composer(self) -> Composer:
        """What composes the jobs, once `read_experiment_axes` has been called."""
        base = self.compose([])

        def put_together(choices: list[str]) -> Composed:
            if not choices:
                return base
            composed = self.source.compose([*self.fixed, *choices])
            if self.multirun and any(composed.cfg.hydra[part] != base.cfg.hydra[part] for part in SETTLED):
                self._refuse_swept_choices(base.cfg)
            return composed

        return Composer(self.source, put_together, check_values)

    def _say(self, line: str) -> None:
        if self.multirun:  # on the other side: a single run's output begins with its own first line
            print(f"sweep: {line}", flush=True)

    def check_job(self, config: Config) -> None:
        """What does not need torch to be seen."""
        if config.method.regrow is not None and config.method.init_from not in self.source.choices("method"):
            known = nearest(str(config.method.init_from), self.source.choices("method"))
            raise UserError(f"method.init_from={config.method.init_from}: {known}")
        if self.multirun and config.trainer.devices > 1:
            raise UserError(
                f"trainer.devices={config.trainer.devices} (DDP) starts the command again in every process, which "
                "under -m would be the whole sweep: run its lines one by one without -m, or give every job one "
                "device and let several run at a time: trainer.devices=1 hydra/launcher=ray"
            )

    def _check_runs(self, at: Callable[[str, int], None]) -> None:
        """All that is wrong with runs that are still to be made; torch is not imported where there are none."""
        from sparse_lab.experiment.identity import run_dir

        to_make = [config for config in self.configs if not run_dir(config).has_result]
        if not to_make:
            return
        if self.launcher == "basic":
            from sparse_lab.training.light_imports import import_lightning

            import_lightning()
            import sparse_lab.experiment.fit  # noqa: F401  now, while a signal finds no plan of a sweep on disk

        from sparse_lab.experiment.validate import check_pace

        lines = [*self.fixed, *(f"{key}={values[0]}" for key, values in self.axes.items())]
        asked = {key for override in self.source.parse(lines) for key in _keys_set(override)}
        for number, config in enumerate(to_make, len(self.configs) - len(to_make) + 1):
            check_run(config, here=self.launcher not in AWAY)
            check_pace(config, asked)
            at("checking", number)

    def _without_effect(self) -> list[str]:
        """What is set and read by no run, a line each."""
        from sparse_lab.experiment.settings_read import without_effect

        dead = [{**without_effect(config), **_absent(config)} for config in self.configs]
        lines = []
        for override in self.source.parse([*self.fixed, *(f"{key}={values[0]}" for key, values in self.axes.items())]):
            for key in _keys_set(override):
                why = [_why(key, one) for one in dead]
                if all(why):
                    # of a run that has the part, where there is one
                    said = next((one for one in why if one is not None and one.startswith("reads")), why[0])
                    lines.append(f"{key} has no effect: no run that is asked for {said}")
        taken_out = [line for line in self.fixed if part_of(key := line.partition("=")[0]) == key and _is_null(line)]
        lines += [
            f"{line} has no effect: no run that is asked for has it to take out"
            for line in taken_out
            if not self._takes_out(line)
        ]
        return lines + self._overruled()

    def _takes_out(self, line: str) -> bool:
        """Would any run have the part that this override takes out?"""
        other = replace(self, fixed=[one for one in self.fixed if one != line], _composed={})
        group, name = line.partition("=")[0].split(".")
        try:
            composer = other.composer()
            return any(getattr(getattr(composer.config(job), group), name) is not None for job in other.corners())
        except UserError:  # without it the request would be wrong
            return True

    def _overruled(self) -> list[str]:
        """What is set twice, of which the last counts; and settings of sweeps that a single run has no use for."""
        keys = [line.partition("=")[0].lstrip("+") for line in self.fixed]
        lines = [
            f"{line} has no effect: {self.fixed[len(keys) - 1 - keys[::-1].index(key)]} comes after it"
            for number, (line, key) in enumerate(zip(self.fixed, keys, strict=True))
            if key in keys[number + 1 :]
        ]
        lines += self._choices_overruled()
        of_sweeps = ("hydra.launcher", "hydra/launcher", "hydra.sweeper", "hydra/sweeper", "hydra.sweep")
        single = (
            [] if self.multirun else [key for key in keys if any(f"{key}.".startswith(f"{one}.") for one in of_sweeps)]
        )
        return lines + [f"{key} has no effect: it is for sweeps (-m)" for key in single]

    def _choices_overruled(self) -> list[str]:
        """Choices of which every setting is replaced by one that is set by itself."""
        keys = [*(line.partition("=")[0] for line in self.fixed), *self.axes]
        lines = []
        for line in self.fixed:
            group, _, name = line.partition("=")
            once = group in GROUPS and group != "schedule" and self.fixed.count(line) == 1  # a schedule is put in
            sets = self.source.sets(group, name) if once else []
            if sets and all(key in keys for key in sets):
                lines.append(f"{line} has no effect: {sets[-1]} takes its place")
        return lines

    def _leave_out_twins(self) -> list[str]:
        """Of jobs that ask for the same run leave only the first: it is trained once and shown once."""
        names = [(config.paths.outputs, run["name"]) for config, run in zip(self.configs, self.plan, strict=False)]
        first = [number for number, name in enumerate(names) if names.index(name) == number]
        if len(first) == len(names):
            return []
        self.first = first
        self.configs = [self.configs[number] for number in first]
        self.plan = [self.plan[number] for number in first]
        runs = "run" if len(first) == 1 else "runs"
        return [f"{len(names)} jobs ask for {len(first)} {runs}: those that are alike are one job"]

    def corners(self) -> list[dict[str, str]]:
        """One value of each axis a job; of a long search, jobs that hold each value at least once."""
        values = list(self.axes.values())
        if self.trials is None or math.prod(len(one) for one in values) <= MANY_CORNERS:
            rows: Iterable[tuple[str, ...]] = itertools.product(*values)
        else:
            longest = max(len(one) for one in values)
            rows = [tuple(one[row % len(one)] for one in values) for row in range(longest)]
        return [dict(zip(self.axes, row, strict=True)) for row in rows]

    def read_experiment_axes(self) -> DictConfig:
        """What the whole command shares, with Hydra's own settings; and the sweep that an experiment file may hold.

        A list on the command line replaces the file's list. Raises UserError.
        """
        base = self.compose([]).cfg
        self.multirun = self.multirun or "MULTIRUN" in str(base.hydra.get("mode"))
        self.launcher = str(base.hydra.runtime.choices.get("hydra/launcher"))
        self.sweeper = str(base.hydra.runtime.choices.get("hydra/sweeper"))
        self.launching = base.hydra.launcher
        self.outputs = real("paths.outputs", base.paths.outputs)
        if not self.multirun:
            return base
        self._read_params({str(key): value for key, value in (base.hydra.sweeper.get("params") or {}).items()})
        self._check_kinds(base)
        return base

    def _read_params(self, params: dict[str, Any]) -> None:
        """In the order in which Hydra's sweeper numbers its jobs: the file's keys first."""
        given, typed = {line.split("=", 1)[0].lstrip("+") for line in self.fixed}, {**self.axes}
        self.axes = {}
        for override in self.source.parse([f"{key}={value}" for key, value in params.items()]):
            self.source.check_names(override)
            key = override.get_key_element()
            if key in typed:
                self.axes[key] = typed.pop(key)
            elif key not in given and override.is_sweep_override():
                self.add_axis(override)
            elif key not in given:
                self.fixed.append(str(override.input_line))
        self.axes |= typed

    def _check_kinds(self, base: DictConfig) -> None:
        """Sweepers differ in what they understand."""
        if self.sweeper == "basic":
            continuous = next((one.input_line for one in self.swept if one.is_interval_sweep()), None)
            if continuous:
                raise UserError(f"{continuous}: an interval has no list of values: add hydra/sweeper=optuna")
            return
        self.trials = base.hydra.sweeper.n_trials
        if type(self.trials) is not int or self.trials < 1:
            raise UserError(
                f"hydra.sweeper.n_trials={self.trials}: a search makes a whole number of trials, at least 1"
            )
        globbed = next((one.input_line for one in self.swept if one.value_type == ValueType.GLOB_CHOICE_SWEEP), None)
        if globbed:
            raise UserError(f"{globbed}: hydra/sweeper={self.sweeper} does not know glob(): write the choices out")
        if not self.axes:
            raise UserError(f"hydra/sweeper={self.sweeper} has nothing to search: add a key=interval(LOW,HIGH)")
        if base.hydra.sweeper.get("storage") and int(metadata.version("sqlalchemy").split(".")[0]) >= 2:
            raise UserError(
                "hydra.sweeper.storage does not work with the Optuna that Hydra's sweeper needs (2.10) and SQLAlchemy "
                "2: leave it out; the same command again asks for the same trials and finds those that are done"
            )

    def _refuse_swept_choices(self, base: DictConfig) -> typing.NoReturn:
        """Hydra settles launcher, sweeper and mode before it reads what is swept, and ignores them there."""
        for key, values in self.axes.items():
            for value in values if self.source.choices(key) else []:
                one = self.compose([f"{key}={value}"]).cfg
                for group in ("hydra/launcher", "hydra/sweeper"):
                    chosen = one.hydra.runtime.choices.get(group)
                    if chosen != base.hydra.runtime.choices.get(group):
                        raise UserError(
                            f"{key}={value} chooses {group}={chosen}, which Hydra ignores in a swept choice: "
                            f"put {group}={chosen} on the command line"
                        )
                if any(one.hydra[part] != base.hydra[part] for part in SETTLED):
                    raise UserError(
                        f"{key}={value} sets hydra.launcher, hydra.sweeper or hydra.mode, which Hydra ignores in a "
                        f"swept choice: run {key}={value} by itself"
                    )
        raise UserError("swept choices together set hydra.launcher, hydra.sweeper or hydra.mode, which Hydra ignores")

    def compose(self, swept: list[str]) -> Composed:
        """What is fixed and `swept` put together, checked as a whole, and not the caller's to change. Raises
        UserError.
        """
        overrides = (*self.fixed, *swept)
        if overrides not in self._composed:
            # what comes next often asks for the same
            self._composed = {overrides: self.source.compose(list(overrides))}
        return self._composed[overrides]

    def config_text(self) -> str:
        """What --cfg prints: the config, Hydra's or both, or what lies in --package of it, resolved with --resolve."""
        shown = self.compose([]).shown()
        with open_dict(shown):
            for name in list(shown):
                if (name == "hydra" and self.cfg == "job") or (name != "hydra" and self.cfg == "hydra"):
                    del shown[name]
        package = None if self.package in (None, "_global_") else self.package
        if package is not None and (shown := OmegaConf.select(shown, package)) is None:
            raise UserError(f"--package {package}: there is nothing of that name, or it is null")
        head = "" if package is None else f"# @package {package}\n"
        if not OmegaConf.is_config(shown):
            return f"{shown}\n"
        try:
            return head + OmegaConf.to_yaml(shown, resolve=self.resolve)
        except OmegaConfBaseException as error:
            raise UserError(f"--resolve: {first_line(error)}") from None

    def help_text(self) -> str:
        """What --help prints. Hydra's own way to list the groups takes seconds with its plugins installed."""
        composed = copy.deepcopy(self.compose([]).cfg)
        groups = sorted(
            {
                folder.relative_to(top).as_posix()
                for top in (self.source.conf, self.source.user_conf)
                if top
                for folder in _groups(top)
            }
        )
        own = {group: sorted({*self.source.choices(group), *OWN_CHOICES.get(group, [])}) for group in groups}
        listed = [
            f"{group}: {', '.join(name for name in names if '/' not in name)}"
            for group, names in own.items()
            if group != "hydra" and any("/" not in name for name in names)
        ]
        template = str(OmegaConf.to_container(composed.hydra.help, resolve=False)["template"])  # type: ignore[index,call-overload]
        with open_dict(composed):
            del composed["hydra"]
        config = OmegaConf.to_yaml(composed)
        return template.replace("$APP_CONFIG_GROUPS", "\n".join(listed)).replace("$CONFIG", config)


def _is_null(line: str) -> bool:
    return line.partition("=")[2].strip().lower() == "null"


def _absent(config: Config) -> dict[str, str]:
    """The parts that a run does not have, and what adds them."""
    there = {f"{group}.{part}" for group in ("method", "schedule") for part in present(getattr(config, group))}
    return {part: f"has {part}; {_way(part)}" for part in PARTS if part not in there}


def _way(part: str) -> str:
    group, name = part.split(".")
    return f"schedule={name} chooses it" if group == "schedule" else f"{part}={{}} adds it"


def _keys_set(override: Override) -> list[str]:
    """The keys of the schema that an override sets: a group's, where it chooses in one."""
    key, value = override.key_or_group.replace("/", "."), override.value()
    if not isinstance(value, dict) or not value:
        return [key]
    return [".".join([key, *path]) for path in _paths(value)]


def _paths(value: dict[Any, Any]) -> Iterable[list[str]]:
    for name, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from ([str(name), *path] for path in _paths(inner))
        else:
            yield [str(name)]


def _why(key: str, dead: dict[str, str]) -> str | None:
    """Why nobody reads a key, or any key of a group: as `dead` says, key -> reason. None where one counts."""
    if part_of(key) == key:  # put in or taken out
        return None
    found = next((why for one, why in dead.items() if f"{key}.".startswith(f"{one}.")), None)
    if found is not None or "." in key:
        return found
    if any(one.startswith(f"{key}.") and one not in dead for one in PARTS):
        return None
    below = [one for one in LEAVES if one.startswith(f"{key}.")]
    why = [_why(one, dead) for one in below]
    return why[0] if all(why) and why else None


def written(value: str) -> str:
    """An axis's value, a float as a person would write it."""
    try:
        number = float(value)
    except ValueError:
        return value
    return str(as_written(number)) if math.isfinite(number) and not value.lstrip("+-").isdecimal() else value


def check_run(config: Config, here: bool = True) -> None:
    """All that is wrong with a run that is still to be made, which will need torch and Lightning anyway.

    here: does it run on this machine? Raises UserError.
    """
    from sparse_lab.training.light_imports import import_lightning, kept_out

    import_lightning()
    from sparse_lab import data, models
    from sparse_lab.experiment.validate import check

    # torchvision, where it is needed, and whatever a foreign network needs, import parts of what is kept out
    data.module_of(config.dataset)
    with kept_out() if models.is_ours(config.model.name) else nullcontext():
        check(config, here=here)


def planned(config: Config) -> dict[str, Any]:
    """A job in plan.json."""
    from sparse_lab.experiment.identity import run_name

    groups = {"model": config.model.title, "dataset": config.dataset.name, "method": config.method.name}
    sparsity = config.sparsity.target if config.method.prune is not None else 0.0
    return {"name": run_name(config), **groups, "sparsity": sparsity, "seed": config.seed}


def _groups(top: Path) -> list[Path]:
    folders = [path for path in top.rglob("*") if path.is_dir()]
    return [path for path in folders if path.relative_to(top).parts[0] not in NO_GROUPS]


def _without_m(override: Override) -> str:
    """What is wrong with a list of values in a command line without -m."""
    key, line = override.key_or_group, f"{override.get_key_element()}={','.join(values_of(override))}"
    raw = str(override.input_line).partition("=")[2]
    one = f", or quote it where it is one value: {word(key, raw)}" if LEAVES.get(key) is str else ""
    return f"{line} is a sweep: add -m{one}"


def values_of(override: Override) -> list[str]:
    """The values of a sweep as Hydra would write them; of an interval both ends."""
    if override.is_interval_sweep():
        interval = override.value()
        assert isinstance(interval, IntervalSweep)
        return [str(interval.start), str(interval.end)]
    return [written(str(value)) for value in itertools.islice(override.sweep_string_iterator(), MOST_JOBS + 1)]


def check_extra(target: str) -> None:
    """Is there what a launcher or sweeper needs? Raises UserError that names the extra."""
    extra, needed = EXTRAS.get(target.rpartition(".")[2], ("", []))
    if any(find_spec(one) is None for one in needed):
        raise UserError(f"{extra} is not installed here: pip install 'sparse_lab[{extra}]'")


def let_hydra_build_its_parser() -> None:
    """Python 3.14's argparse checks each help text as it is added; Hydra 1.3 has one that is an object, made into text
    only when it is shown, and fails there (facebookresearch/hydra#3121). What is no text goes unchecked."""
    check = getattr(argparse.ArgumentParser, "_check_help", None)
    if check is None:
        return

    def check_text(self: argparse.ArgumentParser, action: argparse.Action) -> None:
        if isinstance(action.help, str):
            check(self, action)

    argparse.ArgumentParser._check_help = check_text  # type: ignore[attr-defined]


let_hydra_build_its_parser()  # here, for Hydra builds one more when it starts a request's runs


def _parse(argv: list[str]) -> argparse.Namespace:
    """Hydra's own flags; overrides may stand before, between and after them."""
    parser = get_args_parser()

    def refuse(message: str) -> typing.NoReturn:
        raise UserError(f"cannot read the command line: {message}; see sparse-lab --help")

    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_intermixed_args(argv)


def _flags_first(argv: list[str], overrides: list[str]) -> list[str]:
    """The same request in the order that Hydra can read."""
    left = list(overrides)
    flags = [word for word in argv if not (word in left and (left.remove(word) or True))]  # type: ignore[func-returns-value]
    return [*flags, *overrides]
