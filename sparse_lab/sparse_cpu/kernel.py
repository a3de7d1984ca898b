"""A kernel is a numba function that is compiled in a process of its own, once a machine, and loaded by all others.

A process that compiles a kernel does not run what it saves. numba optimises the loop of a kernel, then links it into
the kernel and optimises both; the process runs the first, the file holds the second, and the two may round a sum in
other places. A run that was stopped in the process that compiled would go on to other bits than one that was not.
So every process that trains loads. This file and the kernels' own import no torch, or compiling would wait for it.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache

# sums may be reordered and fused; NaN and infinity keep their meaning, for a diverged run has to be seen
KERNEL: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}, "nogil": True, "cache": True}
INLINED: dict[str, Any] = {**KERNEL, "forceinline": True}  # with njit: what kernels call in their loops
COMPILES = "SPARSE_LAB_COMPILES_KERNELS"  # set in processes that are there to compile
PROGRAM = """
import importlib, pickle, sys
module, name, types = pickle.load(sys.stdin.buffer)
getattr(importlib.import_module(module), name).compile(types)
"""


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make a kernel of a function; options: numba's own, `KERNEL` among them."""

    def make(function: Callable[..., Any]) -> Any:
        made = njit(**options)(function)
        made._cache = _CompiledElsewhere(function)
        return made

    return make


class _CompiledElsewhere(FunctionCache):
    """numba's cache of one function; what it lacks is made by another process, one at a time: numba's index of a cache
    has no lock, and two that write it can leave the code of one type under the name of another.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        found = super().load_overload(sig, target_context)
        if found is not None or COMPILES in os.environ:
            return found
        with (Path(self.cache_path) / "kernels.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = super().load_overload(sig, target_context)
            if found is None:
                self._compile(sig)
        return found or super().load_overload(sig, target_context)

    def _compile(self, sig: Any) -> None:
        asked = pickle.dumps((self._py_func.__module__, self._py_func.__qualname__, sig))
        path = os.pathsep.join(place or os.getcwd() for place in sys.path)
        environment = {**os.environ, "PYTHONPATH": path, COMPILES: "1"}
        try:
            # in a session of its own: Ctrl-C stops the run, and what is compiled by then is not torn
            subprocess.run(
                [sys.executable, "-P", "-c", PROGRAM], input=asked, capture_output=True, check=True,
                start_new_session=True, env=environment,
            )  # fmt: skip
        except (OSError, subprocess.CalledProcessError) as error:
            lines = str(getattr(error, "stderr", None) or b"", "utf-8", "replace").strip().splitlines() or [str(error)]
            warnings.warn(
                f"kernel {self._py_func.__name__} is compiled in this process, as another one could not ({lines[-1]}): "
                "sums may differ in their last bit from those of a process that loads it",
                stacklevel=2,
            )
