"""The invariants: masks in the state_dict, exact counts, and nothing alive outside a mask after any step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from decimal import Decimal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_lab.models import build
from sparse_lab.sparsity.mask_updates import prune_to
from sparse_lab.sparsity.masks import Masks, count, layers, num_kept
from sparse_lab.sparsity.scores import View, find_score

VGG16 = 14_715_584
# the optimizers' own names for what they hold a weight
OPTIMIZERS: dict[str, tuple[Callable[[list[nn.Parameter]], torch.optim.Optimizer], tuple[str, ...]]] = {
    "sgd": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=5e-4), ("momentum_buffer",)),
    "nesterov": (
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
        ("momentum_buffer",),
    ),
    "adam": (lambda p: torch.optim.Adam(p, 1e-2, weight_decay=5e-4), ("exp_avg", "exp_avg_sq")),
    "amsgrad": (lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True), ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
    "adamw": (lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.01), ("exp_avg", "exp_avg_sq")),
}


def _net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 4 * 4, 5),
    )


def _loss(net: nn.Module) -> Tensor:
    return functional.cross_entropy(net(torch.randn(8, 3, 4, 4)), torch.randint(0, 5, (8,)))


def _train(net: nn.Module, optimizer: torch.optim.Optimizer, bf16: bool = False) -> None:
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
        loss = _loss(net)
    loss.backward()
    optimizer.step()


def _random_masks(masks: Masks, density: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {name: torch.rand(mask.shape, generator=generator) < density for name, mask in masks.masks().items()}


def test_counted_are_conv_and_linear_weights_only() -> None:
    net = _net()
    assert list(layers(net)) == ["0", "3", "6"]
    assert count(net) == 6 * 3 * 9 + 6 * 3 * 9 + 96 * 5
    masks = Masks(net)
    assert masks.total() == masks.kept() == count(net)
    assert masks.sparsity() == 0.0


def test_vgg16_has_as_many_counted_weights_as_the_paper() -> None:
    with torch.device("meta"):
        assert count(build("vgg16")) == VGG16


@pytest.mark.parametrize(
    "sparsity", ["0", "0.5", "0.9", "0.95", "0.9639", "0.9685", "0.9885", "0.99", "0.999", "0.9999"]
)
@pytest.mark.parametrize("total", [VGG16, 21_265_088, 1000, 7])
def test_kept_is_the_rounded_share(sparsity: str, total: int) -> None:
    exact = (1 - Decimal(sparsity)) * total
    kept = num_kept(float(sparsity), total)
    assert abs(Decimal(kept) - exact) <= Decimal("0.5")
    assert num_kept(0.9885, VGG16) == 169_229  # 0.0115 * 14,715,584 = 169,229.2


def test_counts_follow_the_masks() -> None:
    net = _net()
    masks = Masks(net)
    new = _random_masks(masks)
    masks.set(new)
    expected = {name: sum(mask.flatten().tolist()) for name, mask in new.items()}
    assert masks.kept_by_layer() == expected
    assert masks.kept() == sum(expected.values())
    assert masks.sparsity() == pytest.approx(1 - sum(expected.values()) / 804)
    assert torch.equal(masks["3"], new["3"])
    for name, module in layers(net).items():
        assert bool((module.weight[~new[name]] == 0).all())
        assert bool((module.weight[new[name]] != 0).all())


def test_setting_some_layers_leaves_the_others() -> None:
    net = _net()
    masks = Masks(net)
    before = net[6].weight.detach().clone()
    masks.set({"0": torch.zeros(6, 3, 3, 3, dtype=torch.bool)})
    assert masks.kept_by_layer() == {"0": 0, "3": 162, "6": 480}
    assert torch.equal(net[6].weight.detach(), before)


@pytest.mark.parametrize("distribution", ["global", "lamp", "uniform", "er", "erk"])
@pytest.mark.parametrize("score", ["magnitude", "random", "lamp"])
def test_kept_is_exact_after_pruning_again_and_again(distribution: str, score: str) -> None:
    net = _net()
    with torch.no_grad():
        for module in layers(net).values():
            module.weight.copy_(module.weight.mul(16).round().add(0.5).div(16))  # ties everywhere, and no zeros
    masks = Masks(net)
    for sparsity in (0.0, 0.3, 0.9, 0.97, 0.9885, 1 - 3 / 804):
        before = {name: mask.clone() for name, mask in masks.masks().items()}
        masks.set(prune_to(masks, num_kept(sparsity, masks.total()), find_score(score)(View(net)), distribution))
        assert masks.kept() == round((1 - sparsity) * 804)
        assert sum(int((module.weight != 0).sum()) for module in layers(net).values()) == masks.kept()
        assert min(masks.kept_by_layer().values()) >= 1
        assert all(bool((before[name] | ~mask).all()) for name, mask in masks.masks().items()), "nothing is revived"


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16-autocast"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_outside_the_mask_survives_any_step(name: str, bf16: bool) -> None:
    make, state_names = OPTIMIZERS[name]
    net = _net()
    optimizer = make(list(net.parameters()))
    for _ in range(3):
        _train(net, optimizer, bf16)
    masks = Masks(net)
    optimizer.register_step_post_hook(lambda opt, args, kwargs: masks.enforce(opt))
    new = _random_masks(masks)
    masks.set(new)
    start = {layer: module.weight.detach().clone() for layer, module in layers(net).items()}
    for _ in range(20):
        _train(net, optimizer, bf16)
        for layer, module in layers(net).items():
            held = [module.weight.detach(), *(optimizer.state[module.weight][key] for key in state_names)]
            for tensor in held:
                assert tensor.shape == module.weight.shape
                assert int(torch.count_nonzero(tensor[~new[layer]])) == 0
                assert int(torch.count_nonzero(tensor[new[layer]])) > 0
    for layer, module in layers(net).items():
        moved = module.weight.detach() != start[layer]
        assert int(moved[new[layer]].sum()) > 0.9 * int(new[layer].sum()), "what is alive trains"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masking_gradients_alone_revives_pruned_weights(name: str) -> None:
    """The control: why enforcing must touch weights and optimizer state."""
    net = _net()
    optimizer = OPTIMIZERS[name][0](list(net.parameters()))
    for _ in range(3):
        _train(net, optimizer)
    masks = Masks(net)
    new = _random_masks(masks)
    masks.set(new)

    def mask_gradients(opt: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        for layer, module in layers(net).items():
            module.weight.grad.mul_(new[layer])

    optimizer.register_step_pre_hook(mask_gradients)
    for _ in range(20):
        _train(net, optimizer)
    pruned = sum(int((~mask).sum()) for mask in new.values())
    revived = sum(int(torch.count_nonzero(m.weight.detach()[~new[layer]])) for layer, m in layers(net).items())
    assert revived > 0.9 * pruned


def test_other_tensors_of_the_optimizer_are_left_alone() -> None:
    net = _net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    _train(net, optimizer)
    masks = Masks(net)
    masks.set({name: torch.zeros_like(mask) for name, mask in masks.masks().items()})
    bias, scale = net[0].bias.detach().clone(), net[1].weight.detach().clone()
    moments = optimizer.state[net[0].bias]["exp_avg"].clone()
    masks.enforce(optimizer)
    assert float(optimizer.state[net[0].weight]["step"]) == 1.0
    assert torch.equal(net[0].bias.detach(), bias)
    assert torch.equal(net[1].weight.detach(), scale)
    assert torch.equal(optimizer.state[net[0].bias]["exp_avg"], moments)


def test_an_optimizer_that_has_not_stepped_gets_no_state() -> None:
    net = _net()
    optimizer = torch.optim.Adam(net.parameters())
    Masks(net).enforce(optimizer)
    assert len(optimizer.state) == 0


def test_the_hook_does_not_run_when_the_scaler_skips_the_step() -> None:
    net = _net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    masks = Masks(net)
    masks.set(_random_masks(masks))
    runs: list[int] = []

    def after(opt: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        runs.append(1)
        masks.enforce(opt)

    optimizer.register_step_post_hook(after)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor, expected in ((1.0, 1), (float("inf"), 1), (1.0, 2)):
        before = net[0].weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale(_loss(net) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert len(runs) == expected
        assert torch.equal(net[0].weight.detach(), before) == (factor != 1.0)
    assert bool((net[0].weight[~masks["0"]] == 0).all())


def test_masks_travel_in_the_state_dict() -> None:
    net = _net()
    masks = Masks(net)
    new = _random_masks(masks)
    masks.set(new)
    state = net.state_dict()
    named = {name: value for name, value in state.items() if name.endswith(".mask")}
    assert sorted(named) == ["0.mask", "3.mask", "6.mask"]
    assert all(value.dtype == torch.bool for value in named.values())

    other = _net(seed=1)
    there = Masks(other)
    there.enforce()  # has multipliers of ones by now, which must not outlive the load
    other.load_state_dict(state)
    assert all(torch.equal(there[name], new[name]) for name in new)
    with torch.no_grad():
        for module in layers(other).values():
            module.weight.fill_(3.0)
    there.refresh()
    there.enforce()
    for name, module in layers(other).items():
        assert torch.equal(module.weight.detach(), 3.0 * new[name].float())


def test_a_second_look_at_a_masked_network_finds_its_masks() -> None:
    net = _net()
    first = Masks(net)
    new = _random_masks(first)
    first.set(new)
    second = Masks(net)
    assert all(torch.equal(second[name], new[name]) for name in new)


def test_masks_stay_bool_when_the_network_changes_its_dtype() -> None:
    net = _net()
    masks = Masks(net)
    masks.set(_random_masks(masks))
    net.double()
    masks.refresh()
    with torch.no_grad():
        net[0].weight.fill_(2.0)
    masks.enforce()
    assert masks["0"].dtype == torch.bool
    assert torch.equal(net[0].weight.detach(), 2.0 * masks["0"].double())


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_weights_left_out_are_still_enforced_where_their_mask_has_changed(with_optimizer):
    """Momentum that a mask change left outside must go too, once."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    masks = Masks(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    masks.enforce(optimizer)
    new = torch.zeros(3, 4, dtype=torch.bool)
    new[0, 0] = True
    masks.set({"0": new}, optimizer if with_optimizer else None)
    moved = frozenset(masks.weights().values())
    momentum = optimizer.state[net[0].weight]["momentum_buffer"]
    assert bool(momentum[~new].any()) is not with_optimizer
    masks.enforce(optimizer, but=moved)
    assert not momentum[~new].any() and not net[0].weight[~new].any()
    with torch.no_grad():
        net[0].weight.fill_(1.0)
    masks.enforce(optimizer, but=moved)
    assert bool((net[0].weight == 1.0).all())  # nothing is multiplied, for nobody was to have moved it
    masks.refresh()
    masks.enforce(optimizer, but=moved)
    assert not net[0].weight[~new].any()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
        lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=1e-2),
    ],
    ids=["sgd", "adam", "adamw"],
)
def test_cutting_gradients_is_the_same_as_zeroing_weights_and_state(make):
    """Six steps both ways: not one bit differs, and what is masked is zero, state and all."""
    ended = []
    for cut in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
        masks = Masks(net)
        masks.set({name: torch.rand(mask.shape) < 0.4 for name, mask in masks.masks().items()})
        optimizer = make(net.parameters())
        for _ in range(6):
            optimizer.zero_grad()
            net(torch.randn(4, 6)).square().sum().backward()
            if cut:
                masks.cut_gradients()
            optimizer.step()
            if not cut:
                masks.enforce(optimizer)
            for name, weight in masks.weights().items():
                state = [one for one in optimizer.state[weight].values() if one.shape == weight.shape]
                assert not any(one[~masks[name]].any() for one in (weight, *state))
        states = [one for weight in net.parameters() for one in optimizer.state[weight].values()]
        ended.append([one.detach().clone() for one in (*net.parameters(), *states)])
    assert all(torch.equal(one, other) for one, other in zip(*ended, strict=True))
