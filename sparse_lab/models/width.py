"""How many channels a layer has at a width factor."""

from __future__ import annotations

import math


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, rounded to a whole number, at least 1."""
    return max(1, round(channels * width))


def scaled_to_eights(channels: int, width: float) -> int:
    """`channels` times `width` as the nearest multiple of 8 (at least 8) that is not more than 10% too small.

    The rule of the MobileNets' authors (Sandler et al., CVPR 2018; their public model code).
    """
    wish = channels * width
    eights = max(1, math.floor(wish / 8 + 0.5))
    return 8 * eights if 8 * eights >= 0.9 * wish else 8 * (eights + 1)
