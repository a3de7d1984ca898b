"""Scores against slow formulas, closed forms and float64 autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from sparse_lab.errors import SparseLabError
from sparse_lab.sparsity.scores import SCORES, Probe, View, find_score, lamp_of

Batches = list[tuple[Tensor, Tensor]]


class Net(nn.Module):
    """Conv, BatchNorm and dropout, so that training mode would show."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(torch.relu(self.bn(self.conv(x)))).flatten(1))


def _net() -> Net:
    torch.manual_seed(0)
    net = Net().double()
    net(torch.randn(16, 3, 4, 4, dtype=torch.float64))  # moves the running statistics away from 0 and 1
    return net


def _batches(sizes: tuple[int, ...] = (4, 4, 4)) -> Batches:
    torch.manual_seed(1)
    return [(torch.randn(n, 3, 4, 4, dtype=torch.float64), torch.randint(0, 5, (n,))) for n in sizes]


def _gradients(net: Net, batches: Batches) -> dict[str, list[Tensor]]:
    """One gradient a batch and layer, by plain backward() in evaluation mode."""
    found: dict[str, list[Tensor]] = {"conv": [], "fc": []}
    net.eval()
    for images, labels in batches:
        net.zero_grad()
        (-functional.log_softmax(net(images), 1)[torch.arange(len(labels)), labels].mean()).backward()
        found["conv"].append(net.conv.weight.grad.clone())
        found["fc"].append(net.fc.weight.grad.clone())
    return found


def test_magnitude() -> None:
    net = _net()
    scores = find_score("magnitude")(View(net))
    assert list(scores) == ["conv", "fc"]
    assert torch.equal(scores["conv"], net.conv.weight.detach().abs())
    assert not scores["fc"].requires_grad


def _slow_lamp(weights: list[float]) -> list[float]:
    """Position i is before j when its square is smaller, or equal and i the larger index: ties go by lowest index."""
    squares = [w * w for w in weights]
    result = []
    for i, u in enumerate(squares):
        rest = sum(v for j, v in enumerate(squares) if v > u or (v == u and j <= i))
        result.append(u / rest if u > 0 else 0.0)
    return result


# halves and quarters: their squares add up without rounding, so that ties are ties
@given(st.lists(st.integers(-12, 12).map(lambda n: n / 4), min_size=1, max_size=25))
def test_lamp_is_the_slow_formula_with_ties_and_zeros(weights: list[float]) -> None:
    fast = lamp_of(torch.tensor(weights)).tolist()
    assert fast == pytest.approx(_slow_lamp(weights), rel=1e-12, abs=0)


def test_lamp_by_hand() -> None:
    # squares 1, 9, 4 -> 1/14, 9/9, 4/13
    assert lamp_of(torch.tensor([[1.0, -3.0, 2.0]])).tolist() == [pytest.approx([1 / 14, 1.0, 4 / 13], rel=1e-15)]


def test_equal_weights_are_ranked_by_lowest_index() -> None:
    assert lamp_of(torch.tensor([2.0, -2.0, 2.0])).tolist() == pytest.approx([1.0, 1 / 2, 1 / 3])


def test_lamp_of_zeros_is_zero() -> None:
    assert lamp_of(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2
    assert lamp_of(torch.tensor([0.0, 5.0, 0.0])).tolist() == [0.0, 1.0, 0.0]


def test_lamp_adds_up_in_float64() -> None:
    """100,000 small squares behind a large one: in float32 their sum would stick at the large one."""
    weights = torch.full((100_001,), 1e-4)
    weights[0] = 1.0
    small = float(weights[1]) ** 2
    scores = lamp_of(weights)
    assert scores.dtype == torch.float64
    assert float(scores.min()) == pytest.approx(small / (1.0 + 100_000 * small), rel=1e-9)
    assert float(scores[0]) == 1.0


def test_lamp_score_covers_every_layer() -> None:
    net = _net()
    scores = find_score("lamp")(View(net))
    assert scores["conv"].shape == net.conv.weight.shape
    assert scores["fc"].flatten().tolist() == pytest.approx(_slow_lamp(net.fc.weight.detach().flatten().tolist()))
    assert float(scores["fc"].max()) == 1.0


def test_gradient_is_the_absolute_mean_over_batches() -> None:
    batches = _batches()
    scores = find_score("gradient")(View(_net(), batches))
    for name, grads in _gradients(_net(), batches).items():
        torch.testing.assert_close(scores[name], torch.stack(grads).mean(0).abs(), rtol=1e-10, atol=1e-15)


def test_taylor_is_the_mean_of_squares_and_not_the_square_of_the_mean() -> None:
    batches = _batches()
    net = _net()
    scores = find_score("taylor")(View(net, batches))
    for name, grads in _gradients(_net(), batches).items():
        weight = net.get_submodule(name).weight.detach()
        expected = torch.stack([(grad * weight) ** 2 for grad in grads]).mean(0)
        torch.testing.assert_close(scores[name], expected, rtol=1e-10, atol=1e-18)
        assert not torch.allclose(scores[name], (torch.stack(grads).mean(0) * weight) ** 2, rtol=1e-3)


def test_gradient_of_a_linear_classifier_is_the_closed_form() -> None:
    """d loss / d W = (softmax - onehot)^T x / n."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4, bias=False)).double()
    batches = [(torch.randn(6, 3, 2, 2, dtype=torch.float64), torch.randint(0, 4, (6,))) for _ in range(3)]
    weight = net[1].weight.detach()
    parts = []
    for images, labels in batches:
        x = images.flatten(1)
        logits = x @ weight.T
        error = logits.exp() / logits.exp().sum(1, keepdim=True)
        error[torch.arange(6), labels] -= 1
        parts.append(error.T @ x / 6)
    torch.testing.assert_close(
        find_score("gradient")(View(net, batches))["1"], (sum(parts) / 3).abs(), rtol=1e-9, atol=1e-14
    )


def test_gradients_reach_pruned_positions() -> None:
    net = _net()
    with torch.no_grad():
        net.fc.weight[:, ::2] = 0.0
    scores = find_score("gradient")(View(net, _batches()))
    assert (scores["fc"][:, ::2] > 0).any()


def test_gradients_leave_the_network_as_it_was() -> None:
    net = _net()
    net.train()
    net.bn.eval()  # a frozen BatchNorm stays frozen, the rest stays in training mode
    net.conv.weight.grad = torch.full_like(net.conv.weight, 7.0)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    batches = _batches()
    chance = torch.get_rng_state()
    View(net, batches).gradients()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [net.training, net.conv.training, net.bn.training, net.drop.training] == [True, True, False, True]
    assert torch.equal(net.conv.weight.grad, torch.full_like(net.conv.weight, 7.0))
    assert net.fc.weight.grad is None
    assert net.bn.weight.grad is None
    assert torch.equal(torch.get_rng_state(), chance)


def test_modes_come_back_after_an_error() -> None:
    net = _net()
    net.train()
    with pytest.raises(RuntimeError):
        View(net, [(torch.randn(2, 3, 9, 9), torch.zeros(2, dtype=torch.long))]).gradients()
    assert all(module.training for module in net.modules())


def test_gradients_work_where_gradients_are_switched_off() -> None:
    with torch.no_grad():
        grads = View(_net(), _batches()).gradients()
    assert float(grads["fc"].abs().sum()) > 0
    assert not grads["fc"].requires_grad


def test_scores_with_gradients_need_batches() -> None:
    with pytest.raises(ValueError, match="needs batches"):
        find_score("taylor")(View(_net()))


def test_random_follows_its_generator_only() -> None:
    def draw(seed: int) -> dict[str, Tensor]:
        return find_score("random")(View(_net(), generator=torch.Generator().manual_seed(seed)))

    torch.manual_seed(10)
    first = draw(5)
    torch.manual_seed(11)
    again, other = draw(5), draw(6)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["fc"], other["fc"])
    everything = torch.cat([score.flatten() for score in first.values()])
    assert everything.unique().numel() == everything.numel(), "float64 leaves no ties"
    assert float(everything.min()) >= 0
    assert float(everything.max()) < 1
    assert float(everything.mean()) == pytest.approx(0.5, abs=0.06)


def test_reference_ranks_what_is_alive_there_then_the_rest() -> None:
    net = nn.Sequential(nn.Linear(6, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[9.0, -8.0, 1.0, 3.0, 0.0, 100.0]]))
    there = torch.tensor([[0.0, 1e-6, -0.5, 0.0, 0.2, 0.0]])
    scores = find_score("reference")(View(net, reference={"0": there}))["0"].flatten()
    # alive there by |w| there: 2, 4, 1; then by |w| here: 5, 0, 3
    assert scores.argsort(descending=True).tolist() == [2, 4, 1, 5, 0, 3]


def test_reference_of_zeros_is_magnitude_here() -> None:
    net = _net()
    empty = {"conv": torch.zeros_like(net.conv.weight), "fc": torch.zeros_like(net.fc.weight)}
    scores = find_score("reference")(View(net, reference=empty))
    for name in empty:
        here = net.get_submodule(name).weight.detach().abs().flatten()
        assert scores[name].flatten().argsort().tolist() == here.argsort().tolist()


def test_reference_follows_the_network_to_its_device() -> None:
    """The reference comes from a file, on the CPU; the network may be elsewhere ('meta' stands in for a GPU)."""
    net = nn.Linear(4, 2, device="meta")
    scores = find_score("reference")(View(net, reference={"": torch.ones(2, 4)}))
    assert scores[""].device == net.weight.device
    assert scores[""].shape == (2, 4)


def test_reference_asks_for_one() -> None:
    with pytest.raises(SparseLabError, match="reference network"):
        find_score("reference")(View(_net()))


def test_unknown_score_names_the_nearest_and_all() -> None:
    with pytest.raises(SparseLabError, match=r"unknown score 'magnitud'; did you mean 'magnitude'\?") as caught:
        find_score("magnitud")
    assert all(name in str(caught.value) for name in SCORES)


@pytest.mark.parametrize("name", sorted(SCORES))
def test_every_score_has_the_weights_names_shapes_and_no_nan(name: str) -> None:
    net = _net().float()
    reference = {"conv": net.conv.weight.detach() * 2, "fc": net.fc.weight.detach() * 2}
    scores = find_score(name)(View(net, _batches(), reference=reference, probe=Probe(lambda: 4)))
    assert {layer: score.shape for layer, score in scores.items()} == {
        "conv": net.conv.weight.shape,
        "fc": net.fc.weight.shape,
    }
    assert all(bool(torch.isfinite(score).all()) for score in scores.values())
