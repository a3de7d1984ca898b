"""Hydra's own flags. They are taken by name: argparse would take any beginning of a name, and Hydra has one that
unpickles a file.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from sparse_lab.errors import UserError

FLAGS = (
    *("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r"),
    *("--multirun", "-m", "--shell-completion", "-sc", "--config-dir", "-cd", "--info", "-i"),
)
OTHER_CONFIG = ("--config-name", "-cn", "--config-path", "-cp")
UNPICKLES = "--experimental-rerun"
PLUGIN = "--plugin"  # ours, taken from the process's own command line before this looks at what is left of it


def check_flags(argv: Iterable[str]) -> None:
    """Refuse every word that begins as a flag does and is none of FLAGS. Raises UserError with one line."""
    for word in argv:
        name = word.partition("=")[0]
        if not word.startswith("-") or name in FLAGS:
            continue
        if name in OTHER_CONFIG:
            raise UserError("--config-name and --config-path would leave sparse_lab's own config: use --config-dir DIR")
        if name == UNPICKLES:
            raise UserError(f"{name} unpickles a file, which could run anything: give the run's command again")
        close = difflib.get_close_matches(name, (*FLAGS, PLUGIN), n=1, cutoff=0.0)[0]
        raise UserError(
            f"cannot read the command line: unknown flag {name!r}; the nearest is {close}; see sparse-lab --help"
        )
