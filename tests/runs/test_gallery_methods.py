"""The methods of the gallery one by one, each against a reference of its own, watched in real runs."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from sparse_lab import data, models
from sparse_lab.algorithms.after_step import MaskUpdate
from sparse_lab.algorithms.drop_and_grow import ElasticMutation
from sparse_lab.algorithms.enforce import EnforceMasks
from sparse_lab.algorithms.hypersphere import Hypersphere
from sparse_lab.algorithms.prune import Prune
from sparse_lab.callbacks.checkpoint import Checkpoint
from sparse_lab.errors import UserError
from sparse_lab.experiment.identity import run_dir
from sparse_lab.experiment.runner import run
from sparse_lab.experiment.validate import check
from sparse_lab.training.checkpoint_io import load_network

TOTAL = 57_884  # VGG16 at a sixteenth of its width
COUNTED = (nn.Conv2d, nn.Linear)


def lines(config) -> list[dict]:
    return [json.loads(line) for line in (run_dir(config).path / "updates.jsonl").read_text().splitlines()]


def metrics(config) -> list[dict[str, str]]:
    with open(run_dir(config).path / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def masks_in(config) -> dict[str, np.ndarray]:
    state = load_network(run_dir(config).best)
    return {name.removesuffix(".mask"): value.numpy() for name, value in state.items() if name.endswith(".mask")}


def best_of_all(scores: dict[str, np.ndarray], kept: int) -> dict[str, np.ndarray]:
    """The `kept` largest of the whole network, every layer's largest among them; of equals the first ones."""
    flat = np.concatenate([score.ravel() for score in scores.values()])
    ends = np.cumsum([score.size for score in scores.values()])
    first = [end - score.size + int(score.argmax()) for end, score in zip(ends, scores.values(), strict=True)]
    order = np.argsort(-flat, kind="stable")
    rest = order[~np.isin(order, first)]
    picked = np.zeros(len(flat), bool)
    picked[[*first, *rest[: kept - len(first)]]] = True
    parts = np.split(picked, ends[:-1])
    return {name: part.reshape(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def counted(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: part.weight for name, part in network.named_modules() if isinstance(part, COUNTED)}


# --- before training ---


def snip(network: nn.Module, images, labels) -> dict[str, np.ndarray]:
    weights = counted(network)
    grads = torch.autograd.grad(functional.cross_entropy(network(images), labels), list(weights.values()))
    return {n: (w * g).abs().detach().numpy() for (n, w), g in zip(weights.items(), grads, strict=True)}


def grasp(network: nn.Module, images, labels) -> dict[str, np.ndarray]:
    """H g by differences of the gradient along g; float64, so close that no ReLU changes its mind."""
    weights = list(counted(network).values())

    def gradient() -> list[torch.Tensor]:
        return list(torch.autograd.grad(functional.cross_entropy(network(images) / 200, labels), weights))

    along, sides = gradient(), []
    step = 1e-8 / float(torch.stack([g.norm() for g in along]).norm())
    for sign in (1, -2):
        with torch.no_grad():
            for weight, direction in zip(weights, along, strict=True):
                weight += sign * step * direction
        sides.append(gradient())
    with torch.no_grad():
        for weight, direction in zip(weights, along, strict=True):
            weight += step * direction
    products = [(up - down) / (2 * step) for up, down in zip(*sides, strict=True)]
    return {n: (w * p).detach().numpy() for n, w, p in zip(counted(network), weights, products, strict=True)}


def synflow(network: nn.Module, density: float, iterations: int) -> dict[str, np.ndarray]:
    """VGG16 by hand; BatchNorm's factor is the same for all and says nothing in a ranking."""
    weights = {name: weight.detach().double().abs() for name, weight in counted(network).items()}
    masks = {name: torch.ones_like(weight) for name, weight in weights.items()}
    for iteration in range(1, iterations + 1):
        leaves = {name: (weight * masks[name]).requires_grad_() for name, weight in weights.items()}
        x = torch.ones(1, 3, 32, 32, dtype=torch.float64)
        for name, part in network.features.named_children():
            if isinstance(part, nn.Conv2d):
                x = functional.conv2d(x, leaves[f"features.{name}"], padding=1)
            elif isinstance(part, nn.MaxPool2d):
                x = functional.max_pool2d(x, 2)
        functional.linear(x.flatten(1), leaves["classifier.0"]).sum().backward()
        number = round(density ** (iteration / iterations) * TOTAL)
        scores = {name: (leaf * leaf.grad).detach().numpy() for name, leaf in leaves.items()}
        ranked = {n: np.where(masks[n].numpy() > 0, s, -np.inf) for n, s in scores.items()}
        masks = {name: torch.from_numpy(mask).double() for name, mask in best_of_all(ranked, number).items()}
    return {name: mask.numpy() > 0 for name, mask in masks.items()}


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "method",
    [
        "snip",
        "synflow",
        *(pytest.param(name, marks=pytest.mark.full) for name in ("grasp", "magnitude_at_init", "random_at_init")),
    ],
)
def test_static_masks_are_those_of_the_initial_network(method, compose, quiet):
    """In float64; data and weights made here from the seed."""
    overrides = (
        "sparsity.target=0.95",
        "trainer.precision=64-true",
        "dataset.train_limit=500",
        "training.batch_size=128",
        "training.epochs=1",
        "training.limit_batches=1",
    )
    config = compose(f"method={method}", *overrides, *(["method.prune.iterations=7"] if method == "synflow" else []))
    result = run(config, "x", quiet)
    torch.manual_seed(config.seed)
    network = models.build("vgg16", width=0.0625).train()
    loader = data.build(config.dataset, config.training, config.seed).train
    ((images, labels),) = loader.balanced(10)
    assert torch.bincount(labels).tolist() == [10] * 10
    assert len(torch.unique(images.flatten(1), dim=0)) == 100, "no image twice"
    start = {name: weight.detach().clone() for name, weight in counted(network).items()}
    network.double()
    found, kept = masks_in(config), round(0.05 * TOTAL)
    if method in ("snip", "grasp"):
        wanted = best_of_all({"snip": snip, "grasp": grasp}[method](network, images.double(), labels), kept)
    elif method == "synflow":
        wanted = synflow(network, 0.05, 7)
    elif method == "magnitude_at_init":
        wanted = best_of_all({name: weight.abs().numpy() for name, weight in start.items()}, kept)
    else:
        share = {name: mask.mean() for name, mask in found.items()}
        assert all(abs(share[name] - 0.05) <= 1 / mask.size for name, mask in found.items())
        other = compose(f"method={method}", *overrides, "seed=2")
        run(other, "x", quiet)
        theirs = masks_in(other)
        both = sum(int((found[name] & theirs[name]).sum()) for name in found)
        assert both == pytest.approx(0.05 * kept, abs=40), "two seeds have but chance in common"
        wanted = found
    different = sum(int((found[name] != wanted[name]).sum()) for name in found)
    assert different <= (2 if method == "grasp" else 0)  # finite differences are but close
    assert result["kept"] == kept and [row["step"] for row in lines(config)] == [0]


def test_gmp_follows_the_cubic_in_every_layer(compose, quiet):
    config = compose(
        "method=gmp", "sparsity.target=0.95", "schedule.cubic.every=3", "schedule.cubic.begin=0.1",
        "schedule.cubic.end=0.7", "training.epochs=10", "diagnostics.layers=true",
    )  # fmt: skip
    run(config, "x", quiet)
    rows = {row["step"]: row for row in lines(config)}
    assert list(rows) == [2, 5, 8, 11, 14]
    for step, row in rows.items():
        density = 1 - 0.95 * (1 - (1 - (step - 2) / 12) ** 3)
        assert row["asked"] == row["kept"] == round(density * TOTAL)
        for name, layer in row["layers"].items():
            assert abs(layer["kept"] - row["kept"] / TOTAL * layer["total"]) <= 1, name


# --- rewinding ---


@pytest.fixture
def epochs(monkeypatch) -> dict[str, list[dict[str, torch.Tensor]]]:
    """The network at the end of every epoch, before the best one comes back, by the run's method."""
    from sparse_lab.callbacks.rounds import Rounds

    caught: dict[str, list[dict[str, torch.Tensor]]] = {}

    def look(self, trainer, module, validation):
        saves = next(callback for callback in trainer.callbacks if isinstance(callback, Checkpoint))
        name = saves.folder.name
        caught.setdefault(name, []).append({k: v.clone() for k, v in module.model.state_dict().items()})
        original(self, trainer, module, validation)

    original = Rounds._keep_best
    monkeypatch.setattr(Rounds, "_keep_best", look)
    return caught


@pytest.fixture
def changes(monkeypatch) -> list[tuple[dict, dict]]:
    """The network before and after every pruning."""
    seen: list[tuple[dict, dict]] = []

    def spied(self, *rest, **kwargs):
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        original(self, *rest, **kwargs)
        seen.append((before, {name: value.clone() for name, value in self.model.state_dict().items()}))

    original = Prune.to
    monkeypatch.setattr(Prune, "to", spied)
    return seen


ROUNDS = ("sparsity.target=0.9", "schedule.iterative.share=0.6")  # three rounds: 0.4, 0.16, 0.1


def initial() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return models.build("vgg16", width=0.0625).state_dict()


@pytest.mark.parametrize("method", ["lth", pytest.param("lrr", marks=pytest.mark.full)])
def test_rounds_prune_what_was_trained_and_start_from_where_they_should(method, compose, quiet, with_starts, changes):
    config = with_starts(compose(f"method={method}", *ROUNDS, "training.epochs=3"))
    result = run(config, "x", quiet)
    dense = load_network(run_dir(compose("method=dense", "training.epochs=3")).best)
    network = models.build("vgg16", width=0.0625)
    begin, masks = initial(), {name: np.ones(weight.shape, bool) for name, weight in counted(network).items()}
    assert len(changes) == 3 and [level["kept"] for level in result["levels"]] == [
        round(share * TOTAL) for share in (0.4, 0.16, 0.1)
    ]
    for number, (before, after) in enumerate(changes):
        if number == 0:
            assert all(torch.equal(before[name], value) for name, value in dense.items())
        scores = {n: np.where(mask, before[f"{n}.weight"].abs().numpy(), -np.inf) for n, mask in masks.items()}
        new = best_of_all(scores, result["levels"][number]["kept"])
        assert all((masks[name] >= new[name]).all() for name in masks), "nested"
        masks = new
        source = begin if method == "lth" else before
        for name, value in source.items():
            if name.endswith(".mask"):
                continue
            wanted = value
            layer = name.removesuffix(".weight")
            if layer in masks:
                assert np.array_equal(after[f"{layer}.mask"].numpy(), masks[layer])
                wanted = value * torch.from_numpy(masks[layer])
            assert torch.equal(after[name], wanted), name
    rates = [float(row["learning_rate"]) for row in metrics(config)]
    assert rates[:3] == rates[3:6] == rates[6:] and len(rates) == 9
    # the dense run's own rates: warm-up over 0.1 of six steps, then a cosine; the second step of each epoch
    cosine = [0.05 / 2 * (1 + math.cos(math.pi * (p - 0.1) / 0.9)) for p in (1 / 6, 3 / 6, 5 / 6)]
    assert rates[:3] == pytest.approx(cosine)
    assert rates[:3] == [float(row["learning_rate"]) for row in metrics(compose("training.epochs=3"))]


@pytest.mark.full
def test_lth_and_lrr_share_one_dense_run(compose, quiet, tmp_path):
    for method in ("lth", "lrr"):
        run(compose(f"method={method}", *ROUNDS, "training.epochs=1"), "x", quiet)
    assert sorted(json.loads(p.read_text())["method"] for p in tmp_path.rglob("result.json")) == ["dense", "lrr", "lth"]


@pytest.mark.full
@pytest.mark.parametrize("epoch", [1, 3])
def test_rewinding_goes_back_to_the_end_of_that_very_epoch(epoch, compose, quiet, changes, epochs):
    """Whichever epoch of the dense training was its best, and with the learning rate of what follows."""
    base = ("training.epochs=5", "training.lr=1e-9")  # no epoch is better than the first
    config = compose("method=lth", *ROUNDS, *base, f"method.prune.rewind_weights={epoch}")
    run(config, "x", quiet)
    dense = run_dir(compose("method=dense", *base)).name
    wanted = epochs[dense][epoch - 1]
    assert len(epochs[dense]) == 5
    for _, after in changes:
        for name, value in wanted.items():
            mask = after.get(name.replace("weight", "mask")) if name.endswith("weight") else None
            assert torch.equal(after[name], value if mask is None else value * mask), name
    rates = [float(row["learning_rate"]) for row in metrics(config)]
    assert rates == [float(row["learning_rate"]) for row in metrics(compose("method=dense", *base))][epoch:] * 3


# --- dynamic ---


@pytest.mark.parametrize("method", ["mest", pytest.param("mest_soft", marks=pytest.mark.full)])
def test_elastic_mutation_drops_and_grows_to_the_bounds(method, compose, quiet, monkeypatch):
    seen = []

    def spied(self, step, drop, grow, generator):
        alive = {name: mask.clone().numpy() for name, mask in self.masks.masks().items()}
        weights = {name: weight.detach().clone().numpy() for name, weight in self.masks.weights().items()}
        grads = {name: weight.grad.clone().numpy() for name, weight in self.masks.weights().items()}
        kept, [new] = original(self, step, drop, grow, generator)
        low, high = 0, 0
        for name, mask in new.items():
            now, old = mask.numpy(), alive[name]
            scores = np.abs(weights[name]) + np.abs(grads[name])
            stay, gone = old & now, old & ~now
            if stay.any() and gone.any():
                assert scores[gone].max() <= scores[stay].min(), name
            low, high = low + int(stay.sum()), high + int(now.sum())
            assert now.any()
        seen.append((step, sum(int(m.sum()) for m in alive.values()), low, high))
        assert kept == high
        return kept, [new]

    original = ElasticMutation.update
    monkeypatch.setattr(ElasticMutation, "update", spied)
    config = compose(
        f"method={method}", "sparsity.target=0.9", "training.epochs=8", "method.elastic_mutation.update_every=1"
    )
    result = run(config, "x", quiet)
    # 16 steps, two an epoch: the first stage ends at step 9, the second at step 12
    bounds = {"mest": [(0.8, 1.0), (0.9, 1.0), (1.0, 1.0)], "mest_soft": [(1.0, 1.5), (1.0, 1.25), (1.0, 1.0)]}[method]
    stages = [(2, 0), (4, 0), (6, 0), (8, 0), (9, 1), (10, 1), (12, 2)]
    kept = round(bounds[0][1] * 0.1 * TOTAL)
    assert [step for step, *_ in seen] == [step for step, _ in stages]
    for (_, stage), (_, before, low, high) in zip(stages, seen, strict=True):
        assert before == kept
        assert high == round(bounds[stage][1] * 0.1 * TOTAL)
        assert low == min(before, round(bounds[stage][0] * 0.1 * TOTAL))
        kept = high
    assert result["kept"] == kept == round(0.1 * TOTAL)
    assert result["levels"][0]["best_epoch"] >= (6 if method == "mest_soft" else 1)


@pytest.mark.every(2)
@pytest.mark.parametrize("every", ["5", "1"])
def test_mest_is_not_said_to_rewire_nothing_where_it_does(every, compose, capsys):
    from rich.console import Console

    config = compose(
        "method=mest", "sparsity.target=0.9", "training.epochs=4", f"method.elastic_mutation.update_every={every}"
    )
    run(config, "x", Console(width=200))
    changed = any(row["change"] == "elastic_mutation" for row in lines(config))
    assert changed and "nothing is ever dropped and grown" not in capsys.readouterr().out


@pytest.mark.parametrize("start", [0.0, pytest.param(0.5, marks=pytest.mark.full)])
def test_granet_prunes_along_the_cubic_and_then_exchanges(start, compose, quiet, monkeypatch):
    seen = []

    def spied(self, optimizer):
        alive = {name: mask.clone() for name, mask in self.masks.masks().items()}
        weights = {name: weight.detach().clone() for name, weight in self.masks.weights().items()}
        grads = {name: weight.grad.abs() for name, weight in self.masks.weights().items()}
        original(self, optimizer)
        step = self.step
        p = min(step / 10, 1.0)
        kept = round((1 - (0.9 + (start - 0.9) * (1 - p) ** 3)) * TOTAL)
        scores = {n: np.where(alive[n].numpy(), w.abs().numpy(), -np.inf) for n, w in weights.items()}
        pruned = best_of_all(scores, kept)
        fraction = 0.005 + (0.5 - 0.005) * (1 + math.cos(math.pi * step / 20)) / 2
        alive_again = 0
        for name, now in self.masks.masks().items():
            old, new = pruned[name], now.numpy()
            number = int(old.sum())
            exchanged = min(math.ceil(fraction * number - 1e-9), old.size - number)
            assert new.sum() == number, name
            stay = old & new
            assert stay.sum() == number - exchanged, name
            gone, came = old & ~new, new & ~old
            if gone.any() and stay.any():
                assert scores[name][gone].max() <= scores[name][stay].min()
            if came.any() and (~old & ~new).any():
                assert grads[name].numpy()[came].min() >= grads[name].numpy()[~old & ~new].max()
            fresh = torch.from_numpy(came)
            weight = self.masks.weights()[name]
            momentum = optimizer.state[weight]["momentum_buffer"]
            alive_again += int((weight.detach()[fresh] != 0).sum()) + int((momentum[fresh] != 0).sum())
        seen.append((step, kept, alive_again))

    original = MaskUpdate._update
    monkeypatch.setattr(MaskUpdate, "_update", spied)
    config = compose(
        "method=granet",
        "sparsity.target=0.9",
        f"schedule.cubic.initial={start}",
        "method.drop_and_grow.update_every=2",
        "training.epochs=10",
    )
    result = run(config, "x", quiet)
    rows = lines(config)
    assert rows[0]["kept"] == round((1 - start) * TOTAL) and result["kept"] == round(0.1 * TOTAL)
    assert [(row["step"], row["kept"]) for row in rows[1:]] == [(step, kept) for step, kept, _ in seen]
    assert [step for step, *_ in seen] == list(range(2, 20, 2))
    assert not any(number for *_, number in seen), "what was pruned and grows back starts at zero, without momentum"


def test_granets_sparse_start_is_random_by_erk(compose, quiet):
    """Layers of 0.5 density: ERK gives more to those with few weights for their dims."""
    short = ("diagnostics.layers=true", "training.epochs=1")
    config = compose("method=granet", "sparsity.target=0.9", "schedule.cubic.initial=0.5", *short)
    run(config, "x", quiet)
    layers = lines(config)[0]["layers"]
    static = compose("method=static", "sparsity.target=0.5", *short)
    run(static, "x", quiet)
    assert layers == lines(static)[0]["layers"] or [x["kept"] for x in layers.values()] == [
        x["kept"] for x in lines(static)[0]["layers"].values()
    ]


@pytest.mark.full
def test_dense_and_sparse_by_turns(compose, quiet, monkeypatch):
    seen = []

    def after(self, optimizer):
        original(self, optimizer)
        seen.append(self.masks.kept())

    def spied(self, optimizer):
        old = {name: mask.clone() for name, mask in self.masks.masks().items()}
        begins(self, optimizer)
        for name, mask in self.masks.masks().items():
            fresh = mask & ~old[name]
            if fresh.any():
                assert mask.all() and not optimizer.state
                assert not self.masks.weights()[name].detach()[fresh].any()

    original, begins = EnforceMasks.after_step, Prune.begin_step
    monkeypatch.setattr(EnforceMasks, "after_step", after)
    monkeypatch.setattr(Prune, "begin_step", spied)
    # 40 steps: 4 dense, turns of 4, 6 dense from 28 to 34, then sparse
    config = compose(
        "method=acdc",
        "sparsity.target=0.9",
        "training.epochs=20",
        "schedule.alternating.turn=0.1",
        "schedule.alternating.last_dense=0.15",
    )
    result = run(config, "x", quiet)
    kept = round(0.1 * TOTAL)
    wanted = "dddd" + "SSSSdddd" * 3 + "dddddd" + "SSSSSS"
    assert seen == [kept if letter == "S" else TOTAL for letter in wanted]
    assert result["kept"] == kept and result["levels"][0]["best_epoch"] in {3, 4, 7, 8, 11, 12, 18, 19, 20}
    assert [row["step"] for row in lines(config)] == [4, 8, 12, 16, 20, 24, 34]


@pytest.mark.every(2)
@pytest.mark.parametrize("method", ["dctps", "dctps_rigl"])
def test_the_dense_offset_is_trained_and_never_masked(method, compose, quiet, monkeypatch):
    seen = []

    def look(self, optimizer):
        original(self, optimizer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        parts = [part for part in self.model.modules() if hasattr(part, "alpha")]
        assert len(parts) == 14 and all(id(part.alpha) in held and id(part.weight) in held for part in parts)
        if not seen:
            assert not any(part.weight.any() for part in parts) and all(part.alpha.item() == 1 for part in parts)
        assert all(bool((part.offset != 0).sum() > 0.9 * part.offset.numel()) for part in parts)
        seen.append([part.alpha.item() for part in parts])

    original = Prune.begin_step
    monkeypatch.setattr(Prune, "begin_step", look)
    config = compose(
        f"method={method}", "sparsity.target=0.9", "method.drop_and_grow.update_every=1", "diagnostics.layers=true"
    )
    run(config, "x", quiet)
    assert all(first != last for first, last in zip(seen[0], seen[-1], strict=True))
    rows = lines(config)
    assert len(rows) == (1 if method == "dctps" else 3)
    if method == "dctps":  # as many in every layer, but for the small ones
        kept = {name: layer["kept"] for name, layer in rows[0]["layers"].items()}
        assert {kept[name] for name, layer in rows[0]["layers"].items() if layer["total"] > 500} <= {492, 493}
        assert kept["features.0"] == 108 and kept["features.3"] == 144


# --- hyperspherical ---


@pytest.fixture
def sphere(monkeypatch) -> list[tuple[float, float]]:
    """Watches every step: norms, the added gradient against autograd in float64; yields the shares outside of K."""
    shares: list[tuple[float, float]] = []

    def before(self, optimizer):
        old = {name: weight.grad.clone() for name, weight in self.masks.weights().items()}
        original(self, optimizer)
        strength = self.penalty * self.step / self.total_steps
        total, everything = 0.0, 0
        for name, weight in self.masks.weights().items():
            leaf = weight.detach().double().requires_grad_()
            outside = ~self._inside[name]
            rows = (leaf * outside).flatten(1).square().sum(1) / leaf.flatten(1).square().sum(1)
            (strength * rows.sum()).backward()
            assert torch.allclose(weight.grad.double() - old[name].double(), leaf.grad, rtol=1e-6, atol=1e-9), name
            if weight.dim() == 4:
                total, everything = total + float(rows.sum()), everything + len(rows)
        shares.append((strength, total / everything))

    def after(self):
        normalise(self)
        for weight in self.masks.weights().values():
            if weight.dim() == 4:
                assert torch.allclose(weight.flatten(1).norm(dim=1), torch.ones(len(weight)).to(weight), atol=1e-6)

    original, normalise = Hypersphere.gradients_ready, Hypersphere._normalise
    monkeypatch.setattr(Hypersphere, "gradients_ready", before)
    monkeypatch.setattr(Hypersphere, "_normalise", after)
    return shares


@pytest.mark.full
def test_filters_stay_on_the_sphere_and_what_will_be_pruned_is_emptied(compose, quiet, sphere):
    config = compose(
        "method=prune_on_the_fly", "sparsity.target=0.8", "trainer.precision=64-true", "training.epochs=12",
        "method.hypersphere.penalty=5", "method.hypersphere.every=1",
    )  # fmt: skip
    run(config, "x", quiet)
    assert [strength for strength, _ in sphere] == pytest.approx([5 * step / 24 for step in range(24)])
    assert sphere[-1][1] < 0.3 * sphere[0][1]


@pytest.mark.parametrize("recovery", [True, False])
def test_what_is_pruned_becomes_its_filters_mean(recovery, compose, quiet, monkeypatch):
    seen = {}

    def spied(self, *rest, **kwargs):
        seen.update({name: weight.detach().clone() for name, weight in self.masks.weights().items()})
        original(self, *rest, **kwargs)

    original = Prune.to
    monkeypatch.setattr(Prune, "to", spied)
    config = compose(
        "method=prune_on_the_fly", "sparsity.target=0.8", f"method.hypersphere.recovery={str(recovery).lower()}"
    )
    result = run(config, "x", quiet)
    state = load_network(run_dir(config).best)
    assert any(name.endswith(".mean") for name in state) is recovery
    for name, before in seen.items():
        mask = state[f"{name}.mask"]
        assert torch.equal(state[f"{name}.weight"], before * mask)
        if recovery:
            pairs = zip(before, mask, strict=True)
            wanted = [float(row[~keep].double().mean()) if not keep.all() else 0.0 for row, keep in pairs]
            assert state[f"{name}.mean"].tolist() == pytest.approx(wanted, abs=1e-7)
    assert result["levels"][0]["best_epoch"] == 2 and result["kept"] == round(0.2 * TOTAL)


# --- what must not happen ---


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "asked",
    [
        ("method=prune_on_the_fly", "method.cycles={}", "sparsity.target=0.9"),
        ("method=lth", "schedule=iterative", "method.prune.rewind_weights=2", "sparsity.target=0.9"),
        ("method=lth", "schedule=cubic", "schedule.cubic.every=1", "sparsity.target=0.9"),
        ("method=gmp", "schedule.cubic.every=1", "method.filters.rates=[0.5]", "sparsity.target=0.9"),
        pytest.param(
            ("method=gmp", "schedule.cubic.every=1", "method.filters.flops=0.5", "sparsity.target=0.9"),
            marks=pytest.mark.full,
        ),
        pytest.param(("method=acdc", "method.filters.rates=[0.5]", "sparsity.target=0.9"), marks=pytest.mark.full),
    ],
    ids=lambda asked: " ".join(asked)[:80],
)  # fmt: skip
def test_odd_requests_are_refused_or_end_at_the_target(asked, compose, quiet):
    config = compose(*asked, "training.epochs=6", "training.finetune.epochs=6")
    try:
        check(config)
    except UserError:
        return
    result = run(config, "x", quiet)
    assert result["kept"] == round(0.1 * TOTAL)
    # weights that went back to their start at the last change must have been trained since
    assert config.method.prune.rewind_weights is None or len(lines(config)) == config.training.epochs // 2


def test_patience_does_not_run_out_in_a_dense_turn(compose, quiet):
    """No epoch of it can count as better: 2 dense, 2 sparse, 2 dense (patience 2 would end it), and so on."""
    config = compose("method=acdc", "sparsity.target=0.9", "training.epochs=20", "schedule.alternating.turn=0.1",
                     "training.patience=2", "training.lr=1e-9")  # fmt: skip
    result = run(config, "x", quiet)
    level, sparse = result["levels"][0], {3, 4, 7, 8, 11, 12, 18, 19, 20}
    assert level["best_epoch"] in sparse and level["epochs"] in sparse, "it ends where an epoch could have been better"


@pytest.mark.parametrize("target", [0.998, 0.9985])
def test_a_connected_start_is_connected_also_when_it_is_pruned_in_steps(target, compose, quiet):
    asked = ("method=static", "model=resnet34", "method.prune.iterations=20", "sparsity.connected_init=true")
    config = compose(*asked, f"sparsity.target={target}", "training.epochs=1")
    try:
        check(config)
    except UserError:
        return
    run(config, "x", quiet)
    assert lines(config)[0]["connected"] is True and lines(config)[0]["dead_layers"] == []
