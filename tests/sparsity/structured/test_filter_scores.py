"""Scores of filters against numpy, on captured feature maps and on maps of known rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparse_lab.errors import SparseLabError
from sparse_lab.models import build, weight_sharing
from sparse_lab.sparsity.masks import Masks, layers
from sparse_lab.sparsity.scores import View
from sparse_lab.sparsity.structured import filter_scores
from sparse_lab.sparsity.structured.filter_scores import FILTER_SCORES, filtered, find_filter_score, ranks


class Net(nn.Module):
    """A plain and a depthwise convolution, a hidden linear layer and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.act = nn.ReLU()
        self.deep = nn.Conv2d(6, 6, 3, groups=6, bias=False)
        self.act2 = nn.ReLU6()
        self.drop = nn.Dropout(0.5)
        self.hidden = nn.Linear(6 * 4 * 3, 7)
        self.act3 = nn.ReLU()
        self.fc = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act2(self.deep(self.act(self.bn(self.conv(x)))))
        return self.fc(self.act3(self.hidden(self.drop(x).flatten(1))))


def _net() -> Net:
    torch.manual_seed(0)
    net = Net().double()
    net(torch.randn(16, 3, 6, 5, dtype=torch.float64))
    return net


def _batches(side: tuple[int, int] = (6, 5), sizes: tuple[int, ...] = (4, 3)) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(n, 3, *side, dtype=torch.float64), torch.zeros(n, dtype=torch.long)) for n in sizes]


def _narrow(name: str) -> nn.Module:
    """A narrow network in float64 (no singular value near the threshold), its BatchNorms moved."""
    torch.manual_seed(2)
    model = build(name, width=0.0625).double()
    model(torch.randn(8, 3, 32, 32, dtype=torch.float64) * 2 + 1)
    return model


@contextmanager
def _captured(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Outputs of every module, one of every call."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_hook(lambda _, inputs, output, name=name: seen.setdefault(name, []).append(output))
        for name, module in model.named_modules()
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def _numpy(maps: list[Tensor]) -> list[float]:
    """Mean rank of each channel, one matrix at a time."""
    images = torch.cat(maps).numpy()
    assert images.ndim == 4
    return [float(np.mean([np.linalg.matrix_rank(image[c]) for image in images])) for c in range(images.shape[1])]


def _check_ranks(model: nn.Module, where: dict[str, str], batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The scores must be the mean ranks of the outputs of the modules that `where` names."""
    scores = find_filter_score("rank")(View(model, batches))
    assert set(scores) == set(where)
    model.eval()
    with torch.no_grad(), _captured(model) as seen:
        for images, _ in batches:
            model(images)
    for name, source in where.items():
        assert scores[name].dtype == torch.float64
        np.testing.assert_allclose(scores[name].numpy(), _numpy(seen[source]), rtol=1e-12, err_msg=name)
    return scores


def test_known_names() -> None:
    assert set(FILTER_SCORES) == {"l1", "l2", "random_filters", "rank"}
    with pytest.raises(SparseLabError, match=r"unknown filter score 'rnak'.*rank"):
        find_filter_score("rnak")


def test_the_classifier_has_no_filters_but_all_else_has() -> None:
    assert list(filtered(_net())) == ["conv", "deep", "hidden"]
    for name, left_out in (("vgg16", "classifier.0"), ("resnet50", "fc"), ("mobilenet_v2", "classifier.1")):
        model = build(name, width=0.0625)
        assert list(filtered(model)) == [layer for layer in layers(model) if layer != left_out]
    assert list(filtered(nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten()))) == ["0"]


@pytest.mark.parametrize(("name", "order"), [("l1", 1), ("l2", 2)])
def test_norms_of_weights(name: str, order: int) -> None:
    net = _net().float()
    Masks(net).set({key: torch.rand_like(layer.weight) < 0.4 for key, layer in layers(net).items()})
    scores = find_filter_score(name)(View(net))
    assert list(scores) == ["conv", "deep", "hidden"]
    for key, values in scores.items():
        assert values.dtype == torch.float64
        assert not values.requires_grad
        weight = net.get_parameter(f"{key}.weight").detach().numpy().astype(np.float64)
        by_hand = [np.sum(np.abs(row.ravel()) ** order) ** (1 / order) for row in weight]
        np.testing.assert_allclose(values.numpy(), by_hand, rtol=1e-12)


def test_random_comes_from_the_views_generator() -> None:
    net = _net()
    draw = find_filter_score("random_filters")
    first, again = draw(View(net)), draw(View(net))
    other = draw(View(net, generator=torch.Generator().manual_seed(1)))
    assert {name: tuple(values.shape) for name, values in first.items()} == {"conv": (6,), "deep": (6,), "hidden": (7,)}
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    everything = torch.cat(list(first.values()))
    assert 0.0 <= everything.min().item() < 0.3 < 0.7 < everything.max().item() < 1.0


def _of_rank(rank: int, height: int, width: int) -> Tensor:
    """Zeros and ones with `rank` linearly independent rows; no negative number, so ReLU leaves it alone."""
    result = torch.zeros(height, width)
    for row in range(height):
        result[row, row % rank :: rank] = 1.0
    return result if rank else torch.zeros(height, width)


def test_maps_of_known_rank() -> None:
    """Each filter picks, negates or adds channels, so that the ranks of its maps can be told by hand."""
    conv = nn.Conv2d(3, 6, 1, bias=True)
    rows = [[1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, 0], [0, 0, -1]]
    conv.weight.data = torch.tensor(rows, dtype=torch.float32)[:, :, None, None]
    conv.bias.data = torch.tensor([0.0, 0, 0, 0, 2, 1])
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 6 * 8, 2))
    first = torch.stack([_of_rank(1, 6, 8), _of_rank(3, 6, 8), torch.eye(6, 8)])
    second = torch.stack([_of_rank(2, 6, 8), _of_rank(4, 6, 8), torch.ones(6, 8)])
    batches = [(torch.stack([first, second]), torch.zeros(2)), (second[None], torch.zeros(1))]
    # 1 - eye(6, 8): two whole columns of ones beside ones minus the unit matrix, of rank 6; 1 - ones: nothing
    expected = [(1 + 2 + 2) / 3, (3 + 4 + 4) / 3, 0.0, (6 + 1 + 1) / 3, 1.0, 6 / 3]
    scores = find_filter_score("rank")(View(model, batches))
    assert list(scores) == ["0"]
    assert scores["0"].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("at_once", [1, 100, 2**22])
def test_ranks_of_any_shape_and_type(kind: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filter_scores, "AT_ONCE", at_once)
    image = torch.stack([_of_rank(number, 5, 7) for number in (1, 2, 5)])
    assert ranks(torch.stack([image, 3 * image, 0 * image]).to(kind)).tolist() == [2, 4, 10]
    assert ranks(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, -1.0]]).to(kind)).tolist() == [2, 1]
    assert ranks(torch.ones(4, 2, 6).to(kind)).tolist() == [4, 4]
    volume = _of_rank(2, 4, 6).reshape(1, 1, 4, 2, 3).to(kind)
    assert ranks(volume).tolist() == [2]


def test_rank_of_a_small_network() -> None:
    net = _net()
    batches = _batches()
    scores = find_filter_score("rank")(View(net, batches))
    net.eval()
    with torch.no_grad(), _captured(net) as seen:
        for images, _ in batches:
            net(images)
    assert list(scores) == ["conv", "deep", "hidden"]
    assert scores["conv"].tolist() == pytest.approx(_numpy(seen["act"]))
    assert scores["deep"].tolist() == pytest.approx(_numpy(seen["act2"]))
    active = torch.cat(seen["act3"]).numpy() != 0
    assert scores["hidden"].tolist() == pytest.approx(active.mean(0).tolist())
    assert 0 < active.mean() < 1


def test_rank_of_vgg16() -> None:
    model = _narrow("vgg16")
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    where = {name: f"features.{int(name.split('.')[1]) + 2}" for name in convs}
    assert len(where) == 13
    scores = _check_ranks(model, where, _batches((32, 32), (3, 2)))
    assert 1 < scores["features.0"].max().item() <= 32
    assert scores["features.40"].max().item() <= 2


def test_rank_of_vgg16_in_float32() -> None:
    """The type that runs use: a singular value may fall to either side of the threshold, once in a while."""
    model = _narrow("vgg16").float()
    images = _batches((32, 32), (4,))[0][0].float()
    scores = find_filter_score("rank")(View(model, [(images, torch.zeros(4))]))
    with torch.no_grad(), _captured(model.eval()) as seen:
        model(images)
    for index in (0, 14, 40):
        np.testing.assert_allclose(
            scores[f"features.{index}"].numpy(), _numpy(seen[f"features.{index + 2}"]), rtol=0, atol=0.26
        )


@pytest.mark.parametrize(("name", "inner"), [("resnet34", 1), ("resnet50", 2)])
def test_rank_of_residual_blocks(name: str, inner: int) -> None:
    """The last convolution of a block and its shortcut are seen where the block ends."""
    model = _narrow(name)
    where = {"conv1": "relu"}
    for layer in filtered(model):
        block, _, part = layer.partition(".conv")
        if part:
            where[layer] = f"{block}.relu{part}"
        elif "downsample" in layer:
            where[layer] = f"{layer.removesuffix('.downsample.0')}.relu{inner + 1}"
    _check_ranks(model, where, _batches((16, 16), (2,)))


def test_rank_of_linear_projections() -> None:
    """MobileNetV2: projections end without an activation, so their BatchNorm's output counts, before any addition."""
    model = _narrow("mobilenet_v2")
    where = {}
    for layer in filtered(model):
        stem, _, last = layer.rpartition(".")
        activated = isinstance(model.get_submodule(stem), nn.Sequential) and last == "0"
        where[layer] = f"{stem}.2" if activated else f"{stem}.{int(last) + 1}"
    kinds = [type(model.get_submodule(source)) for source in where.values()]
    assert (kinds.count(nn.ReLU6), kinds.count(nn.BatchNorm2d)) == (35, 17)
    _check_ranks(model, where, _batches((16, 16), (2,)))


def test_linear_maps_of_known_rank() -> None:
    """No activation follows the second layer: its BatchNorm's output counts, in every batch."""
    first, second = nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 2, 1, bias=False)
    first.weight.data.fill_(1.0)
    second.weight.data = torch.tensor([[1.0, 0.0], [0.0, 0.0]])[:, :, None, None]
    model = nn.Sequential(first, nn.ReLU(), second, nn.BatchNorm2d(2))
    model[3].bias.data[1] = 1.0  # a map of zeros becomes one of ones
    batches = [(_of_rank(number, 6, 8)[None, None], torch.zeros(1)) for number in (1, 2, 6)]
    scores = find_filter_score("rank")(View(model, batches))
    assert scores["0"].tolist() == [3.0, 3.0]
    assert scores["2"].tolist() == [3.0, 1.0]


def test_rank_without_batch_norm_or_activation_is_that_of_the_output() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 1), nn.Flatten()).double()
    _check_ranks(model, {"0": "0", "1": "2", "3": "3"}, _batches())


def test_rank_of_shared_weights_is_the_mean_over_uses() -> None:
    torch.manual_seed(3)
    model = build("resnet34", width=0.0625).double()
    weight_sharing.share(model)
    batches = _batches((16, 16), (2,))
    scores = find_filter_score("rank")(View(model, batches))
    model.eval()
    with torch.no_grad(), _captured(model) as seen:
        model(batches[0][0])
    for number in (1, 2):
        by_use = [_numpy(seen[f"layer3.{block}.relu{number}"]) for block in range(1, 6)]
        np.testing.assert_allclose(scores[f"layer3.1.conv{number}"].numpy(), np.mean(by_use, axis=0), rtol=1e-12)


def test_rank_leaves_the_network_as_it_was() -> None:
    net = _net()
    net.train()
    net.bn.eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    find_filter_score("rank")(View(net, _batches()))
    assert {name for name, module in net.named_modules() if not module.training} == {"bn"}
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())


def test_rank_cleans_up_after_an_error() -> None:
    net = _net()
    net.drop.eval()
    with pytest.raises(RuntimeError):
        find_filter_score("rank")(View(net, [(torch.zeros(1, 3, 9, 9), torch.zeros(1))]))
    assert not any(module._forward_hooks for module in net.modules())
    assert {name for name, module in net.named_modules() if not module.training} == {"drop"}


def test_batches_may_be_made_when_they_are_needed() -> None:
    net, batches, made = _net(), _batches(), []

    def make() -> list[tuple[Tensor, Tensor]]:
        made.append(1)
        return batches

    find_filter_score("l1")(View(net, make))
    assert made == []
    lazy = find_filter_score("rank")(View(net, make))
    ready = find_filter_score("rank")(View(net, batches))
    assert made == [1]
    assert all(torch.equal(lazy[name], ready[name]) for name in ready)
    for none in ((), lambda: []):
        with pytest.raises(ValueError, match="needs batches"):
            find_filter_score("rank")(View(net, none))
