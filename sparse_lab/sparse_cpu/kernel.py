"""A kernel is a numba function that is compiled in a process of its own, once a machine, and loaded by all others.

A process that compiles a kernel does not run what it saves. numba optimises the loop of a kernel, then links it into
the kernel and optimises both; the process runs the first, the file holds the second, and the two may round a sum in
other places. A run that was stopped in the process that compiled would go on to other bits than one that was not.
So every process that trains loads. This file and the kernels' own import no torch, or compiling would wait for it.
"""

from __future__ import annotations

import os
import pickle
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import config
from numba.core.caching import FunctionCache

from sparse_lab.errors import SparseLabError
from sparse_lab.host.file_lock import lock as take

# sums may be reordered and fused; NaN and infinity keep their meaning, for a diverged run has to be seen
KERNEL: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}, "nogil": True, "cache": True}
INLINED: dict[str, Any] = {**KERNEL, "forceinline": True}  # with njit: what kernels call in their loops
LOCK = "kernels.lock"
COMPILES = "SPARSE_LAB_COMPILES_KERNELS"  # set in processes that are there to compile
PROGRAM = """
import importlib, pickle, sys
module, name, types = pickle.load(sys.stdin.buffer)
getattr(importlib.import_module(module), name).compile(types)
"""


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make a kernel of a function; options: numba's own, `KERNEL` among them."""

    def make(function: Callable[..., Any]) -> Any:
        if not _has_cache(function):
            return njit(**{**options, "cache": False})(function)
        made = njit(**options)(function)
        made._cache = _CompiledElsewhere(function)
        return made

    return make


_caches: dict[str, bool] = {}  # of the sources in a folder


def _has_cache(function: Callable[..., Any]) -> bool:
    """Find a folder for what is compiled of a function, if need be among the temporary files. False without any."""
    sources = os.path.dirname(function.__code__.co_filename)
    if sources not in _caches:
        _caches[sources] = _can_be_kept(function) or (_use_temporary_folder() and _can_be_kept(function))
    return _caches[sources]


def _can_be_kept(function: Callable[..., Any]) -> bool:
    """Is there a folder for what is compiled of a function, which can be written and locked?"""
    try:
        with (Path(FunctionCache(function).cache_path) / LOCK).open("w") as lock, suppress(BlockingIOError):
            take(lock, lock.name, wait=False)
    except (OSError, RuntimeError, SparseLabError):
        return False
    return True


def _use_temporary_folder() -> bool:
    """Let numba keep all that is compiled in a folder of this user's among the temporary files. False without one.

    What numba reads there it unpickles, so nobody else may have made it. Processes that this one starts use it too.
    """
    try:
        folder = Path(tempfile.gettempdir()) / f"sparse_lab-kernels-{os.geteuid()}"
        try:
            folder.mkdir(mode=0o700)
            new = True
        except FileExistsError:
            found = folder.lstat()
            own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
            folder, new = (folder, False) if own else (Path(tempfile.mkdtemp(prefix="sparse_lab-kernels-")), True)
    except OSError as error:
        warnings.warn(
            f"kernels are compiled anew in every process, as none can keep them ({error.strerror}): sums may differ in "
            "their last bit from those of a process that loads them; NUMBA_CACHE_DIR=DIR names a folder for them",
            stacklevel=2,
        )
        return False
    config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"] = str(folder)  # type: ignore[attr-defined]
    if new:
        warnings.warn(
            f"kernels are compiled into {folder}: neither the package's folder nor the home can be written and locked "
            "(NUMBA_CACHE_DIR=DIR names another)",
            stacklevel=2,
        )
    return True


class _CompiledElsewhere(FunctionCache):
    """numba's cache of one function; what it lacks is made by another process, one at a time: numba's index of a cache
    has no lock, and two that write it can leave the code of one type under the name of another.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        found = super().load_overload(sig, target_context)
        if found is not None or COMPILES in os.environ:
            return found
        with (Path(self.cache_path) / LOCK).open("w") as lock:
            take(lock, lock.name)
            found = super().load_overload(sig, target_context)
            if found is None:
                self._compile(sig)
        return found or super().load_overload(sig, target_context)

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError:  # a full disk: this process has what it compiled all the same
            if COMPILES in os.environ:
                raise

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
