"""Layers that are left out, and layers with a sparsity of their own. What is left out is the dense layer that it is: in
every use of the network it does what a counted layer does whose mask keeps everything.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparse_lab import models
from sparse_lab.callbacks.gradient_norms import part_norms
from sparse_lab.errors import SparseLabError
from sparse_lab.models import offsets, weight_sharing
from sparse_lab.sparsity.choose import OwnSparsity, check_own, choose
from sparse_lab.sparsity.connectivity import connectivity, on_paths
from sparse_lab.sparsity.distributions import DISTRIBUTIONS, distribute
from sparse_lab.sparsity.flops import layer_costs
from sparse_lab.sparsity.mask_updates import grow_to, move_to, prune_to
from sparse_lab.sparsity.masks import Masks, count, layers, num_kept, uncounted
from sparse_lab.sparsity.paths import connected_init
from sparse_lab.sparsity.scores import View, find_score
from sparse_lab.sparsity.structured import channels
from sparse_lab.sparsity.structured.filter_scores import filtered
from sparse_lab.sparsity.structured.remove_channels import thin


def small(name: str = "vgg16") -> nn.Module:
    torch.manual_seed(1)
    return models.build(name, 10, 0.125, 32)


def pruned(model: nn.Module, sparsity: float, distribution: str = "erk") -> Masks:
    masks = Masks(model)
    scores = find_score("random")(View(model, generator=torch.Generator().manual_seed(2)))
    masks.set(prune_to(masks, num_kept(sparsity, masks.total()), scores, distribution))
    return masks


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        ([], ["fc"], lambda name, kind: name != "fc"),
        ([], ["layer4.*", "conv1"], lambda name, kind: not name.startswith("layer4.") and name != "conv1"),
        ([], ["Linear"], lambda name, kind: kind is nn.Conv2d),
        (["Linear"], [], lambda name, kind: kind is nn.Linear),
        (["layer?.0.*"], ["*.downsample.*"], lambda name, kind: name[6:9] == ".0." and "downsample" not in name),
    ],
)
def test_layers_are_named_by_name_glob_or_type(include, exclude, left):
    model = small("resnet34")
    every = layers(model)
    choose(model, include, exclude)
    wanted = [name for name, layer in every.items() if left(name, type(layer))]
    for network in (model, copy.deepcopy(model)):
        assert list(layers(network)) == wanted and list(Masks(network).layers) == wanted
        assert count(network) == sum(every[name].weight.numel() for name in wanted)
        out = [one["name"] for one in uncounted(network) if one["kind"] == "excluded"]
        assert out == [f"{name}.weight" for name in every if name not in wanted]
        assert not any(hasattr(network.get_submodule(name), "mask") for name in every if name not in wanted)


def test_what_is_said_again_takes_the_place_of_what_was_said():
    model = small()
    choose(model, exclude=["Linear"], layers={"features.0": 0.5}, target=0.9)
    choose(model)
    assert list(layers(model)) == list(layers(small()))
    assert not any(hasattr(layer, "own_sparsity") for layer in layers(model).values())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))
        self.second.weight = self.first.weight


def test_tied_layers_are_left_out_together_by_any_of_their_names():
    model = Tied()
    choose(model, exclude=["second"])
    assert list(layers(model)) == ["third"] and count(model) == 36
    assert [one["name"] for one in uncounted(model)] == ["first.weight"]


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({"exclude": ["features.00"]}, "exclude: 'features.00' matches no layer: .* did you mean 'features.0'"),
        ({"include": ["BatchNorm2d"]}, "include: 'BatchNorm2d' names BatchNorm2d alone, and masks are for conv and"),
        ({"exclude": ["features.1"]}, "exclude: 'features.1' names BatchNorm2d alone"),
        ({"exclude": ["*"]}, r"exclude=\['\*'\] leaves no layer to count"),
        ({"include": ["Linear"], "exclude": ["Linear"]}, "leaves no layer to count"),
        ({"layers": {"head": 0.5}}, "layers: 'head' matches no layer"),
        ({"layers": {"Linear": 1.0}}, r"layers: 'Linear' has sparsity 1, outside \[0, 1\)"),
        ({"layers": {"Linear": 0.5}, "exclude": ["Linear"]}, "layers: 'Linear' names layers that are not counted"),
        (
            {"layers": {"Conv2d": 0.5, "features.0": 0.6}},
            "layers: 'Conv2d' gives 'features.0' 0.5 and 'features.0' 0.6: name it once",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line(said, line):
    with pytest.raises(SparseLabError, match=line) as caught:
        choose(small(), target=0.9, **said)
    assert "\n" not in str(caught.value)


def test_two_patterns_may_give_a_layer_the_same_sparsity_and_masks_come_later():
    model = small()
    choose(model, layers={"Conv2d": 0.5, "features.0": 0.5}, target=0.6)
    assert layers(model)["features.0"].own_sparsity == OwnSparsity(0.5, 0.6)
    Masks(model)
    with pytest.raises(SparseLabError, match="has a mask already"):
        choose(model, exclude=["Linear"])


# --- sparsities of their own ---

OWN = {"features.0": 0.1, "features.3?": 0.97}
TARGET = 0.9


def own_model() -> nn.Module:
    model = small()
    choose(model, layers=OWN, target=TARGET)
    return model


def expected(name: str, number: int, kept: int, total: int) -> float:
    """As the issue says it, in other words: at the target the layer's own density, on both sides in proportion."""
    own, sparsity = OWN["features.0" if name == "features.0" else "features.3?"], 1 - kept / total
    if sparsity <= TARGET:
        return number - number * own * sparsity / TARGET
    return number * (1 - own) * (kept / total) / (1 - TARGET)


def named(masks: Masks) -> list[str]:
    return [name for name in masks.layers if name in ("features.0", "features.30", "features.34", "features.37")]


@pytest.mark.parametrize("distribution", [*DISTRIBUTIONS, "global", "lamp"])
def test_the_total_is_exact_and_the_others_share_the_rest_as_if_they_were_alone(distribution):
    model = own_model()
    masks = Masks(model)
    total, weights = masks.total(), masks.weights()
    scores = find_score("random")(View(model))
    for sparsity in (0.3, 0.75, TARGET, 0.95, 0.99):
        kept = num_kept(sparsity, total)
        new = prune_to(masks, kept, scores, distribution)
        counts = {name: int(mask.sum()) for name, mask in new.items()}
        assert sum(counts.values()) == kept
        for name in named(masks):
            near = abs(counts[name] - expected(name, weights[name].numel(), kept, total))
            assert near <= (0.5 if sparsity == TARGET else 1.0), (name, sparsity)
        rest = [name for name in masks.layers if name not in named(masks)]
        alone = [{name: one[name] for name in rest} for one in (weights, scores, masks.masks())]
        left = kept - sum(counts[name] for name in named(masks))
        assert {name: counts[name] for name in rest} == distribute(distribution, left, *alone)
    own = {name: round((1 - 0.97) * weights[name].numel()) for name in named(masks)[1:]}
    at_target = prune_to(masks, num_kept(TARGET, total), scores, distribution)
    assert {name: int(at_target[name].sum()) for name in own} == own


def test_they_grow_and_move_to_their_own_counts():
    masks = pruned(own_model(), 0.97)
    total, weights = masks.total(), masks.weights()
    scores = {name: torch.rand_like(weight) for name, weight in weights.items()}
    for sparsity in (0.95, 0.93, TARGET, 0.8):
        kept = num_kept(sparsity, total)
        for new in (grow_to(masks, kept, scores, [list(masks.layers)]), move_to(masks, kept, scores, scores, "erk")):
            assert sum(int(mask.sum()) for mask in new.values()) == kept
            for name in named(masks):
                near = abs(int(new[name].sum()) - expected(name, weights[name].numel(), kept, total))
                assert near <= (0.5 if sparsity == TARGET else 1.0), (name, sparsity)
        masks.set(new)


def test_where_every_layer_has_its_own_the_total_is_exact_on_the_way_too():
    model = small()
    choose(model, layers={"Conv2d": 0.95, "Linear": 0.5}, target=0.0)
    found = layers(model).values()
    kept = sum(round((0.05 if isinstance(one, nn.Conv2d) else 0.5) * one.weight.numel()) for one in found)
    with pytest.raises(SparseLabError, match=r"with every layer named, target=0\.9") as caught:
        check_own(model, 0.9)
    target = float(str(caught.value).rpartition("=")[2])
    assert num_kept(target, count(model)) == kept
    choose(model, layers={"Conv2d": 0.95, "Linear": 0.5}, target=target)
    check_own(model, target)
    masks, scores = Masks(model), find_score("random")(View(model))
    for sparsity in (0.2, 0.5, target, 0.97):
        wanted = num_kept(sparsity, masks.total())
        new = prune_to(masks, wanted, scores, "erk")
        assert sum(int(mask.sum()) for mask in new.values()) == wanted
        if sparsity == target:
            assert all(int(new[name].sum()) == num_kept(0.95, new[name].numel()) for name in new if "features" in name)


@pytest.mark.parametrize(("own", "target", "word"), [(0.5, 0.9, "at most"), (0.9999, 0.2, "at least")])
def test_a_target_that_they_leave_no_room_for_is_refused_with_one_that_fits(own, target, word):
    model = small()
    choose(model, layers={"features.[1-4]*": own}, target=target)
    with pytest.raises(SparseLabError, match=f"{word} target=") as caught:
        check_own(model, target)
    fits = float(str(caught.value).rpartition("=")[2])
    choose(model, layers={"features.[1-4]*": own}, target=fits)
    check_own(model, fits)
    masks = pruned(model, fits)
    assert masks.kept() == num_kept(fits, masks.total())


# --- a layer that is left out is dense ---

OUT = ["conv1", "layer2.0.conv1", "fc"]


def twins(out: list[str] = OUT, name: str = "resnet34") -> tuple[nn.Module, nn.Module]:
    """One network twice, its layers `out` left out of the first, and counted with a full mask in the second."""
    first, second = small(name), small(name)
    choose(first, exclude=out)
    masks = pruned(first, 0.97)
    choose(second)
    full = Masks(second)
    full.set({key: masks.masks().get(key, mask) for key, mask in full.masks().items()})
    return first, second


def test_paths_cross_it_anywhere():
    first, second = twins()
    mine, theirs = connectivity(first, 32), connectivity(second, 32)
    assert mine.effective_by_layer == {name: theirs.effective_by_layer[name] for name in layers(first)}
    assert (mine.live_logits, mine.connected) == (theirs.live_logits, theirs.connected)
    assert mine.kept == Masks(first).kept()


def test_synflow_and_gradients_see_it_as_it_is():
    first, second = twins()
    batch = [(torch.randn(4, 3, 32, 32), torch.arange(4))]
    for score in ("synflow", "snip", "taylor"):
        mine, theirs = (find_score(score)(View(model, batch)) for model in (first, second))
        assert mine.keys() == layers(first).keys()
        for name, value in mine.items():
            torch.testing.assert_close(value, theirs[name], msg=f"{score} {name}")


def test_it_multiplies_whole():
    first, second = twins()
    mine, theirs = layer_costs(first, 32), layer_costs(second, 32)
    assert [(one.name, one.macs, one.sparse_macs) for one in mine] == [
        (one.name, one.macs, one.sparse_macs) for one in theirs
    ]
    assert [one.name for one in mine if not one.counted] == OUT


@pytest.mark.parametrize("out", [["features.0"], ["classifier.0"], ["features.10", "features.14"]])
def test_first_paths_go_through_it(out):
    model = small()
    choose(model, exclude=out)
    masks = Masks(model)
    counts = distribute("erk", num_kept(0.995, masks.total()), masks.weights(), masks.weights(), masks.masks())
    laid = connected_init(model, 32, torch.Generator().manual_seed(3), counts)
    assert laid.keys() == masks.layers.keys()
    crossed, _ = on_paths(model, 32, laid)
    for name, mask in laid.items():
        assert mask.any() and int(mask.sum()) <= counts[name] and torch.equal(crossed[name], mask), name


def test_blocks_share_it_only_with_what_is_left_out_too():
    plain = small("resnet34")
    weight_sharing.share(plain)
    one_of_them, lender, all_of_them = (small("resnet34") for _ in range(3))
    choose(one_of_them, exclude=["layer1.2.conv1"])
    choose(lender, exclude=["layer1.1.conv1"])
    choose(all_of_them, exclude=["layer1.?.conv1"])
    number = one_of_them.get_submodule("layer1.2.conv1").weight.numel()
    for model in (one_of_them, lender, all_of_them):
        weight_sharing.share(model)
    assert isinstance(one_of_them.get_submodule("layer1.2.conv1"), nn.Conv2d)
    assert isinstance(lender.get_submodule("layer1.2.conv1"), nn.Conv2d)
    assert isinstance(all_of_them.get_submodule("layer1.2.conv1"), weight_sharing.SharedConv2d)
    assert count(one_of_them) == count(lender) == count(plain) - number
    assert count(all_of_them) == count(plain) - 3 * number
    plain_again = weight_sharing.unshared(all_of_them)
    out = [f"layer1.{block}.conv1" for block in range(3)]
    assert list(layers(plain_again)) == [name for name in layers(small("resnet34")) if name not in out]


def test_a_dct_stands_beside_counted_weights_alone():
    model = small()
    choose(model, exclude=["classifier.0"])
    before = model.classifier[0].weight.detach().clone()
    offsets.install_dct(model)
    assert type(model.classifier[0]) is nn.Linear and torch.equal(model.classifier[0].weight, before)
    assert all(hasattr(layer, "offset") for layer in layers(model).values())


@pytest.mark.parametrize(("name", "out"), [("vgg16", ["features.3", "classifier.0"]), ("resnet34", ["layer2.1.conv1"])])
def test_its_filters_stay_and_so_do_those_that_it_reads(name, out):
    model = small(name)
    every = channels.groups(model, 32, coupled=True)
    choose(model, exclude=out)
    found = channels.groups(model, 32, coupled=True)
    touched = [one for one in every if set(out) & {*one.producers, *(reader for reader, _ in one.columns)}]
    assert found == [one for one in every if one not in touched] and touched
    masks = Masks(model)
    scores = {one.name: torch.rand(one.channels) for one in found}
    shapes = {key: weight.shape for key, weight in masks.weights().items()}
    alive = channels.choose_channels(found, scores, num_kept(0.3, masks.total()), "uniform", shapes)
    masks.set(channels.masks_of(found, alive, shapes))
    images = torch.randn(2, 3, 32, 32)
    smaller = thin(model, 32)
    torch.testing.assert_close(smaller.eval()(images), model.eval()(images), rtol=1e-4, atol=1e-5)
    assert all(smaller.get_submodule(one).weight.shape == model.get_submodule(one).weight.shape for one in out)
    assert sum(one.numel() for one in smaller.parameters()) < sum(one.numel() for one in model.parameters())


def test_the_last_layer_is_the_networks_whatever_is_left_out():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))
    choose(model, exclude=["3"])
    assert list(filtered(model)) == ["1"]


def test_its_gradient_has_a_line_of_its_own():
    first, _ = twins()
    nn.functional.cross_entropy(first(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    norms = part_norms(first, Masks(first), {})
    wanted = torch.stack([first.get_submodule(name).weight.grad.square().sum() for name in OUT]).sum().sqrt()
    torch.testing.assert_close(norms["excluded weights"], wanted)
