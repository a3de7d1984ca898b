"""numba's threads, which whatever runs its kernels imports first of all."""

from __future__ import annotations

import numba
import torch


def _start() -> None:
    """numba starts its threads at the first parallel loop, and that tells OpenMP, torch's too, to use as many: torch
    would sum in another order from then on. They are started here, and torch keeps its own number.
    """
    before = torch.get_num_threads()
    numba.get_num_threads()
    torch.set_num_threads(before)


_start()
