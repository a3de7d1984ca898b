"""Multiply-adds and bytes against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparse_lab.bench.roofline import PASSES, WEIGHT_IN_TRAINING, Machine, Work, inference_work, machine, training_work
from sparse_lab.export.dead_channels import reduced
from sparse_lab.export.lowering import traced
from sparse_lab.sparsity.masks import Masks


def _network() -> nn.Module:
    """8x8 images: a strided convolution (4 x 4 x 4 outputs), one that keeps the size (6 channels), 5 logits."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )
    masks = Masks(network)
    keep = {name: torch.zeros_like(mask) for name, mask in masks.masks().items()}
    for name, kept in (("0", 7), ("2", 10), ("5", 4)):
        keep[name].view(-1)[:kept] = True
    masks.set(keep)
    return network


def test_a_training_step_is_three_products_a_live_weight_and_position():
    work = training_work(_network(), 8, images=10)
    assert work.macs == 3 * 10 * (7 * 16 + 10 * 16 + 4)
    outputs = 4 * 16 + 6 * 16 + 5
    assert work.bytes == sum(PASSES.values()) * 10 * outputs * 4 + WEIGHT_IN_TRAINING * (7 + 10 + 4)


def test_inference_counts_what_is_left_of_the_network():
    # the first 7 weights are in filter 0, the first 10 of the second layer read channel 0 (9) and 1 (1, dead)
    graph = reduced(traced(_network(), 8))
    work = inference_work(graph, images=10)
    assert work.macs == 10 * (7 * 16 + 9 * 16 + 1)  # of the 4 weights of logit 0 one reads the only channel
    assert work.bytes == 2 * 10 * (16 + 16 + 5) * 4 + 8 * (7 + 9 + 1)


def test_the_bound_is_the_slower_of_both():
    fast = Machine(operations=100.0, bytes=10.0)
    assert fast.bound(Work(macs=500, bytes=20)) == pytest.approx(10.0)
    assert fast.bound(Work(macs=50, bytes=20)) == pytest.approx(2.0)


def test_the_peaks_are_measured():
    found = machine(size=128, numbers=2**16, repeats=2)
    assert 1e7 < found.operations < 1e14 and 1e7 < found.bytes < 1e13
