"""Drop and grow at a constant number of weights, against sorted lists; scores from gradients that are at hand."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_lab.sparsity.mask_updates import drop_and_grow
from sparse_lab.sparsity.masks import Masks
from sparse_lab.sparsity.scores import Batches, View, find_score

SIZES = {"0": 30, "1": 12, "2": 1, "3": 60}


def _masks(alive: dict[str, int] | None = None, seed: int = 0) -> Masks:
    """Layers of 30, 12, 1 and 60 weights; `alive` says how many of each are (at random places)."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(4, 3), nn.Linear(1, 1), nn.Conv2d(2, 10, (3, 1)))
    masks = Masks(net)
    if alive is not None:
        new = {}
        for name, number in alive.items():
            flat = torch.zeros(SIZES[name], dtype=torch.bool)
            flat[torch.randperm(SIZES[name])[:number]] = True
            new[name] = flat.reshape(masks[name].shape)
        masks.set(new)
    return masks


def _scores(masks: Masks, seed: int = 7, ties: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    both = [
        {name: torch.randn(weight.shape, generator=generator) for name, weight in masks.weights().items()}
        for _ in range(2)
    ]
    if ties:
        both = [{name: score.round() for name, score in scores.items()} for scores in both]
    return both[0], both[1]


def _ceil(fraction: float, kept: int) -> int:
    """ceil(fraction * kept) of the decimal that was written, not of its nearest binary fraction."""
    return math.ceil(Fraction(str(fraction)) * kept)


def _slow(alive: list[bool], fraction: float, drop: list[float], grow: list[float]) -> list[bool]:
    """One weight at a time: the smallest go (of equals the last one), the largest of those pruned before come (of
    equals the first one).
    """
    living = [i for i, one in enumerate(alive) if one]
    pruned = [i for i, one in enumerate(alive) if not one]
    new = list(alive)
    for _ in range(min(_ceil(fraction, len(living)), len(pruned))):
        worst = living[0]
        for i in living:
            if drop[i] <= drop[worst]:
                worst = i
        best = pruned[0]
        for i in pruned:
            if grow[i] > grow[best]:
                best = i
        living.remove(worst)
        pruned.remove(best)
        new[worst], new[best] = False, True
    return new


def check_exchange(masks: Masks, fraction: float, drop: dict[str, Tensor], grow: dict[str, Tensor]) -> None:
    before = {name: mask.clone() for name, mask in masks.masks().items()}
    counts = masks.kept_by_layer()
    new = drop_and_grow(masks.masks(), fraction, drop, grow)
    assert all(torch.equal(mask, before[name]) for name, mask in masks.masks().items()), "only answers"
    for name, mask in new.items():
        flat = (before[name].flatten().tolist(), fraction, drop[name].flatten().tolist(), grow[name].flatten().tolist())
        assert mask.flatten().tolist() == _slow(*flat), name
        exchanged = min(_ceil(fraction, counts[name]), SIZES[name] - counts[name])
        assert int(mask.sum()) == counts[name]
        assert int((mask & ~before[name]).sum()) == int((before[name] & ~mask).sum()) == exchanged


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("fraction", [0.0, 0.005, 0.1, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(
    "alive",
    [
        {"0": 10, "1": 4, "2": 1, "3": 20},
        {"0": 1, "1": 1, "2": 1, "3": 1},  # one weight each
        {"0": 29, "1": 11, "2": 1, "3": 59},  # room for one each
        {"0": 30, "1": 12, "2": 1, "3": 60},  # dense: no room
        {"0": 15, "1": 6, "2": 0, "3": 30},
    ],
)
def test_one_exchange(alive: dict[str, int], fraction: float, ties: bool) -> None:
    masks = _masks(alive)
    check_exchange(masks, fraction, *_scores(masks, ties=ties))


@given(
    st.tuples(*(st.integers(0, size) for size in SIZES.values())),
    st.integers(0, 100).map(lambda percent: percent / 100),
    st.integers(0, 10),
    st.booleans(),
)
def test_any_exchange(alive: tuple[int, ...], fraction: float, seed: int, ties: bool) -> None:
    masks = _masks(dict(zip(SIZES, alive, strict=True)), seed)
    check_exchange(masks, fraction, *_scores(masks, seed, ties))


@pytest.mark.parametrize(
    ("fraction", "kept", "exchanged"),
    [
        (0.1, 30, 3),  # 0.1 * 30 is 3.0000000000000004
        (0.1, 31, 4),
        (0.3, 10, 3),  # 0.3 * 10 is 3.0
        (0.07, 100, 7),  # 0.07 * 100 is 7.000000000000001
        (0.005, 1, 1),
        (0.005, 200, 1),
        (0.005, 201, 2),
        (0.5, 3, 2),
        (0.5, 1, 1),
        (1 / 3, 3, 1),
        (0.29, 100, 29),
        (0.0, 50, 0),
    ],
)
def test_how_many_are_exchanged(fraction: float, kept: int, exchanged: int) -> None:
    masks = Masks(nn.Sequential(nn.Linear(50, 10)))
    mask = torch.zeros(500, dtype=torch.bool)
    mask[:kept] = True
    masks.set({"0": mask.reshape(10, 50)})
    score = {"0": torch.arange(500.0).reshape(10, 50)}
    new = drop_and_grow(masks.masks(), fraction, score, score)["0"].flatten()
    wanted = [*range(exchanged, kept), *range(500 - exchanged, 500)]
    assert torch.nonzero(new).flatten().tolist() == wanted


def test_what_was_dropped_does_not_come_back_in_the_same_change() -> None:
    """Even where it would be the best to grow, and where nothing but the worst is left to grow."""
    masks = _masks({"0": 20, "1": 8, "2": 1, "3": 50})
    drop, _ = _scores(masks)
    grow = {name: masks[name].double() * 100 for name in SIZES}  # whatever is alive would be the best to grow
    for fraction in (0.2, 0.5, 1.0):
        new = drop_and_grow(masks.masks(), fraction, drop, grow)
        for name, mask in new.items():
            room = SIZES[name] - int(masks[name].sum())
            gone = int((masks[name] & ~mask).sum())
            assert gone == min(_ceil(fraction, int(masks[name].sum())), room)
            assert int((mask & ~masks[name]).sum()) == gone


def test_everything_is_exchanged_at_fraction_1_where_there_is_room() -> None:
    masks = _masks({"0": 10, "1": 6, "2": 1, "3": 30})
    new = drop_and_grow(masks.masks(), 1.0, *_scores(masks))
    for name in ("0", "1", "3"):
        assert not (new[name] & masks[name]).any()
    assert torch.equal(new["1"], ~masks["1"])
    assert torch.equal(new["2"], masks["2"])


@pytest.mark.parametrize("value", [0.0, -torch.inf, -3.0])
def test_scores_that_say_nothing_lose_no_count(value: float) -> None:
    """All gradients zero, or -inf: indices decide, and no pruned weight counts as alive."""
    masks = _masks({"0": 10, "1": 4, "2": 1, "3": 20})
    same = {name: torch.full(mask.shape, value) for name, mask in masks.masks().items()}
    check_exchange(masks, 0.5, same, same)


def test_many_exchanges_keep_every_layers_count() -> None:
    masks = _masks({"0": 3, "1": 11, "2": 1, "3": 30})
    counts = masks.kept_by_layer()
    ever = {name: mask.clone() for name, mask in masks.masks().items()}
    for step in range(200):
        drop, grow = _scores(masks, step, ties=step % 2 == 0)
        masks.set(drop_and_grow(masks.masks(), 0.3, drop, grow))
        assert masks.kept_by_layer() == counts
        for name, mask in masks.masks().items():
            ever[name] |= mask
            assert not masks.weights()[name][~mask].any()
    assert all(mask.all() for mask in ever.values())


def _no_batches() -> Batches:
    raise AssertionError("no batch should have been looked at")


def test_gradients_at_hand_need_no_batch() -> None:
    masks = _masks()
    _, grads = _scores(masks)
    before = {name: grad.clone() for name, grad in grads.items()}
    model = nn.Module()
    model.layers = nn.Sequential(*masks.layers.values())
    taken = {f"layers.{name}": grad for name, grad in grads.items()}
    view = View(model, _no_batches, grads=taken)
    for name, weight in masks.weights().items():
        key, w = f"layers.{name}", weight.detach().double()
        g = before[name].double()
        assert torch.equal(find_score("gradient")(view)[key].double(), g.abs())
        assert torch.equal(find_score("magnitude")(view)[key].double(), w.abs())
        torch.testing.assert_close(find_score("taylor")(view)[key].double(), g * g * w * w, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(view.gradients(power=3)[key].double(), g**3, rtol=1e-6, atol=0.0)
        assert torch.equal(grads[name], before[name])
    assert list(view.gradients()) == list(taken)


def test_gradients_at_hand_are_those_of_a_batch() -> None:
    """The same numbers as the score would have found for itself, when they come from the same batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3))
    images, labels = torch.randn(8, 3, 2, 2), torch.randint(3, (8,))
    nn.functional.cross_entropy(model(images), labels).backward()
    taken = {name: model.get_submodule(name).weight.grad for name in ("1", "3")}
    for score in ("gradient", "taylor"):
        without = find_score(score)(View(model, [(images, labels)]))
        with_them = find_score(score)(View(model, _no_batches, grads=taken))
        for name, value in without.items():
            torch.testing.assert_close(with_them[name], value, rtol=1e-6, atol=1e-9)


def test_without_batches_and_without_gradients_a_score_says_so() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="needs batches"):
        find_score("gradient")(View(model))
    with pytest.raises(AssertionError, match="no batch"):
        find_score("gradient")(View(model, _no_batches))


def test_where_every_gradient_is_zero_chance_decides_not_the_index():
    """A network that is cut: growth at the lowest indices of every layer would join up to a path that nobody found."""
    masks = _masks({"0": 10, "1": 4, "2": 1, "3": 20})
    drop, _ = _scores(masks)
    nothing = {name: torch.zeros_like(score) for name, score in drop.items()}
    before = {name: mask.clone() for name, mask in masks.masks().items()}
    times = torch.zeros(60)
    for seed in range(200):
        new = drop_and_grow(masks.masks(), 0.5, drop, nothing, torch.Generator().manual_seed(seed))
        assert {name: int(mask.sum()) for name, mask in new.items()} == {"0": 10, "1": 4, "2": 1, "3": 20}
        times += (new["3"] & ~before["3"]).flatten()
    # 10 of 40 pruned positions each time: mean 50, standard deviation 6.1
    assert (times[~before["3"].flatten()] - 50).abs().max() < 5 * 6.1
