"""Which weights come back, where, and with which values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparse_lab.algorithms.regrow import Regrow, start
from sparse_lab.errors import SparseLabError
from sparse_lab.sparsity.masks import Masks
from sparse_lab.sparsity.schedules import Regrowth


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 5),
    )


def batches(count: int):
    source = torch.Generator().manual_seed(3)
    return [
        (torch.randn(6, 3, 8, 8, generator=source), torch.randint(0, 5, (6,), generator=source)) for _ in range(count)
    ]


def regrow_with(start_density: float = 0.1, **options):
    dense, sparse = net(0), net(0)
    masks = Masks(sparse)
    source = torch.Generator().manual_seed(1)
    masks.set({name: torch.rand(mask.shape, generator=source) < start_density for name, mask in masks.masks().items()})
    seen: list[int] = []
    schedule = Regrowth(0.9, 0.8, 1, 10)
    regrow = Regrow(sparse, masks, schedule, dense, seed=1, changed=lambda *_: seen.append(1), **options)
    return regrow, masks, sparse, seen


def test_taylor_brings_back_the_pruned_weights_that_matter_most_to_the_dense_network():
    """Reference: g^2 w^2 of the dense network by float64 autograd, largest first, in each layer its own share."""
    regrow, masks, sparse, seen = regrow_with(score="taylor", batches=batches(2))
    before = {name: mask.clone() for name, mask in masks.masks().items()}
    reference = net(0).double()
    squares = {name: torch.zeros_like(masks[name], dtype=torch.float64) for name in before}
    for images, labels in batches(2):
        reference.zero_grad()
        nn.functional.cross_entropy(reference(images.double()), labels).backward()
        for name in before:
            weight = reference.get_submodule(name).weight
            squares[name] += (weight.grad * weight.detach()).square() / 2
    regrow.to(0.7)
    assert masks.kept() == round(0.3 * masks.total()) and seen == [1]
    lost = {name: int((~mask).sum()) for name, mask in before.items()}
    for name, old in before.items():
        grown = masks[name] & ~old
        share = (masks.kept() - sum(int(m.sum()) for m in before.values())) * lost[name] / sum(lost.values())
        assert abs(int(grown.sum()) - share) < 1
        best = squares[name].masked_fill(old, -1).flatten().sort(descending=True).indices[: int(grown.sum())]
        assert set(best.tolist()) == set(torch.nonzero(grown.flatten()).flatten().tolist())
        assert not sparse.get_submodule(name).weight[grown].any()


def test_ssim_regrows_first_the_layer_whose_attention_map_is_destroyed():
    how = {"distribution": "ssim", "ssim_layers": 1, "score": "magnitude", "batches": batches(1)}
    regrow, masks, _, _ = regrow_with(start_density=1.1, **how)
    hit = {name: mask.clone() for name, mask in masks.masks().items()}
    hit["0"][:] = False
    hit["0"][0, 0, 0, 0] = (
        True  # the first conv is all but gone; the second sees little of it, but keeps its own weights
    )
    hit["5"][:, ::2] = False
    masks.set(hit)
    before = masks.kept()
    regrow.to(1 - (before + 40) / masks.total())
    assert int(masks["0"].sum()) + int((masks["2"]).sum()) - 1 - 144 == 40
    assert int(masks["5"].sum()) == int(hit["5"].sum())


def test_given_layers_only_and_an_error_when_they_are_full():
    regrow, masks, _, _ = regrow_with(distribution=["2"], score="magnitude")
    before = masks.kept_by_layer()
    regrow.to(1 - (masks.kept() + 50) / masks.total())
    after = masks.kept_by_layer()
    assert after["2"] == before["2"] + 50 and after["0"] == before["0"] and after["5"] == before["5"]
    with pytest.raises(SparseLabError, match="name more of them"):
        regrow.to(0.0)


@pytest.mark.parametrize("value", ["zero", "dense", "kaiming"])
def test_start_values(value):
    sparse, dense = net(0), net(7)
    masks = Masks(sparse)
    old = {name: module.weight.detach().clone() for name, module in masks.layers.items()}
    grown = {name: torch.rand(mask.shape) < 0.5 for name, mask in masks.masks().items()}
    start(masks.weights(), grown, value, dense, torch.Generator().manual_seed(0))
    for name, module in masks.layers.items():
        fresh = module.weight.detach()[grown[name]]
        assert torch.equal(module.weight.detach()[~grown[name]], old[name][~grown[name]])
        if value == "zero":
            assert not fresh.any()
        elif value == "dense":
            assert torch.equal(fresh, dense.get_submodule(name).weight.detach()[grown[name]])
        else:
            bound = math.sqrt(6 / old[name][0].numel())
            assert fresh.abs().max() <= bound and fresh.std() == pytest.approx(bound / math.sqrt(3), rel=0.3)


def test_a_score_of_weights_alone_asks_for_no_batches():
    """Decoding photos for nothing would cost minutes on ImageNet."""
    regrow, masks, _, _ = regrow_with(score="magnitude", batches=lambda: pytest.fail("batches were made"))
    regrow.to(0.8)
    assert masks.kept() == round(0.2 * masks.total())


@pytest.mark.parametrize(
    "options, wanted",
    [
        ({"value": "kaming"}, "value='kaming': did you mean 'kaiming'"),
        ({"score_on": "both"}, "score_on='both': known: dense, sparse"),
        ({"distribution": "1"}, "distribution='1': known: 0, 2, 5, all, ssim"),
        ({"distribution": ["0", "7"]}, "distribution='7'"),
    ],
)
def test_an_unknown_choice_is_refused_before_anything_happens(options, wanted):
    with pytest.raises(SparseLabError) as caught:
        regrow_with(**options)
    assert wanted in str(caught.value)


def test_a_dense_network_of_another_making_is_refused():
    sparse = net(0)
    other = nn.Sequential(*list(net(0))[:-1], nn.Linear(256, 6))
    for dense in (nn.ModuleDict({"body": net(0)}), other):
        with pytest.raises(SparseLabError, match=r"the dense network has no layer '.' of shape"):
            Regrow(sparse, Masks(sparse), Regrowth(0.9, 0.8, 1, 10), dense)
