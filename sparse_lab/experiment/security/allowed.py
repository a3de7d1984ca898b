"""Which of Hydra's own keys a config file may set, and to what. A file of conf/ is ours, and may set any."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparse_lab.experiment.security.targets import LAUNCHERS, SAMPLERS, SWEEPERS

KeyPath = tuple[Any, ...]  # of a key below hydra; a hostile file may have keys that are no text


@dataclass(frozen=True)
class Kind:
    """What a value may be, beside null. said: in words."""

    said: str
    fits: Callable[[Any], bool]


def _whole(value: Any) -> bool:
    return type(value) is int and -1 <= value <= 1_000_000_000


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _text(said: str, pattern: str) -> Kind:
    form = re.compile(pattern, re.ASCII)
    return Kind(said, lambda value: type(value) in (str, int) and form.fullmatch(str(value)) is not None)


def _one_of(*known: str) -> Kind:
    return Kind(f"one of {', '.join(known)}", lambda value: isinstance(value, str) and value in known)


def _swept(value: Any) -> bool:
    """Hydra makes an override of it: what an interpolation left would be read once more."""
    if isinstance(value, list):
        return all(_swept(one) and not isinstance(one, list) for one in value)
    if isinstance(value, str):
        return value.isprintable() and "$" not in value
    return type(value) in (int, bool) or _number(value)


WHOLE = Kind("a whole number", _whole)
NUMBER = Kind("a number", _number)
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
    whole = (
        *("n_jobs", "timeout_min", "max_num_timeout", "signal_delay_s", "nodes", "tasks_per_node", "cpus_per_task"),
        *("cpus_per_gpu", "gpus_per_task", "array_parallelism", "ray.init.num_cpus", "ray.init.num_gpus"),
        *("ray.init.object_store_memory", "ray.init.logging_level", "ray.remote.max_calls", "ray.remote.max_retries"),
    )
    words = (
        *("partition", "account", "qos", "gres", "wckey", "dependency", "mail_type", "mail_user", "gpus_per_node"),
        *("mem", "mem_per_gpu", "mem_per_cpu"),
    )
    others = {
        "_target_": _one_of(*LAUNCHERS),
        "name": JOB,
        "comment": REMARK,
        "constraint": FEATURES,
        "exclude": NODES,
        "nodelist": NODES,
        "exclusive": EXCLUSIVE,
        "mem_gb": NUMBER,
        "stderr_to_stdout": SWITCH,
        "ray.init.address": _one_of("auto", "local"),  # of another cluster, answers would be unpickled
        "ray.init.log_to_driver": SWITCH,
        "ray.remote.num_cpus": NUMBER,
        "ray.remote.num_gpus": NUMBER,
    }
    kinds = dict.fromkeys(whole, WHOLE) | dict.fromkeys(words, WORD) | others
    return {f"launcher.{key}": kind for key, kind in kinds.items()}


def _sweeper() -> dict[str, Kind]:
    whole = (
        *("n_trials", "n_jobs", "max_batch_size", "sampler.seed", "sampler.n_startup_trials"),
        *("sampler.n_ei_candidates", "sampler.population_size"),
    )
    numbers = ("max_failure_rate", "sampler.mutation_prob", "sampler.crossover_prob", "sampler.swapping_prob")
    switches = ("sampler.multivariate", "sampler.group", "sampler.constant_liar")
    others = {
        "_target_": _one_of(*SWEEPERS),
        "direction": _one_of("maximize", "minimize"),
        "params.*": SWEPT,
        "sampler._target_": _one_of(*SAMPLERS),
    }
    kinds = dict.fromkeys(whole, WHOLE) | dict.fromkeys(numbers, NUMBER) | dict.fromkeys(switches, SWITCH) | others
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
