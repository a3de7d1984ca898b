"""sparse_lab: experiments on networks that are almost entirely zeros. Imports nothing heavy."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_lab.export.packed import load as load

__version__ = "0.2.0"

# torch and numba have a pool of OpenMP threads each, which by default spin for milliseconds after every loop: where
# cores are shared, a sparse step then takes five times as long. Read once, when the libraries are loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def __getattr__(name: str) -> Any:
    if name == "load":  # the one thing that is wanted without the command line; it brings torch
        from sparse_lab.export.packed import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
