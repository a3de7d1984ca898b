"""`sparse-lab doctor`: what machine, versions, devices, data and extras are here; and, given a command, what of that is
missing for it. Nothing is trained, fetched or left behind.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from sparse_lab.cli.doctor.checks import (
    Finding,
    data_sets,
    extras,
    gpus,
    machine,
    plugins,
    room,
    sparse_arithmetic,
    threads,
    versions,
)
from sparse_lab.records.redaction import redact


def main(argv: list[str]) -> int:
    """Print one line a finding. Exit status 0 when the command (or, without one, any run) could start, else 1."""
    parser = argparse.ArgumentParser(
        prog="sparse-lab doctor",
        usage="sparse-lab doctor [OVERRIDES...]",
        description="What is here: machine, versions, devices, extras, data, room to write. With the words of a "
        "command (-m too): what is missing for exactly that command, and what to do about it. Nothing is trained or "
        "fetched.",
        allow_abbrev=False,
    )
    _, command = parser.parse_known_args(argv)
    sections: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("machine", machine),
        ("threads", threads),
        ("GPUs", gpus),
        ("versions", versions),
        ("sparse arithmetic", sparse_arithmetic),
        ("extras", extras),
        ("plugins", plugins),
    ]
    if command:
        from sparse_lab.cli.doctor.command_checks import look

        sections.append(("the command", lambda: look(command)))
    else:
        sections += [("data sets", lambda: data_sets(Path("data"))), ("room", lambda: room(Path("outputs")))]
    missing = 0
    for title, section in sections:
        for finding in _surviving(title, section):
            _say(finding)
            missing += finding.needed and not finding.good
    if command:
        print(f"this command cannot start: {missing} missing" if missing else "this command can start")
    return 1 if missing else 0


def _surviving(title: str, section: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """What is broken here is a finding too."""
    try:
        yield from section()
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        yield Finding(False, f"{title}: cannot be looked at ({type(error).__name__}: {reason})", needed=True)


def _say(finding: Finding) -> None:
    """Marks and colours are for people at a terminal; a file gets words."""
    line = redact(finding.line)
    if sys.stdout.isatty():
        mark, colour = ("✓", 32) if finding.good else ("✗", 31) if finding.needed else ("·", 33)
        print(f"\033[{colour}m{mark}\033[0m {line}" if "NO_COLOR" not in os.environ else f"{mark} {line}")
    else:
        print(f"{'ok' if finding.good else 'missing' if finding.needed else '-':8}{line}")
