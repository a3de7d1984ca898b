"""Where taps of a convolution leave the image: what it makes of channels that are one number an image."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Side = tuple[NDArray[np.int64], NDArray[np.bool_]]
Borders = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]


@lru_cache(maxsize=1024)
def classes(taps: int, stride: int, pad: int, dilation: int, inside: int, outside: int) -> Side:
    """Of output positions along one axis: [positions] their class, and [classes, taps] whether a tap lies inside."""
    reads = np.arange(outside)[:, None] * stride - pad + np.arange(taps) * dilation
    found, which = np.unique((reads >= 0) & (reads < inside), axis=0, return_inverse=True)
    return np.ascontiguousarray(which.reshape(-1), np.int64), np.ascontiguousarray(found)
