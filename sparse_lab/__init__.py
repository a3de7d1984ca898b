"""sparse_lab: experiments on networks that are almost entirely zeros. Imports nothing heavy."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_lab.export.packed import load as load

__version__ = "0.2.0"

# torch and numba have a pool of OpenMP threads each, which by default spin for milliseconds after every loop: where
# cores are shared, a sparse step then takes five times as long. Read once, when the libraries are loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


# what a plugin, or anybody's program, makes known under a name; each lives with its noun
REGISTERING = {
    "register_algorithm": "sparse_lab.methods.table",
    "register_choices": "sparse_lab.config",
    "register_column": "sparse_lab.report.tables.columns",
    "register_dataset": "sparse_lab.data.registry",
    "register_distribution": "sparse_lab.sparsity.distributions",
    "register_filter_score": "sparse_lab.sparsity.structured.filter_scores",
    "register_network": "sparse_lab.models.registry",
    "register_schedule": "sparse_lab.methods.schedules",
    "register_score": "sparse_lab.sparsity.scores",
}


def __getattr__(name: str) -> Any:
    if name in REGISTERING:
        return getattr(importlib.import_module(REGISTERING[name]), name)
    if name == "load":  # the one thing that is wanted without the command line; it brings torch
        from sparse_lab.export.packed import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
