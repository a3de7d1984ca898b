"""One step of SGD and of Adam at the positions that a mask keeps: gather, update and scatter in one pass.

The order of operations is torch's, and nothing is reassociated, so that the numbers are torch's own but for the last
bit (which of two roundings a multiply-add keeps is the compiler's choice). All arrays but `positions` and `gradient`
are whole tensors, flat; scalars have the arrays' type, or float32 would be computed in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from sparse_lab.sparse_cpu.kernel import kernel

KERNEL: dict[str, Any] = {
    "parallel": True,
    "fastmath": {"contract"},
    "nogil": True,
    "cache": True,
    "error_model": "numpy",  # a division needs no test for zero
}


@kernel(**KERNEL)
def sgd(weight, positions, gradient, lr, decay):  # type: ignore[no-untyped-def]
    for i in prange(len(positions)):
        at = positions[i]
        weight[at] -= lr * (gradient[i] + decay * weight[at])


@kernel(**KERNEL)
def sgd_momentum(weight, velocity, positions, gradient, lr, decay, momentum, nesterov, first):  # type: ignore[no-untyped-def]
    """first: no velocity yet, it starts as the gradient."""
    for i in prange(len(positions)):
        at = positions[i]
        step = gradient[i] + decay * weight[at]
        new = step if first else velocity[at] * momentum + step
        velocity[at] = new
        if nesterov:
            new = step + momentum * new
        weight[at] -= lr * new


@kernel(**KERNEL)
def adam(weight, mean, square, positions, gradient, shrink, decay, rate1, beta2, rate2, size, root, eps):  # type: ignore[no-untyped-def]
    """shrink: factor on the weight (AdamW); decay: added to the gradient (Adam); rate1, rate2: 1 - beta1, 1 - beta2.

    size: lr / (1 - beta1^t); root: sqrt(1 - beta2^t).
    """
    for i in prange(len(positions)):
        at = positions[i]
        value = weight[at] * shrink
        step = gradient[i] + decay * value
        first = mean[at] + rate1 * (step - mean[at])
        second = square[at] * beta2 + rate2 * step * step
        mean[at] = first
        square[at] = second
        weight[at] = value - size * first / (np.sqrt(second) / root + eps)
