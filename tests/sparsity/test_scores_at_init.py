"""snip, grasp, synflow and mest: against explicit masks, finite differences, closed forms and conservation laws."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparse_lab import models
from sparse_lab.errors import SparseLabError
from sparse_lab.models import dyrelu, weight_sharing
from sparse_lab.sparsity.connectivity import connectivity
from sparse_lab.sparsity.masks import Masks, layers
from sparse_lab.sparsity.scores import Batches, Probe, View, batch_statistics, find_score
from sparse_lab.sparsity.topk import global_counts


class Net(nn.Module):
    """Two convolutions with BatchNorm, max-pool and dropout; `bend` is the activation."""

    def __init__(self, bend: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.bend1 = bend()
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.bend2 = bend()
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bend1(self.bn1(self.conv1(x)))
        x = self.bend2(self.bn2(self.conv2(nn.functional.max_pool2d(x, 2))))
        return self.fc(self.drop(x.mean((2, 3))))


def _net(bend: Callable[[], nn.Module] = nn.ReLU) -> Net:
    torch.manual_seed(0)
    return _shaken(Net(bend).double())


def _shaken(model: nn.Module) -> nn.Module:
    """Random biases and BatchNorm numbers, some scales negative, as no initialisation leaves them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.2, 3.0)
        elif isinstance(getattr(module, "bias", None), Tensor):
            nn.init.normal_(module.bias)
    return model


def _batches(size: int = 8, sizes: tuple[int, ...] = (6, 6)) -> Batches:
    torch.manual_seed(1)
    return [(torch.randn(n, 3, size, size, dtype=torch.float64), torch.randint(0, 5, (n,))) for n in sizes]


def _training_copy(net: nn.Module) -> nn.Module:
    """Training mode without dropout, by plain switches: what batch statistics have to equal."""
    twin = copy.deepcopy(net).train()
    for module in twin.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return twin


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return (torch.logsumexp(logits, 1) - logits[torch.arange(len(labels)), labels]).mean()


def _remember(model: nn.Module) -> tuple[dict[str, Tensor], list[tuple[bool, object]]]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return state, [(module.training, getattr(module, "track_running_stats", None)) for module in model.modules()]


def _assert_untouched(model: nn.Module, before: tuple[dict[str, Tensor], list[tuple[bool, object]]]) -> None:
    state, flags = _remember(model)
    assert list(state) == list(before[0])
    assert all(torch.equal(value, before[0][name]) for name, value in state.items())
    assert flags == before[1]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batch_statistics_is_training_mode_without_dropout() -> None:
    net = _net()
    images = _batches()[0][0]
    expected = _training_copy(net)(images)
    with batch_statistics(net):
        torch.testing.assert_close(net(images), expected, rtol=1e-13, atol=1e-13)
        assert not net.drop.training
    assert not torch.allclose(net.eval()(images), expected, rtol=0.1), "running statistics would show"


def test_batch_statistics_leaves_the_network_as_it_was() -> None:
    net = _net().train()
    net.bn1.eval()
    net.bn2.num_batches_tracked.fill_(7)
    before = _remember(net)
    with batch_statistics(net):
        net(_batches()[0][0])
    _assert_untouched(net, before)
    with pytest.raises(RuntimeError), batch_statistics(net):
        net(_batches()[0][0])
        net(torch.zeros(2, 4, 8, 8, dtype=torch.float64))
    _assert_untouched(net, before)


def test_snip_is_the_gradient_of_explicit_masks() -> None:
    """The paper's own definition: every weight times a mask of ones, |d loss / d mask|."""
    net, batches = _net(), _batches()
    twin = _training_copy(net)
    names = ("conv1", "conv2", "fc")
    masks = {name: torch.ones_like(net.get_submodule(name).weight, requires_grad=True) for name in names}
    means = {name: torch.zeros_like(masks[name]) for name in names}
    for images, labels in batches:
        parameters = {f"{name}.weight": net.get_submodule(name).weight * masks[name] for name in names}
        loss = _loss(functional_call(twin, parameters, (images,)), labels)
        for name, grad in zip(names, torch.autograd.grad(loss, list(masks.values())), strict=True):
            means[name] += grad / len(batches)
    scores = find_score("snip")(View(net, batches))
    assert list(scores) == list(names)
    for name in names:
        torch.testing.assert_close(scores[name], means[name].abs(), rtol=1e-10, atol=1e-16)


def test_snip_takes_gradients_at_hand() -> None:
    net = _net()
    taken = {name: torch.randn_like(module.weight) for name, module in layers(net).items()}
    for name, score in find_score("snip")(View(net, grads=taken)).items():
        assert torch.equal(score, (net.get_submodule(name).weight * taken[name]).abs())


def _mean_gradient(net: nn.Module, batches: Batches, moved: dict[str, Tensor], by: float) -> dict[str, Tensor]:
    """Mean gradient at temperature 200 where the counted weights are moved by `by` times `moved`, by plain backward."""
    twin = _training_copy(net)
    found = layers(twin)
    for name, step in moved.items():
        found[name].weight.data += by * step
    for images, labels in batches:
        (_loss(twin(images) / 200, labels) / len(batches)).backward()
    return {name: module.weight.grad for name, module in found.items()}


def _differences(net: nn.Module, batches: Batches, step: float) -> dict[str, Tensor]:
    """H g by a central difference of the gradient along g, `step` long in all."""
    along = _mean_gradient(net, batches, {}, 0.0)
    by = step / float(torch.cat([g.flatten() for g in along.values()]).norm())
    ahead, behind = _mean_gradient(net, batches, along, by), _mean_gradient(net, batches, along, -by)
    return {name: (ahead[name] - behind[name]) / (2 * by) for name in along}


def _assert_grasp(net: nn.Module, batches: Batches, step: float, within: float) -> None:
    before = _remember(net)
    scores = find_score("grasp")(View(net, lambda: batches))
    _assert_untouched(net, before)
    for name, product in _differences(net, batches, step).items():
        expected = layers(net)[name].weight.detach() * product
        assert float(expected.norm()) > 0
        assert float((scores[name] - expected).norm() / expected.norm()) < within, name


@pytest.mark.parametrize("bend", [nn.Softplus, nn.Tanh])
def test_grasp_is_a_finite_difference_of_the_gradient(bend: Callable[[], nn.Module]) -> None:
    _assert_grasp(_net(bend), _batches(), step=1e-4, within=1e-6)


@pytest.mark.parametrize("name", ["vgg16", "resnet34"])
def test_grasp_of_the_real_networks(name: str) -> None:
    """A step of 1e-7 stays on one side of the kinks of ReLU and max-pool, and in float64 the difference holds."""
    torch.manual_seed(0)
    net = models.build(name, num_classes=5, width=0.0625).double()
    _assert_grasp(net, _batches(32, (4, 4)), step=1e-7, within=1e-4)


def test_grasp_of_dynamic_activations() -> None:
    torch.manual_seed(0)
    net = models.build("resnet34", num_classes=5, width=0.0625)
    dyrelu.install(net, 32)
    _assert_grasp(net.double(), _batches(32, (4,)), step=1e-7, within=1e-4)


def test_grasp_keeps_what_carries_the_gradient() -> None:
    """By hand: softmax over (w1, w2) of one image of ones at one place, label 0, temperature T, p = softmax(w / T).

    g = (-q, q) / T with q = 1 - p; H = p q / T^2 ((1, -1), (-1, 1)); so H g = 2 p q^2 / T^3 (-1, 1), score w (H g).
    """
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False)).double()
    net[1].weight.data.copy_(torch.tensor([[30.0], [-20.0]]))
    batches = [(torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.tensor([0]))]
    p = float(torch.sigmoid(torch.tensor(50.0 / 200, dtype=torch.float64)))
    size = 2 * p * (1 - p) ** 2 / 200**3
    expected = torch.tensor([[-30.0 * size], [-20.0 * size]], dtype=torch.float64)
    torch.testing.assert_close(find_score("grasp")(View(net, batches))["1"], expected, rtol=1e-10, atol=0.0)


def test_grasp_sees_the_same_batches_twice() -> None:
    calls = []

    def make() -> Batches:
        calls.append(1)
        return _batches()

    find_score("grasp")(View(_net(), make))
    assert len(calls) == 1


def test_scores_that_need_batches_say_so() -> None:
    net = _net()
    taken = {name: module.weight.detach() for name, module in layers(net).items()}
    with pytest.raises(SparseLabError, match="grasp needs batches"):
        find_score("grasp")(View(net, _batches(), grads=taken))
    with pytest.raises(SparseLabError, match="grasp needs batches"):
        find_score("grasp")(View(net))
    for name in ("snip", "mest"):
        with pytest.raises(ValueError, match="needs batches"):
            find_score(name)(View(net))


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow", "mest"])
def test_scores_leave_the_network_as_it_was(name: str) -> None:
    net = _net().train()
    net.bn1.eval()
    before = _remember(net)
    with torch.no_grad():
        scores = find_score(name)(View(net, _batches(), probe=Probe(lambda: 8)))
    _assert_untouched(net, before)
    assert not any(score.requires_grad for score in scores.values())


def test_synflow_of_two_layers_is_the_closed_form() -> None:
    """R = 1^T |W2| diag(|gamma| / sqrt(var + eps)) |W1| 1; the hidden numbers are far above ReLU6's ceiling."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.ReLU6(), nn.Linear(5, 4))
    first, norm, second = net[1], net[2], net[4]
    first.weight.data.mul_(100)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    w1, w2 = first.weight.detach().double().abs(), second.weight.detach().double().abs()
    gain = norm.weight.detach().double().abs() / (norm.running_var.double() + norm.eps).sqrt()
    scores = find_score("synflow")(View(net, probe=Probe(lambda: 2)))
    torch.testing.assert_close(scores["1"], w1 * (gain * w2.sum(0))[:, None], rtol=1e-12, atol=0.0)
    torch.testing.assert_close(scores["4"], w2 * (gain * w1.sum(1)), rtol=1e-12, atol=0.0)


def _equal(sums: list[float]) -> bool:
    return min(sums) > 0 and max(sums) / min(sums) - 1 < 1e-10


def _synflow_sums(model: nn.Module) -> list[float]:
    return [float(score.sum()) for score in find_score("synflow")(View(model)).values()]


def test_synflow_is_conserved_over_the_layers_of_vgg16() -> None:
    torch.manual_seed(0)
    net = models.build("vgg16", width=0.25)
    assert _equal(_synflow_sums(net))
    fresh = _synflow_sums(net)[0]
    _shaken(net)
    before = _remember(net)
    assert _equal(_synflow_sums(net))
    _assert_untouched(net, before)
    assert _synflow_sums(net)[0] != pytest.approx(fresh, rel=0.1), "BatchNorm's scales should have had a say"
    for module in layers(net).values():
        module.weight.data[torch.rand_like(module.weight) < 0.7] = 0.0
    scores = find_score("synflow")(View(net))
    assert _equal([float(score.sum()) for score in scores.values()])
    assert all(bool((scores[name][module.weight == 0] == 0).all()) for name, module in layers(net).items())


@pytest.mark.parametrize("name", ["resnet34", "mobilenet_v2"])
def test_synflow_of_a_residual_network_is_conserved_from_end_to_end(name: str) -> None:
    """Shortcuts go around what is between; only the stem and the classifier are on all paths."""
    torch.manual_seed(0)
    net = _shaken(models.build(name, width=0.25))
    sums = _synflow_sums(net)
    assert _equal([sums[0], sums[-1]])
    assert max(sums) <= sums[0] * (1 + 1e-10)
    assert min(sums) < sums[0] * 0.99


def test_synflow_of_shared_weights_adds_up_all_their_uses() -> None:
    torch.manual_seed(0)
    net = models.build("resnet34", width=0.125).double()
    weight_sharing.share(net)
    shared = [module for module in net.modules() if hasattr(module, "shares")]
    shared[0].scale.data.fill_(-0.7)
    scores = find_score("synflow")(View(net))
    plain = weight_sharing.unshared(net)
    apart = find_score("synflow")(View(plain))
    names = {module: name for name, module in net.named_modules()}
    expected = {name: apart[name].clone() for name in scores}
    for module in shared:
        expected[names[module.shares]] += apart[names[module]]
    assert len(apart) == len(scores) + len(shared)
    for name, score in scores.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-10, atol=0.0)


def test_synflow_passes_through_dynamic_activations() -> None:
    torch.manual_seed(0)
    net = models.build("resnet34", width=0.125)
    plain = find_score("synflow")(View(net))
    dyrelu.install(net, 32)
    dynamic = find_score("synflow")(View(net))
    assert list(dynamic) == list(plain)
    assert all(torch.equal(dynamic[name], plain[name]) for name in plain)


def test_mest_is_magnitude_and_gradient() -> None:
    """d loss / d W of a linear classifier is (softmax - onehot)^T x / n; lambda is 1."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4, bias=False)).double()
    net[1].weight.data[0] = 0.0
    images, labels = torch.randn(6, 3, 2, 2, dtype=torch.float64), torch.randint(0, 4, (6,))
    weight, x = net[1].weight.detach(), images.flatten(1)
    error = torch.softmax(x @ weight.T, 1) - torch.eye(4, dtype=torch.float64)[labels]
    scores = find_score("mest")(View(net, [(images, labels)]))["1"]
    torch.testing.assert_close(scores, weight.abs() + (error.T @ x / 6).abs(), rtol=1e-10, atol=1e-16)
    assert bool((scores[0] > 0).all()), "a weight just grown has only its gradient"
    taken = {"1": torch.full_like(weight, -3.0)}
    assert torch.equal(find_score("mest")(View(net, grads=taken))["1"], weight.abs() + 3.0)


@pytest.mark.parametrize(
    "width", [pytest.param(0.125, marks=pytest.mark.full), pytest.param(1.0, marks=pytest.mark.nightly)]
)
def test_global_ranking_empties_layers_of_vgg16_and_synflow_in_steps_does_not(width: float) -> None:
    """VGG16 at 99.9%, ranked over the whole network without any floor: the paper's layer collapse, and its way out."""
    torch.manual_seed(0)
    net = models.build("vgg16", width=width)
    masks = Masks(net)
    target = round(0.001 * masks.total())
    view = View(net, [(torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,)))])
    counts = {name: global_counts(find_score(name)(view), target, least=0) for name in ("snip", "grasp", "magnitude")}
    assert any(0 in count.values() for count in counts.values()), counts
    for step in range(1, 101):
        _keep_best(masks, find_score("synflow")(view), round(0.001 ** (step / 100) * masks.total()))
    assert masks.kept() == target
    assert min(masks.kept_by_layer().values()) > 0
    assert connectivity(net, 32).connected


def _keep_best(masks: Masks, scores: dict[str, Tensor], kept: int) -> None:
    """The `kept` best of what is alive in the whole network, without floors."""
    alive = masks.masks()
    flat = torch.cat([score[alive[name]] for name, score in scores.items()])
    chosen = flat >= torch.kthvalue(flat, len(flat) - kept + 1).values
    parts = chosen.split(list(masks.kept_by_layer().values()))
    masks.set({name: alive[name].masked_scatter(alive[name], part) for name, part in zip(alive, parts, strict=True)})
