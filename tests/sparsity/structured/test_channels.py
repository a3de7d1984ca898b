"""Groups of channels against lists written by hand, counts against closed forms, choices against a slow reference."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_lab.errors import SparseLabError
from sparse_lab.models import build
from sparse_lab.sparsity.flops import layer_costs
from sparse_lab.sparsity.masks import layers, num_kept
from sparse_lab.sparsity.structured.channels import (
    Group,
    alive_of,
    by_rates,
    choose_channels,
    groups,
    kept_weights,
    masks_of,
)

CONVS = [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40]
WIDTHS = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
BLOCKS = {1: 3, 2: 4, 3: 6, 4: 3}
HRANK = [0.95] + [0.5] * 6 + [0.9] * 4 + [0.8] * 2


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: module.weight.shape for name, module in layers(model).items()}


def _meta(name: str, **asked: float) -> nn.Module:
    with torch.device("meta"):
        return build(name, **asked)


def _vgg16(widths: list[int], last: list[Group], flat: int = 1) -> list[Group]:
    readers = [*((f"features.{index}", 1) for index in CONVS[1:]), ("classifier.0", flat)]
    chain = [
        Group(f"features.{index}", width, (f"features.{index}",), (reader,))
        for index, width, reader in zip(CONVS, widths, readers, strict=True)
    ]
    return chain + last


def test_vgg16_is_a_chain_of_13() -> None:
    assert groups(_meta("vgg16"), 32, coupled=False) == _vgg16(WIDTHS, [])
    assert groups(_meta("vgg16"), 32, coupled=True) == _vgg16(WIDTHS, [])


def test_the_imagenet_vgg16_flattens_7_times_7_positions_and_has_two_hidden_layers() -> None:
    hidden = [
        Group("classifier.0", 512, ("classifier.0",), (("classifier.3", 1),)),
        Group("classifier.3", 512, ("classifier.3",), (("classifier.6", 1),)),
    ]
    found = groups(_meta("vgg16", width=0.125, image_size=64), 64, coupled=False)
    assert found == _vgg16([width // 8 for width in WIDTHS], hidden, flat=49)


def _trunk(stage: int, last_conv: str, reads_next: tuple[str, ...], projected: bool, channels: int) -> Group:
    """The channels that the blocks of a stage add to."""
    blocks = [f"layer{stage}.{block}" for block in range(BLOCKS[stage])]
    made = [f"{block}.{last_conv}" for block in blocks]
    made[1:1] = [f"layer{stage}.0.downsample.0"] if projected else []
    readers = [f"{block}.conv1" for block in blocks[1:]]
    return Group(made[0], channels, tuple(made), tuple((reader, 1) for reader in [*readers, *reads_next]))


def test_resnet34_has_16_groups_within_blocks_and_4_trunks() -> None:
    width = {1: 64, 2: 128, 3: 256, 4: 512}
    wanted = []
    for stage, blocks in BLOCKS.items():
        following = (f"layer{stage + 1}.0.conv1", f"layer{stage + 1}.0.downsample.0") if stage < 4 else ("fc",)
        trunk = _trunk(stage, "conv2", following, projected=stage > 1, channels=width[stage])
        if stage == 1:  # the shortcut of the first block is the stem itself
            trunk = Group("conv1", 64, ("conv1", *trunk.producers), (("layer1.0.conv1", 1), *trunk.columns))
        inner = [
            Group(f"{block}.conv1", width[stage], (f"{block}.conv1",), ((f"{block}.conv2", 1),))
            for block in (f"layer{stage}.{index}" for index in range(blocks))
        ]
        wanted += [trunk, *inner] if stage == 1 else [inner[0], trunk, *inner[1:]]
    assert groups(_meta("resnet34"), 32, coupled=True) == wanted
    within = [group for group in wanted if len(group.producers) == 1]
    assert len(within) == 16
    assert groups(_meta("resnet34"), 32, coupled=False) == within


def test_resnet50_has_its_stem_and_32_groups_within_blocks_and_4_trunks() -> None:
    wanted = [Group("conv1", 64, ("conv1",), (("layer1.0.conv1", 1), ("layer1.0.downsample.0", 1)))]
    for stage, blocks in BLOCKS.items():
        width = 32 * 2**stage
        following = (f"layer{stage + 1}.0.conv1", f"layer{stage + 1}.0.downsample.0") if stage < 4 else ("fc",)
        trunk = _trunk(stage, "conv3", following, projected=True, channels=4 * width)
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            for made, read in (("conv1", "conv2"), ("conv2", "conv3")):
                wanted.append(Group(f"{name}.{made}", width, (f"{name}.{made}",), ((f"{name}.{read}", 1),)))
            wanted += [trunk] if block == 0 else []
    assert len(wanted) == 1 + 32 + 4
    assert groups(_meta("resnet50"), 32, coupled=True) == wanted
    assert groups(_meta("resnet50"), 32, coupled=False) == [group for group in wanted if len(group.producers) == 1]


def test_depthwise_convolutions_have_as_many_filters_as_channels() -> None:
    coupled = groups(_meta("mobilenet_v2"), 32, coupled=True)
    inner = [group for group in coupled if len(group.producers) == 2 and group.producers[1].endswith("conv.1.0")]
    wanted = [
        Group(f"{block}.conv.0.0", channels, (f"{block}.conv.0.0", f"{block}.conv.1.0"), ((f"{block}.conv.2", 1),))
        for block, channels in zip(
            [f"features.{index}" for index in range(2, 18)],
            [96, 144, 144, *[192] * 3, *[384] * 4, *[576] * 3, *[960] * 3],
            strict=True,
        )
    ]
    assert inner == wanted
    stem = Group("features.0.0", 32, ("features.0.0", "features.1.conv.0.0"), (("features.1.conv.1", 1),))
    assert coupled[0] == stem
    pair = Group("features.2.conv.2", 24, ("features.2.conv.2", "features.3.conv.2"), ())
    trunk = next(group for group in coupled if group.name == pair.name)
    assert trunk.producers == pair.producers
    assert trunk.columns == (("features.3.conv.0.0", 1), ("features.4.conv.0.0", 1))
    alone = [group.name for group in groups(_meta("mobilenet_v2"), 32, coupled=False)]
    outside = [stem.name, "features.1.conv.1", *(group.name for group in wanted)]
    assert alone == [*outside, "features.17.conv.2", "features.18.0"]


def test_groups_leave_the_model_as_it_is() -> None:
    model = build("resnet34", width=0.1)
    model.layer1.eval()
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    for parameter in model.layer2.parameters():
        parameter.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    found = groups(model, 32, coupled=True)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == ["fc.weight"]
    assert all(parameter.requires_grad != name.startswith("layer2.") for name, parameter in model.named_parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.inference_mode():
        assert groups(model.requires_grad_(False).double(), 32, coupled=True) == found
    with torch.device("meta"):
        assert groups(build("resnet34", width=0.1), 32, coupled=True) == found


def test_a_network_without_filters_that_could_go_is_refused() -> None:
    for model in (nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten())):
        with pytest.raises(ValueError, match="it has no convolution whose filters could go"):
            groups(model, 2, coupled=True)


class _Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.left(x), self.right(x)], 1))


def test_channels_that_change_places_are_refused() -> None:
    with pytest.raises(ValueError, match="'last' reads or makes are not in the order"):
        groups(_Concatenated(), 4, coupled=True)


def _tiny(first: int = 4, second: int = 5, hidden: int = 6) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, first, 3, padding=1),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, stride=2, padding=1),
        nn.BatchNorm2d(second),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * second, hidden),  # of images of 4x4
        nn.ReLU(),
        nn.Linear(hidden, 2),
    )


def test_masks_name_the_rows_and_columns_of_a_channel() -> None:
    model = _tiny()
    found, shapes = groups(model, 4, coupled=False), _shapes(model)
    reads = {group.name: group.columns for group in found}
    assert reads == {"0": (("3", 1),), "3": (("7", 4),), "7": (("9", 1),)}
    alive = {"0": torch.ones(4).bool(), "3": torch.tensor([1, 1, 0, 1, 1]).bool(), "7": torch.ones(6).bool()}
    alive["0"][[1, 3]] = False
    masks = masks_of(found, alive, shapes)
    assert torch.nonzero(~masks["0"].all((1, 2, 3))).flatten().tolist() == [1, 3]
    assert masks["3"].sum().item() == 4 * 2 * 9
    assert not masks["3"][2].any() and not masks["3"][:, 1].any() and not masks["3"][:, 3].any()
    assert torch.equal(masks["7"].int(), torch.tensor([1] * 8 + [0] * 4 + [1] * 8).expand(6, 20).int())
    assert masks["9"].all()
    rows = masks_of(found, alive, shapes, columns=False)
    assert {name: int(mask.sum()) for name, mask in rows.items()} == {"0": 2 * 27, "3": 4 * 36, "7": 120, "9": 12}
    for made in (masks, rows):
        assert all(torch.equal(back, alive[name]) for name, back in alive_of(found, made).items())


def test_a_channel_with_one_weight_left_is_alive() -> None:
    model = _tiny()
    found = groups(model, 4, coupled=False)
    masks = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in _shapes(model).items()}
    masks["3"][4, 1, 2, 0] = True
    alive = alive_of(found, masks)
    found_alive = {name: torch.nonzero(left).flatten().tolist() for name, left in alive.items()}
    assert found_alive == {"0": [], "3": [4], "7": []}


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ["vgg16", "resnet34", "resnet50", "mobilenet_v2"])
def test_kept_weights_are_what_the_masks_keep(name: str) -> None:
    model = _meta(name, width=0.25)
    shapes = _shapes(model)
    for coupled in (False, True):
        found = groups(model, 32, coupled)
        generator = torch.Generator().manual_seed(0)
        alive = {group.name: torch.rand(group.channels, generator=generator) < 0.4 for group in found}
        for group in found:
            alive[group.name][0] = True
        masks = masks_of(found, alive, shapes)
        left = {group: int(stays.sum()) for group, stays in alive.items()}
        assert kept_weights(found, left, shapes) == sum(int(mask.sum()) for mask in masks.values())
        assert all(torch.equal(back, alive[group]) for group, back in alive_of(found, masks).items())
        whole = {group.name: group.channels for group in found}
        assert kept_weights(found, whole, shapes) == sum(shape.numel() for shape in shapes.values())


def _slow_removals(scores: dict[str, list[float]], distribution: str) -> list[tuple[str, int]]:
    """(group, channel) in the order in which they go: the last of the worst, found by looking at all of them."""
    names = list(scores)
    left = {name: list(range(len(values))) for name, values in scores.items()}
    gone = []
    while any(len(channels) > 1 for channels in left.values()):
        offers = []
        for place, name in enumerate(names):
            if len(left[name]) == 1:
                continue
            worst = min(left[name], key=lambda channel, name=name: (scores[name][channel], -channel))
            share = (len(scores[name]) - len(left[name]) + 1) / len(scores[name])
            offers.append((scores[name][worst] if distribution == "global" else share, -place, worst))
        _, place, channel = min(offers)
        name = names[-place]
        left[name].remove(channel)
        gone.append((name, channel))
    return gone


def _weights(widths: list[int]) -> int:
    first, second, hidden = widths
    return 27 * first + 9 * first * second + 4 * second * hidden + 2 * hidden


@given(
    st.lists(st.integers(1, 7), min_size=3, max_size=3),
    st.sampled_from(["global", "uniform"]),
    st.integers(0, 1000),
    st.booleans(),
    st.floats(0.0, 1.0),
)
def test_channels_go_one_by_one_until_few_enough_weights_are_left(
    widths: list[int], distribution: str, seed: int, ties: bool, density: float
) -> None:
    found = [
        Group("a", widths[0], ("a",), (("b", 1),)),
        Group("b", widths[1], ("b",), (("c", 4),)),
        Group("c", widths[2], ("c",), (("d", 1),)),
    ]
    first, second, hidden = widths
    shapes = {
        "a": torch.Size([first, 3, 3, 3]),
        "b": torch.Size([second, first, 3, 3]),
        "c": torch.Size([hidden, 4 * second]),
        "d": torch.Size([2, hidden]),
    }
    generator = torch.Generator().manual_seed(seed)
    scores = {group.name: torch.rand(group.channels, generator=generator) for group in found}
    if ties:
        scores = {name: (score * 3).round() for name, score in scores.items()}
    kept = max(_weights([1, 1, 1]), int(density * _weights(widths)))
    chosen = choose_channels(found, scores, kept, distribution, shapes)

    left = dict(zip("abc", widths, strict=True))
    wanted = {name: set(range(channels)) for name, channels in left.items()}
    removals = iter(_slow_removals({name: score.tolist() for name, score in scores.items()}, distribution))
    last = None
    while _weights(list(left.values())) > kept:
        last, channel = next(removals)
        left[last] -= 1
        wanted[last].remove(channel)
    assert {name: set(torch.nonzero(stays).flatten().tolist()) for name, stays in chosen.items()} == wanted
    exact = sum(int(mask.sum()) for mask in masks_of(found, chosen, shapes).values())
    assert exact == _weights(list(left.values())) <= kept
    if last is not None:
        assert _weights([number + (name == last) for name, number in left.items()]) > kept


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2"])
@pytest.mark.parametrize("distribution", ["global", "uniform"])
@pytest.mark.parametrize("coupled", [False, True])
def test_as_many_channels_stay_as_fit(name: str, distribution: str, coupled: bool) -> None:
    model = _meta(name, width=0.5)
    found, shapes = groups(model, 32, coupled), _shapes(model)
    generator = torch.Generator().manual_seed(1)
    scores = {group.name: torch.rand(group.channels, generator=generator) for group in found}
    total = sum(shape.numel() for shape in shapes.values())
    for sparsity in (0.0, 0.3, 0.7):
        kept = num_kept(sparsity, total)
        chosen = choose_channels(found, scores, kept, distribution, shapes)
        left = {group: int(stays.sum()) for group, stays in chosen.items()}
        assert min(left.values()) >= 1
        assert kept_weights(found, left, shapes) <= kept
        if sparsity == 0.0:
            assert all(stays.all() for stays in chosen.values())
            continue
        if distribution == "global":
            worst_kept = min(float(scores[group][stays].min()) for group, stays in chosen.items() if stays.sum() > 1)
            best_gone = max(float(scores[group][~stays].max()) for group, stays in chosen.items() if not stays.all())
            assert best_gone < worst_kept
            last = next(g for g, stays in chosen.items() if not stays.all() and scores[g][~stays].max() == best_gone)
        else:
            shares = {group.name: 1 - left[group.name] / group.channels for group in found}
            assert max(shares.values()) - min(shares.values()) <= 1 / min(group.channels for group in found)
            most = max(shares.values())
            last = next(group for group, share in shares.items() if share == most)
        assert kept_weights(found, left | {last: left[last] + 1}, shapes) > kept


def test_too_high_a_sparsity_names_the_highest_that_holds() -> None:
    model = _meta("resnet34")
    found, shapes = groups(model, 32, coupled=False), _shapes(model)
    scores = {group.name: torch.arange(float(group.channels)) for group in found}
    total = sum(shape.numel() for shape in shapes.values())
    with pytest.raises(SparseLabError) as caught:
        choose_channels(found, scores, total // 1000, "global", shapes)
    assert "\n" not in str(caught.value)
    highest = float(re.findall(r"0\.\d+", str(caught.value))[0])
    chosen = choose_channels(found, scores, num_kept(highest, total), "global", shapes)
    assert all(torch.nonzero(stays).flatten().tolist() == [len(stays) - 1] for stays in chosen.values())
    with pytest.raises(SparseLabError):
        choose_channels(found, scores, num_kept(highest + 1e-6, total), "uniform", shapes)


def test_nan_scores_are_refused() -> None:
    found = [Group("a", 2, ("a",), (("b", 1),))]
    with pytest.raises(ValueError, match="NaN"):
        choose_channels(
            found,
            {"a": torch.tensor([1.0, torch.nan])},
            2,
            "global",
            {"a": torch.Size([2, 1]), "b": torch.Size([1, 2])},
        )


def test_rates_take_the_worst_of_each_group() -> None:
    found = [Group(name, 10, (name,), ((name + "'", 1),)) for name in "abc"]
    scores = {"a": torch.arange(10.0), "b": torch.tensor([1.0] * 5 + [0.0] * 5), "c": torch.rand(10)}
    alive = by_rates(found, scores, [0.39, 0.7])
    assert torch.nonzero(alive["a"]).flatten().tolist() == list(range(4, 10))
    assert torch.nonzero(alive["b"]).flatten().tolist() == [0, 1, 2]
    assert alive["c"].all()
    assert torch.nonzero(by_rates(found, scores, [1.0])["a"]).flatten().tolist() == [9]
    with pytest.raises(SparseLabError, match="4 rates for 3 groups"):
        by_rates(found, scores, [0.1] * 4)
    with pytest.raises(SparseLabError, match="from 0 to 1"):
        by_rates(found, scores, [0.1, 90.0])


def test_hranks_rates_on_vgg16() -> None:
    """HRank's table quotes -82.1% of the parameters and -65.3% of the multiply-adds: filters alone, without the inputs
    that go with them in the next layer. With those it is -95.3% and -86.9%.
    """
    model = _meta("vgg16")
    found, shapes = groups(model, 32, coupled=False), _shapes(model)
    generator = torch.Generator().manual_seed(0)
    alive = by_rates(found, {group.name: torch.rand(group.channels, generator=generator) for group in found}, HRANK)
    left = [3, 32, 64, 64, 128, 128, 128, 51, 51, 51, 51, 102, 102]
    assert [int(stays.sum()) for stays in alive.values()] == left
    sides = [32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]
    costs = layer_costs(model, 32)
    for inputs, last, columns, fewer_weights, fewer_macs in (
        ([3, *WIDTHS[:-1]], 5120, False, 0.8210, 0.6534),
        ([3, *left[:-1]], 1020, True, 0.9527, 0.8689),
    ):
        sizes = [9 * made * read for made, read in zip(left, inputs, strict=True)]
        masks = masks_of(found, alive, shapes, columns=columns)
        kept = [int(mask.sum()) for mask in masks.values()]
        assert kept == [*sizes, last]
        assert 1 - sum(kept) / 14_715_584 == pytest.approx(fewer_weights, abs=5e-5)
        macs = sum(size * side**2 for size, side in zip(sizes, sides, strict=True)) + last
        assert sum(one * cost.macs // cost.total for one, cost in zip(kept, costs, strict=True)) == macs
        assert 1 - macs / 313_201_664 == pytest.approx(fewer_macs, abs=5e-5)
    assert 1 - kept_weights(found, dict(zip(alive, left, strict=True)), shapes) / 14_715_584 > 0.95
