"""Masks have exactly the number of weights; a global threshold is one; SynFlow stays connected."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from sparse_lab.bench.cells import MASKS, SPARSITIES
from sparse_lab.bench.patterns import STEP, Patterns, _way, build
from sparse_lab.sparsity.connectivity import connectivity
from sparse_lab.sparsity.masks import Masks


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("model", ["vgg16", "mobilenet_v2"])
def test_the_count_is_exact_and_no_layer_is_empty(kind, model):
    patterns = Patterns(model, 0.125, (80.0, 99.0))
    total = sum(mask.numel() for mask in patterns(kind, 99.0).values())
    for sparsity in (80.0, 99.0):
        kept = [int(mask.sum()) for mask in patterns(kind, sparsity).values()]
        assert sum(kept) == round((1 - sparsity / 100) * total) and min(kept) >= 1
    assert patterns(kind, 99.0) is patterns(kind, 99.0)  # made once


def test_erk_counts_are_in_proportion_to_the_sum_of_dimensions():
    masks = Patterns("vgg16", 0.25, (99.5,))("erk", 99.5)
    deep = {name: mask for name, mask in masks.items() if mask.numel() > 50_000}
    scale = [int(mask.sum()) / sum(mask.shape) for mask in deep.values()]
    assert len(scale) > 5 and max(scale) / min(scale) < 1.02


def test_the_global_masks_are_those_of_one_threshold_over_exponential_weights():
    # P(|w| > t) = exp(-sqrt(2) t / s): so -s log(density) is the same in all layers, up to chance
    masks = Patterns("vgg16", 0.5, (95.0,))("global", 95.0)
    thresholds = []
    for mask in masks.values():
        if mask.numel() > 20_000:
            outputs, inputs, *window = mask.shape
            deviation = math.sqrt(4 / ((outputs + inputs) * math.prod(window)))
            thresholds.append(-deviation * math.log(int(mask.sum()) / mask.numel()))
    assert len(thresholds) > 5 and max(thresholds) / min(thresholds) < 1.05


def test_synflow_stays_connected_where_random_masks_fall_apart():
    patterns, found = Patterns("vgg16", 0.25, (90.0, 99.9)), {}
    for kind in ("erk", "synflow"):
        model = build("vgg16", 0.25)
        Masks(model).set(patterns(kind, 99.9))
        found[kind] = connectivity(model, 32)
    assert not found["erk"].connected
    assert found["synflow"].live_logits > 0 and found["synflow"].effective > 0.9 * found["synflow"].kept


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["vgg16", "resnet34"])
def test_synflow_is_connected_at_9999_in_full_width(name):
    model = build(name, 1.0)
    Masks(model).set(Patterns(name, 1.0, SPARSITIES)("synflow", 99.99))
    assert connectivity(model, 32).live_logits > 0


def test_the_way_to_a_sparsity_is_made_in_steps():
    way = _way((90.0, 99.99))
    assert way == sorted(way) and {90.0, 99.99} <= set(way)
    densities = [1.0, *(1 - sparsity / 100 for sparsity in way)]
    assert all(after / before >= STEP - 1e-9 for before, after in pairwise(densities))
