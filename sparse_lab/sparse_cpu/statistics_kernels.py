"""Small sums over blocks and channels between the large kernels: one call each in place of a chain of numpy's.

None is parallel, and nothing is reassociated: they are short, and the order of sums is that in which they stand here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparse_lab.sparse_cpu.kernel import kernel

KERNEL: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}


@kernel(**KERNEL)
def merged(means, squares, numbers, mean, variance):  # type: ignore[no-untyped-def]
    """mean, variance [C] (zeros): of a batch, biased, from [blocks * C] those of planes of `numbers` numbers each, the
    mean and the sum of squared deviations from it.
    """
    channels = mean.size
    blocks = means.size // channels
    for plane in range(means.size):
        mean[plane % channels] += means[plane]
    for channel in range(channels):
        mean[channel] /= blocks
    for plane in range(means.size):
        away = means[plane] - mean[plane % channels]
        variance[plane % channels] += squares[plane] + numbers * away * away
    for channel in range(channels):
        variance[channel] /= numbers * blocks


@kernel(**KERNEL)
def follow(running_mean, running_var, mean, variance, number, momentum):  # type: ignore[no-untyped-def]
    """Running statistics as torch keeps them: of the unbiased variance of `number` numbers a channel."""
    unbiased = number / max(1, number - 1)
    for channel in range(mean.size):
        running_mean[channel] = running_mean[channel] * (1.0 - momentum) + mean[channel] * momentum
        running_var[channel] = running_var[channel] * (1.0 - momentum) + variance[channel] * unbiased * momentum


@kernel(**KERNEL)
def affine(mean, variance, weight, bias, epsilon, deviation, numbers):  # type: ignore[no-untyped-def]
    """deviation [C]: 1 / standard deviation; numbers [3, C]: mean, scale and shift of a BatchNorm, in the dtype of the
    maps.
    """
    for channel in range(mean.size):
        deviation[channel] = 1.0 / np.sqrt(variance[channel] + epsilon)
        numbers[0, channel] = mean[channel]
        numbers[1, channel] = deviation[channel] * weight[channel]
        numbers[2, channel] = bias[channel]


@kernel(**KERNEL)
def constants(constant, mean, scale, shift, low, high, made):  # type: ignore[no-untyped-def]
    """made [C]: what a normalisation and an activation make of channels that hold one number. NaN passes through."""
    for channel in range(mean.size):
        y = (constant[channel] - mean[channel]) * scale[channel] + shift[channel]
        y = low if y < low else y
        made[channel] = high if y > high else y


@kernel(**KERNEL)
def planes(partial, total):  # type: ignore[no-untyped-def]
    """total [2, C] += partial [blocks * C, 2], added up over blocks."""
    channels = total.shape[1]
    for plane in range(partial.shape[0]):
        total[0, plane % channels] += partial[plane, 0]
        total[1, plane % channels] += partial[plane, 1]


@kernel(**KERNEL)
def through(total, product, scale, deviation, share, numbers):  # type: ignore[no-untyped-def]
    """numbers [4, C]: what goes back through a BatchNorm's statistics by sum and by product, the gradients of its
    weight and of its bias. share: 1 / the number of positions, or 0 where the statistics are not those of the batch.
    """
    for channel in range(scale.size):
        own = share * scale[channel]
        numbers[0, channel] = own * total[channel]
        numbers[1, channel] = own * deviation[channel] * deviation[channel] * product[channel]
        numbers[2, channel] = product[channel] * deviation[channel]
        numbers[3, channel] = total[channel]


@kernel(**KERNEL)
def summed(partial, entries, gradient):  # type: ignore[no-untyped-def]
    """gradient[entries] = the sum over blocks of partial [blocks, entries]."""
    for entry in range(entries.size):
        total = 0.0
        for block in range(partial.shape[0]):
            total += partial[block, entry]
        gradient[entries[entry]] = total


@kernel(**KERNEL)
def beyond(some, others):  # type: ignore[no-untyped-def]
    """Is any of `some` none of `others`?"""
    for place in range(some.size):  # noqa: SIM110  a generator is slow
        if some[place] and not others[place]:
            return True
    return False


@kernel(**KERNEL)
def add_where(totals, channels, others):  # type: ignore[no-untyped-def]
    """totals += others, both [blocks, C, block], of these channels [C]. Memory of others is not touched."""
    for block in range(totals.shape[0]):
        for channel in range(channels.size):
            if channels[channel]:
                for image in range(totals.shape[2]):
                    totals[block, channel, image] += others[block, channel, image]


@kernel(**KERNEL)
def numbers(channels, constant, per_image, images, found):  # type: ignore[no-untyped-def]
    """found[:, channels] [blocks, C, block]: images where per_image [C] says so, else constant [C]."""
    for block in range(found.shape[0]):
        for channel in channels:
            for image in range(found.shape[2]):
                found[block, channel, image] = (
                    images[block, channel, image] if per_image[channel] else constant[channel]
                )
