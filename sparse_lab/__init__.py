"""sparse_lab: networks that are almost entirely zeros. This is the library's door; nothing heavy is imported before it
is asked for.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_lab import callbacks as callbacks
    from sparse_lab.algorithms.cyclic import CyclicSparsity as CyclicSparsity
    from sparse_lab.algorithms.drop_and_grow import MEST as MEST
    from sparse_lab.algorithms.drop_and_grow import SET as SET
    from sparse_lab.algorithms.drop_and_grow import DropAndGrow as DropAndGrow
    from sparse_lab.algorithms.drop_and_grow import GraNet as GraNet
    from sparse_lab.algorithms.drop_and_grow import RigL as RigL
    from sparse_lab.algorithms.dyrelu_phasing import DyReLUPhasing as DyReLUPhasing
    from sparse_lab.algorithms.prune import GMP as GMP
    from sparse_lab.algorithms.prune import Prune as Prune
    from sparse_lab.algorithms.regrow import Regrow as Regrow
    from sparse_lab.algorithms.weight_sharing import WeightSharing as WeightSharing
    from sparse_lab.errors import SparseLabError as SparseLabError
    from sparse_lab.errors import UserError as UserError
    from sparse_lab.export.packed import load as load
    from sparse_lab.methods.handle import Handle as Handle
    from sparse_lab.methods.plain import plain_state_dict as plain_state_dict
    from sparse_lab.methods.sparsify import sparsify as sparsify
    from sparse_lab.sparsity.masks import Masks as Masks

__version__ = "0.2.0"

# torch and numba have a pool of OpenMP threads each, which by default spin for milliseconds after every loop: where
# cores are shared, a sparse step then takes five times as long. Read once, when the libraries are loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# what is had from here, and where it lives: imported when it is asked for, for it brings torch
PUBLIC = {
    "sparsify": "sparse_lab.methods.sparsify",
    "Handle": "sparse_lab.methods.handle",
    "plain_state_dict": "sparse_lab.methods.plain",
    "load": "sparse_lab.export.packed",
    "Masks": "sparse_lab.sparsity.masks",
    "Prune": "sparse_lab.algorithms.prune",
    "GMP": "sparse_lab.algorithms.prune",
    "Regrow": "sparse_lab.algorithms.regrow",
    "DropAndGrow": "sparse_lab.algorithms.drop_and_grow",
    "SET": "sparse_lab.algorithms.drop_and_grow",
    "RigL": "sparse_lab.algorithms.drop_and_grow",
    "GraNet": "sparse_lab.algorithms.drop_and_grow",
    "MEST": "sparse_lab.algorithms.drop_and_grow",
    "CyclicSparsity": "sparse_lab.algorithms.cyclic",
    "DyReLUPhasing": "sparse_lab.algorithms.dyrelu_phasing",
    "WeightSharing": "sparse_lab.algorithms.weight_sharing",
    "SparseLabError": "sparse_lab.errors",
    "UserError": "sparse_lab.errors",
    # what a plugin, or anybody's program, makes known under a name: each lives with its noun
    "register_algorithm": "sparse_lab.methods.table",
    "register_choices": "sparse_lab.config",
    "register_column": "sparse_lab.report.tables.columns",
    "register_dataset": "sparse_lab.data.registry",
    "register_distribution": "sparse_lab.sparsity.distributions",
    "register_filter_score": "sparse_lab.sparsity.structured.filter_scores",
    "register_model": "sparse_lab.models.registry",
    "register_schedule": "sparse_lab.methods.schedules",
    "register_score": "sparse_lab.sparsity.scores",
}


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        return getattr(importlib.import_module(PUBLIC[name]), name)
    if name == "callbacks":
        return importlib.import_module("sparse_lab.callbacks")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC, "callbacks"])
