"""What an interpolation in a file may call: `${oc.env:NAME}` in one could carry a secret to where it is kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from sparse_lab.errors import UserError

RESOLVERS = frozenset(
    {
        *("oc.env", "oc.select", "oc.dict.keys", "oc.dict.values"),
        *("hydra", "now", "python_version", "gpus_a_job", "places", "ray_store"),
    }
)
# what `oc.env` may read: names of folders and of a job's place, which are no secrets anywhere
VARIABLES = (
    *("HOME", "USER", "LOGNAME", "HOSTNAME", "TMPDIR", "SCRATCH", "WORK", "DATA", "CUDA_VISIBLE_DEVICES"),
    *("OMP_NUM_THREADS", "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_CPUS_PER_TASK"),
    "SLURM_TMPDIR",
)
OPENING = re.compile(r"\$\{(?:\s*(?P<resolver>[A-Za-z_][\w.]*)\s*:|\s*[\w.\[\]-]+\s*\})?")
VARIABLE = re.compile(r"\s*(\w+)\s*[,}]")


def check_interpolations(where: str, node: Any) -> None:
    """Refuse a plain value, its keys with it, in which an interpolation calls anything but RESOLVERS, or reads a
    variable that is none of VARIABLES. Raises UserError with one line.
    """
    for text in texts(node):
        for found in OPENING.finditer(text):
            _check(where, text, found)


def _check(where: str, text: str, found: re.Match[str]) -> None:
    if found[0] == "${":  # the name is put together from others, or none
        raise UserError(f"{where}: an interpolation in {text[:80]!r} is put together from others: write its name out")
    resolver = found["resolver"]
    if resolver is None:
        return
    if resolver not in RESOLVERS:
        raise UserError(f"{where}: {found[0]}...}} calls what is not known here; known: {', '.join(sorted(RESOLVERS))}")
    if resolver == "oc.env":
        name = VARIABLE.match(text, found.end())
        if name is None or name[1] not in VARIABLES:
            said = name[1] if name else "a name that is put together"
            raise UserError(
                f"{where}: {found[0]}...}} reads {said}, which stays in the environment; known: {', '.join(VARIABLES)};"
                " a shell puts others in on the command line"
            )


def texts(node: Any) -> Iterator[str]:
    """Every text in a plain value, keys with it."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from texts(key)
            yield from texts(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from texts(value)
