"""Secrets stay in the environment: configs and command lines are kept in records, batch scripts and folders' names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig

from sparse_lab.errors import UserError
from sparse_lab.experiment.security.leaves import leaves
from sparse_lab.records.redaction import is_secret, redact, secret_forms, secret_in

VARIABLE = re.compile(r"\.(?:env_set|env_vars)\.(\w+)$")  # where a config sets environment variables
HELP = ("hydra.help.", "hydra.hydra_help.", "hydra.runtime.")


def check_line(argv: Iterable[str]) -> None:
    """Refuse a command line that holds a secret: commands are kept in records. Raises UserError with one line."""
    forms = secret_forms()
    for word in argv:
        if found := secret_in(word, forms):
            key, given, _ = word.partition("=")
            where = f"{redact(key)} on the command line" if given else "the command line"
            raise UserError(f"{where} holds {found}, and commands are kept in records: keep it in the environment")


def check_config(config: DictConfig) -> None:
    """Refuse a composed config in which a value is, or is made of, a secret. Raises UserError with one line.

    Interpolations are resolved, in Hydra's own node too: a launcher writes what they come to into batch scripts.
    """
    forms = secret_forms()
    for path, value, _ in sorted(leaves(config), key=lambda leaf: leaf[0].startswith("hydra.")):
        if found := secret_in(path, forms):
            raise _kept(redact(path), found)
        if not isinstance(value, str) or path.startswith(HELP):
            continue
        found = secret_in(value, forms)
        if found is None and (match := VARIABLE.search(path)) and is_secret(match[1], value):
            found = f"a value for {match[1]}"
        if found is not None:
            raise _kept(path, found)


def _kept(path: str, found: str) -> UserError:
    return UserError(
        f"{path} would hold {found}, and configs are kept in records: keep it in the environment, where what needs it "
        "looks for it"
    )


def check_values(config: Any) -> None:
    """Refuse a run's config (a dataclass) in which a text is, or is made of, a secret. Raises UserError."""
    forms = secret_forms()

    def look(part: Any, path: str) -> None:
        if isinstance(part, str):
            if found := secret_in(part, forms):
                raise _kept(path, found)
        elif isinstance(part, (list, tuple)):
            for number, value in enumerate(part):
                look(value, f"{path}.{number}")
        elif dataclasses.is_dataclass(part):
            for name, value in vars(part).items():
                look(value, f"{path}.{name}".lstrip("."))

    look(config, "")
