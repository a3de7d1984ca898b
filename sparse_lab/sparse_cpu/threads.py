"""numba's threads, which whatever runs its kernels imports first of all."""

from __future__ import annotations

import threading

import numba


def _start() -> None:
    """numba starts its threads at the first parallel loop, and tells OpenMP to use as many in the thread that is there:
    torch, which asks OpenMP, would sum in another order from then on, be it imported before or after. They are started
    in a thread that does nothing else, and torch keeps its own number.
    """
    starter = threading.Thread(target=numba.get_num_threads)
    starter.start()
    starter.join()


_start()
