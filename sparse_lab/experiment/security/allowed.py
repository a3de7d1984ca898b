"""Which of Hydra's own keys a config file may set, and to what. A file of conf/ is ours, and may set any. What is typed
is of the same kinds, but that its texts are taken at their word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sparse_lab.experiment.security.targets import LAUNCHERS, SAMPLERS, SWEEPERS

KeyPath = tuple[Any, ...]  # of a key below hydra; a hostile file may have keys that are no text


@dataclass(frozen=True)
class Kind:
    """What a value may be, beside null. said: in words. fits: of a file's value; typed: of one that is typed, where
    that is more.
    """

    said: str
    fits: Callable[[Any], bool]
    typed: Callable[[Any], bool] | None = None

    def takes(self, value: Any) -> bool:
        """Return whether a value that is typed is of this kind."""
        return (self.typed or self.fits)(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return type(value) in (str, int)


def _whole(said: str, low: int) -> Kind:
    return Kind(
        said,
        lambda value: type(value) is int and low <= value <= 1_000_000_000,
        lambda value: type(value) is int and value >= low,
    )


def _number(said: str, low: float, high: float = math.inf) -> Kind:
    return Kind(said, lambda value: _is_number(value) and low <= value <= high)


def _text(said: str, pattern: str) -> Kind:
    form = re.compile(pattern, re.ASCII)
    return Kind(said, lambda value: _is_text(value) and form.fullmatch(str(value)) is not None, _is_text)


def _one_of(*known: str) -> Kind:
    return Kind(f"one of {', '.join(known)}", lambda value: isinstance(value, str) and value in known)


def _swept(value: Any) -> bool:
    """Hydra makes an override of it: what an interpolation left would be read once more."""
    if isinstance(value, list):
        return all(_swept(one) and not isinstance(one, list) for one in value)
    if isinstance(value, str):
        return value.isprintable() and "$" not in value
    return type(value) in (int, bool) or _is_number(value)


WHOLE = _whole("a whole number", -1)
COUNT = _whole("a whole number above 0", 1)
PLACES = Kind(
    "a whole number above 0, or -1 for every core",
    lambda value: WHOLE.fits(value) and value != 0,
    lambda value: type(value) is int and value != 0,
)
NUMBER = _number("a number, 0 or above", 0.0)
SHARE = _number("a number in [0, 1]", 0.0, 1.0)
SWITCH = Kind("true or false", lambda value: type(value) is bool)
JOB = _text("a plain name", r"\w[\w.-]{0,99}")
WORD = _text("a plain word", r"[\w.:=,+@%-]{1,200}")
NODES = _text("names of nodes", r"[\w.:=,\[\]-]{1,200}")
FEATURES = _text("names of features", r"[\w.:=,\[\]&|*()!-]{1,200}")
REMARK = _text("a plain text", r"[\w .,:()+@%/=-]{0,200}")
LEVEL = _one_of("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
SWEPT = Kind("values without $", _swept)
EXCLUSIVE = Kind("true, false or a plain word", lambda value: SWITCH.fits(value) or WORD.fits(value))
VERBOSE = Kind(
    "true, false or names of loggers",
    lambda value: SWITCH.fits(value) or all(JOB.fits(one) for one in (value if isinstance(value, list) else [value])),
)
# what a job's environment may be given; OMP_TOOL_LIBRARIES, for one, names a library to load
VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "CUDA_VISIBLE_DEVICES"),
    *("WANDB_MODE", "WANDB_SILENT"),
)
ANY_NAME = {  # key -> what the names below it may be
    "sweeper.params": re.compile(r"\+{0,2}(?!hydra)[A-Za-z_]\w*(?:[./][A-Za-z_]\w*)*", re.ASCII),
    "job_logging.loggers": re.compile(r"[\w.]+", re.ASCII),
    "hydra_logging.loggers": re.compile(r"[\w.]+", re.ASCII),
}


def _launcher() -> dict[str, Kind]:
    counts = (
        *("timeout_min", "nodes", "tasks_per_node", "cpus_per_task", "cpus_per_gpu", "array_parallelism"),
        "ray.init.object_store_memory",
    )
    whole = (
        *("max_num_timeout", "signal_delay_s", "gpus_per_task", "ray.init.num_cpus", "ray.init.num_gpus"),
        *("ray.init.logging_level", "ray.remote.max_calls", "ray.remote.max_retries"),
    )
    words = (
        *("partition", "account", "qos", "gres", "wckey", "dependency", "mail_type", "mail_user", "gpus_per_node"),
        *("mem", "mem_per_gpu", "mem_per_cpu"),
    )
    others = {
        "_target_": _one_of(*LAUNCHERS),
        "n_jobs": PLACES,
        "name": JOB,
        "comment": REMARK,
        "constraint": FEATURES,
        "exclude": NODES,
        "nodelist": NODES,
        "exclusive": EXCLUSIVE,
        "mem_gb": NUMBER,
        "stderr_to_stdout": SWITCH,
        # of another cluster, answers would be unpickled: who types its address knows it
        "ray.init.address": replace(_one_of("auto", "local"), typed=_is_text),
        "ray.init.log_to_driver": SWITCH,
        "ray.remote.num_cpus": NUMBER,
        "ray.remote.num_gpus": NUMBER,
    }
    kinds = dict.fromkeys(whole, WHOLE) | dict.fromkeys(counts, COUNT) | dict.fromkeys(words, WORD) | others
    return {f"launcher.{key}": kind for key, kind in kinds.items()}


def _sweeper() -> dict[str, Kind]:
    counts = ("n_trials", "n_jobs", "max_batch_size", "sampler.n_ei_candidates", "sampler.population_size")
    shares = ("max_failure_rate", "sampler.mutation_prob", "sampler.crossover_prob", "sampler.swapping_prob")
    switches = ("sampler.multivariate", "sampler.group", "sampler.constant_liar")
    others = {
        "_target_": _one_of(*SWEEPERS),
        "direction": _one_of("maximize", "minimize"),
        "sampler.seed": WHOLE,
        "sampler.n_startup_trials": WHOLE,
        "params.*": SWEPT,
        "sampler._target_": _one_of(*SAMPLERS),
    }
    kinds = dict.fromkeys(counts, COUNT) | dict.fromkeys(shares, SHARE) | dict.fromkeys(switches, SWITCH) | others
    return {f"sweeper.{key}": kind for key, kind in kinds.items()}


ALLOWED: dict[str, Kind] = {
    "mode": _one_of("RUN", "MULTIRUN"),
    "verbose": VERBOSE,
    "job.name": JOB,
    **{f"job.env_set.{name}": WORD for name in VARIABLES},
    **{f"{log}_logging.root.level": LEVEL for log in ("job", "hydra")},
    **{f"{log}_logging.loggers.*.level": LEVEL for log in ("job", "hydra")},
    **_sweeper(),
    **_launcher(),
}


def kind_of(path: KeyPath) -> Kind | None:
    """What the key at `path` below hydra may be set to by a file; None where it may not be set."""
    if not all(isinstance(key, str) for key in path):
        return None
    for group, names in ANY_NAME.items():
        above = tuple(group.split("."))
        if path[: len(above)] == above and len(path) > len(above):
            if names.fullmatch(path[len(above)]) is None:
                return None
            return ALLOWED.get(".".join((*above, "*", *path[len(above) + 1 :])))
    return None if any("." in key or "*" in key for key in path) else ALLOWED.get(".".join(path))
