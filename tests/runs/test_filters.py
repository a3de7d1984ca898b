"""Whole filters: which go and when, what is left is really smaller, and compactors that are folded away."""

from __future__ import annotations

import json
import sys
import types
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparse_lab import data, models
from sparse_lab.algorithms.prune import Prune
from sparse_lab.algorithms.structured.compaction import Compaction
from sparse_lab.cli import export as command
from sparse_lab.cli.main import main
from sparse_lab.errors import UserError
from sparse_lab.experiment.identity import run_dir
from sparse_lab.experiment.runner import run
from sparse_lab.experiment.validate import check
from sparse_lab.export import state_dict
from sparse_lab.methods.table import starts
from sparse_lab.models import compactors, registry
from sparse_lab.sparsity.structured.remove_channels import rebuild
from sparse_lab.training.checkpoint_io import load_checkpoint, load_network

TOTAL = 57_884  # VGG16 at a sixteenth of its width
ROWS = [4, 4, 8, 8, 16, 16, 16, 32, 32, 32, 32, 32, 32]
SIZES = [32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]  # pixels of each convolution's map
COMPACTING = ("method.compactors.begin=0", "method.compactors.every=1", "training.finetune.optimizer=sgd")


def weights_of(rows: list[int]) -> int:
    return sum(below * above * 9 for below, above in pairwise([3, *rows])) + 10 * rows[-1]


def uniform(asked: int) -> list[int]:
    """How many filters each layer of VGG16 keeps: all lose the same share, one by one, of equals the later layer's."""
    order = sorted((place / rows, -layer) for layer, rows in enumerate(ROWS) for place in range(1, rows))
    left = list(ROWS)
    while weights_of(left) > asked:
        left[-order.pop(0)[1]] -= 1
    return left


def lines(config) -> list[dict]:
    return [json.loads(line) for line in (run_dir(config).path / "updates.jsonl").read_text().splitlines()]


def convs(state: dict[str, torch.Tensor], kind: str) -> list[np.ndarray]:
    return [value.numpy() for name, value in state.items() if name.endswith(f".{kind}") and value.dim() == 4]


def is_whole(masks: list[np.ndarray]) -> bool:
    """Rows and the columns that read them are gone together, and nothing else is."""
    alive = [np.ones(3, bool), *(mask.any((1, 2, 3)) for mask in masks)]
    wanted = [np.multiply.outer(rows, columns)[:, :, None, None] for columns, rows in pairwise(alive)]
    return all(np.array_equal(mask, np.broadcast_to(one, mask.shape)) for mask, one in zip(masks, wanted, strict=True))


def rates_of(rates: list[float]) -> tuple[str, ...]:
    left = [
        max(1, int(Fraction(str(1 - rate)).limit_denominator(100) * rows))
        for rate, rows in zip(rates, ROWS, strict=True)
    ]
    target = 1 - weights_of(left) / TOTAL
    return (f"method.filters.rates=[{','.join(map(str, rates))}]", f"sparsity.target={target:.8f}")


@pytest.mark.every(2)
@pytest.mark.parametrize(("method", "order"), [("l1_filters", 1), ("sfp", 2)])
def test_the_smallest_filters_of_every_layer_go(method, order, compose, quiet, with_starts, monkeypatch):
    """By numpy, from the weights that the pruning saw."""
    seen = []

    def spied(self, *rest, **kwargs):
        before = {name: weight.detach().clone() for name, weight in self.masks.weights().items()}
        original(self, *rest, **kwargs)
        seen.append((convs({f"{name}.weight": value for name, value in before.items()}, "weight"), {
            name: mask.clone() for name, mask in self.masks.masks().items()}))  # fmt: skip

    original = Prune.to
    monkeypatch.setattr(Prune, "to", spied)
    result = run(with_starts(compose(f"method={method}", "sparsity.target=0.8")), "x", quiet)
    kept = uniform(round(0.2 * TOTAL))
    assert len(seen) == (1 if method == "l1_filters" else 2)
    for weights, found in seen:
        masks = [mask.numpy() for name, mask in found.items() if mask.dim() == 4]
        for weight, mask, number in zip(weights, masks, kept, strict=True):
            norms = (np.abs(weight.astype(float)) ** order).sum((1, 2, 3))
            assert set(np.flatnonzero(mask.any((1, 2, 3)))) == set(np.argsort(-norms, kind="stable")[:number])
    assert is_whole(masks) and result["kept"] == weights_of(kept) <= round(0.2 * TOTAL)


def test_soft_pruning_masks_rows_and_lets_them_train_again(compose, quiet, monkeypatch):
    states = []

    def note(self, optimizer, when):
        masks = {name: mask.clone() for name, mask in self.masks.masks().items()}
        weights = {name: weight.detach().clone() for name, weight in self.masks.weights().items()}
        momentum = [optimizer.state.get(w, {}).get("momentum_buffer") for w in self.masks.weights().values()]
        states.append((when, masks, weights, [None if m is None else m.clone() for m in momentum]))

    def start(self, optimizer):  # two steps an epoch
        starts(self, optimizer)
        note(self, optimizer, f"before {self.step % 2}")

    def after(self, optimizer):
        note(self, optimizer, f"after {(self.step - 1) % 2}")
        if self.step % 2:
            note(self, optimizer, "pruned 0")

    def end(self, optimizer):
        ends(self, optimizer)
        note(self, optimizer, "pruned 1")

    starts, ends = Prune.begin_step, Prune.end_epoch
    monkeypatch.setattr(Prune, "begin_step", start)
    monkeypatch.setattr(Prune, "after_step", after)
    monkeypatch.setattr(Prune, "end_epoch", end)
    config = compose("method=sfp", "sparsity.target=0.8", "training.epochs=4")
    result = run(config, "x", quiet)
    ends_of_epochs = [(masks, weights, momentum) for when, masks, weights, momentum in states if when == "pruned 1"]
    assert len(ends_of_epochs) == 4
    for masks, weights, momentum in ends_of_epochs[:-1]:
        for mask in masks.values():
            rows = mask.flatten(1)
            assert bool((rows.all(1) | ~rows.any(1)).all()), "a soft mask takes rows alone"
        assert bool(masks["classifier.0"].all())
        for (name, mask), buffer in zip(masks.items(), momentum, strict=True):
            assert not weights[name][~mask].any() and not buffer[~mask].any()
    for when, masks, *_ in states:
        if not when.startswith("pruned 1"):
            assert all(bool(mask.all()) for mask in masks.values()), when
    revived, dead = 0, 0
    zeroed, trained = ends_of_epochs[0][0], next(s for s in states[6:] if s[0] == "after 1")[2]
    for name, mask in zeroed.items():
        gone = ~mask.flatten(1).any(1)
        revived += int(trained[name][gone].flatten(1).any(1).sum())
        dead += int(gone.sum())
    # where BatchNorm's shift is negative the ReLU behind a zeroed filter passes nothing back: that one stays zero
    assert dead == sum(ROWS) - sum(uniform(round(0.2 * TOTAL))) and revived > dead / 4
    assert is_whole([mask.numpy() for mask in ends_of_epochs[-1][0].values() if mask.dim() == 4])
    assert [row["change"] for row in lines(config)] == ["prune", "open", "prune", "open", "prune", "open", "prune"]
    assert result["levels"][0]["best_epoch"] == 4 and result["kept"] <= round(0.2 * TOTAL)


HRANK = [0.75, 0.5, 0.5, 0.3, 0.5, 0.5, 0.5, 0.9, 0.9, 0.9, 0.9, 0.8, 0.0]
LEFT = [1, 2, 4, 5, 8, 8, 8, 3, 3, 3, 3, 6, 32]  # whole filters: 0.7 * 8 keeps 5


def test_rates_say_how_many_filters_of_each_layer_go(compose, quiet, with_starts):
    config = with_starts(compose("method=hrank", *rates_of(HRANK)))
    result = run(config, "x", quiet)
    assert [mask.any((1, 2, 3)).sum() for mask in convs(load_network(run_dir(config).best), "mask")] == LEFT
    assert list(result["small"]["filters"].values()) == [*LEFT, 10] and result["kept"] == weights_of(LEFT)
    gone = 1 - sum(w * below * 9 for w, below in zip(LEFT, [3, *ROWS], strict=False)) / TOTAL
    gone -= 10 * 32 / TOTAL  # the classifier keeps all
    assert result["small"]["removed_filters"]["weights"] == pytest.approx(gone, abs=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("side", [-4e-5, 4e-5])
def test_layer_by_layer_each_round_prunes_the_next_layer(side, compose, quiet, with_starts):
    """Also where the last rate is 0 and the target, rounded, would let a weight more live than does."""
    rates, target = rates_of(HRANK)
    asked = float(target.split("=")[1]) + side
    config = compose(
        "method=hrank", "schedule=layerwise", "schedule.layerwise.round_epochs=1", rates, f"sparsity.target={asked}"
    )
    check(config)
    result = run(with_starts(config), "x", quiet)
    assert [level["kept"] for level in result["levels"]] == [
        weights_of([*LEFT[: number + 1], *ROWS[number + 1 :]]) for number in range(13)
    ]
    assert {row["change"] for row in lines(config)} == {"prune"}
    assert is_whole(convs(load_network(run_dir(config).best), "mask"))


@pytest.mark.parametrize(
    ("network", "coupled"),
    [
        ("vgg16", "false"),
        *(
            pytest.param(f"resnet{depth}", coupled, marks=pytest.mark.nightly if depth == 50 else pytest.mark.full)
            for depth, coupled in ((34, "false"), (34, "true"), (50, "false"), (50, "true"))
        ),
    ],
)
def test_a_really_smaller_network_is_left(network, coupled, compose, quiet, with_starts, capsys):
    config = compose(
        "method=l1_filters", f"model={network}", "sparsity.target=0.6", f"method.filters.coupled={coupled}"
    )
    result = run(with_starts(config), "x", quiet)
    small, folder = result["small"], run_dir(config)
    assert small["difference"] <= 1e-5
    state = load_network(folder.small)
    plain = rebuild(models.build(network, width=0.0625), state).eval()
    assert sum(parameter.numel() for parameter in plain.parameters()) == small["parameters"]
    counted = {
        name: part for name, part in plain.named_modules() if isinstance(part, (torch.nn.Conv2d, torch.nn.Linear))
    }
    assert sum(part.weight.numel() for part in counted.values()) == small["weights"] == result["kept"]
    assert small["filters"] == {name: len(part.weight) for name, part in counted.items()}
    assert small["removed"]["weights"] == pytest.approx(1 - result["kept"] / result["total"], abs=1e-6)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(torch.zeros(1, 3, 32, 32))
    assert counter.get_total_flops() == small["flops"]
    dense = models.build(network, width=0.0625).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        dense(torch.zeros(1, 3, 32, 32))
    assert small["removed"]["flops"] == pytest.approx(1 - small["flops"] / counter.get_total_flops(), abs=1e-6)
    if network == "vgg16":
        rows = list(small["filters"].values())[:-1]
        assert small["weights"] == weights_of(rows) and small["parameters"] == weights_of(rows) + 3 * sum(rows) + 10
        macs = [9 * a * b * size**2 for (a, b), size in zip(pairwise([3, *rows]), SIZES, strict=True)]
        assert small["flops"] == 2 * (sum(macs) + 10 * rows[-1])
        assert rows == uniform(round(0.4 * TOTAL))
    masked = models.build(network, width=0.0625).eval()
    masked.load_state_dict({k: v for k, v in load_network(folder.best).items() if not k.endswith(".mask")})
    assert command.main([str(folder.path)]) == 0
    assert f"{result['kept']:,} of {result['total']:,} weights" in capsys.readouterr().out
    read = state_dict.read(folder.path / "network.pt")
    batches = data.build(config.dataset, config.training, config.seed)
    with torch.no_grad():
        for images, _ in batches.test:
            assert (masked(images) - plain(images)).abs().max() <= 1e-5
            assert torch.equal(read(images), plain(images))


@pytest.mark.full
def test_a_network_with_large_logits_is_compared_as_exactly(compose, quiet, with_starts):
    """Few epochs of soft filters leave logits of thousands: 1e-5 of them, not of float32's rounding."""
    config = compose("method=sfp", "model=resnet34", "sparsity.target=0.9", "method.filters.coupled=true",
                     "training.epochs=4")  # fmt: skip
    assert run(with_starts(config), "x", quiet)["small"]["difference"] <= 1e-5


# --- compactors ---


def test_compactors_change_no_answer_at_first_and_have_a_recipe_of_their_own(compose, quiet, with_starts, monkeypatch):
    seen = {}

    def look(self, optimizer):
        if seen:
            return
        plain = models.build("vgg16", width=0.0625).eval()
        plain.load_state_dict({k: v for k, v in load_network(dense).items() if not k.endswith(".mask")})
        network, images = self.model.eval(), torch.randn(8, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(network(images), plain(images))
        network.train()
        found = compactors.compactors(network)
        assert len(found) == 13 and all(c.alive.all() for c in found.values())
        rest, own = optimizer.param_groups
        assert {id(p) for p in own["params"]} == {id(c.weight) for c in found.values()}
        assert (own["momentum"], own["weight_decay"]) == (0.99, 0.0) and rest["momentum"] == 0.9
        assert len(rest["params"]) == sum(1 for _ in plain.parameters())
        seen["looked"] = True

    config = with_starts(compose("method=resrep", "sparsity.target=0.6", *COMPACTING))
    dense = run_dir(starts(config).get("parent")).best
    monkeypatch.setattr(Compaction, "begin_step", look)
    run(config, "x", quiet)
    assert seen
    (group,) = load_checkpoint(run_dir(config).last)["optimizer_states"][0]["param_groups"]
    assert len(group["params"]) == sum(1 for _ in models.build("vgg16").parameters())


def test_rows_are_given_up_a_few_more_at_each_look_the_shortest_first(compose, quiet, with_starts, monkeypatch):
    """And never more than must go; a row that is given up follows the penalty alone."""
    counts = []

    def spied(self, most):
        network = self.model
        original(self, most)
        norms = compactors.norms(network)
        given = {name: ~compactor.alive for name, compactor in compactors.compactors(network).items()}
        counts.append(sum(int(rows.sum()) for rows in given.values()))
        asked = round(0.7 * TOTAL)
        left = list(ROWS)
        order = sorted((float(n), layer) for layer, rows in enumerate(norms.values()) for n in rows.sort().values[:-1])
        needed = 0
        while weights_of(left) > asked:
            left[order[needed][1]] -= 1
            needed += 1
        assert counts[-1] == min(3 * len(counts), needed) == min(most, needed)
        longest = max((float(norms[name][rows].max()) for name, rows in given.items() if rows.any()), default=0.0)
        assert all(n >= longest for n, _ in order[counts[-1] :])

    def penalised(network, strength):
        before = {name: c.weight.grad.clone() for name, c in compactors.compactors(network).items()}
        add_penalty(network, strength)
        for name, c in compactors.compactors(network).items():
            pull = 0.5 * c.weight / c.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            wanted = torch.where(c.alive.view(-1, 1, 1, 1), before[name], 0.0) + pull
            assert torch.allclose(c.weight.grad, wanted, atol=1e-7)

    original, add_penalty = Compaction._give_up, compactors.add_penalty
    monkeypatch.setattr(Compaction, "_give_up", spied)
    monkeypatch.setattr("sparse_lab.algorithms.structured.compaction.compactors.add_penalty", penalised)
    rows = ("method.compactors.channels=3", "method.compactors.penalty=0.5", "training.finetune.epochs=12")
    run(with_starts(compose("method=resrep", "sparsity.target=0.3", *COMPACTING, *rows)), "x", quiet)
    assert len(counts) == 24 and counts[0] == 3


@pytest.fixture
def folding(monkeypatch) -> list[float]:
    """Rows that go are set to exactly zero just before compactors are folded; by how much logits move then."""
    moved: list[float] = []

    def spied(self, optimizer):
        network = self.model
        stay = self.selector.best(compactors.norms(network), self.sparsity)
        with torch.no_grad():
            for name, compactor in compactors.compactors(network).items():
                compactor.weight[~stay[name]] = 0.0
        images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        training = network.training
        network.eval()
        with torch.no_grad():
            before = network(images)
            original(self, optimizer)
            moved.append(float((network(images) - before).abs().max()))
        network.train(training)

    original = Compaction._fuse
    monkeypatch.setattr(Compaction, "_fuse", spied)
    return moved


STRONG = (*COMPACTING, "method.compactors.penalty=0.2", "method.compactors.channels=400", "training.finetune.lr=0.05",
          "training.finetune.epochs=12")  # fmt: skip


@pytest.mark.parametrize(
    ("network", "coupled"),
    [
        pytest.param("vgg16", "false", marks=pytest.mark.full),
        pytest.param("resnet34", "false", marks=pytest.mark.full),
        pytest.param("resnet50", "false", marks=pytest.mark.nightly),
        pytest.param("mobilenet_v2", "false", marks=pytest.mark.nightly),
        ("resnet34", "true"),
    ],
)
def test_folding_compactors_away_changes_no_answer(network, coupled, compose, quiet, with_starts, folding):
    """Or the request is refused: a channel that several layers make does not go with one layer's compactor."""
    config = compose(
        "method=resrep", f"model={network}", "sparsity.target=0.5", f"method.filters.coupled={coupled}", *STRONG
    )
    try:
        check(config)
    except UserError:
        assert coupled == "true" or network == "mobilenet_v2"
        return
    result = run(with_starts(config), "x", quiet)
    assert len(folding) == 1 and folding[0] <= 1e-4
    assert result["small"]["difference"] <= 1e-5 and result["kept"] <= round(0.5 * result["total"])
    plain = models.build(network, width=0.0625)
    plain.load_state_dict({k: v for k, v in load_network(run_dir(config).best).items() if not k.endswith(".mask")})


@pytest.mark.every(2)
@pytest.mark.parametrize("method", ["resrep", "l1_filters"])
def test_a_share_of_the_multiply_adds_is_reached_and_not_a_channel_more_goes(method, compose, quiet, with_starts):
    config = compose("method=" + method, "sparsity.target=0.1", "method.filters.flops=0.5", *COMPACTING)
    result = run(with_starts(config), "x", quiet)
    assert result["small"]["removed"]["flops"] >= 0.5
    rows = list(result["small"]["filters"].values())[:-1]

    def macs(rows: list[int]) -> int:
        pairs = zip(pairwise([3, *rows]), SIZES, strict=True)
        return sum(9 * a * b * size**2 for (a, b), size in pairs) + 10 * rows[-1]

    assert macs(rows) <= macs(ROWS) / 2
    more = [[*rows[:i], rows[i] + 1, *rows[i + 1 :]] for i in range(13) if rows[i] < ROWS[i]]
    assert max(macs(one) for one in more) > macs(ROWS) / 2


# --- what must not happen ---


WHOLE = [
    (
        "method=l1_filters",
        "schedule=iterative",
        "schedule.iterative.share=0.4",
        "method.filters.flops=0.9",
        "sparsity.target=0.7",
    ),
    ("method=l1_filters", "schedule=cubic", "schedule.cubic.every=1", *rates_of(HRANK)),
    ("method=sfp", *rates_of(HRANK)),
]
MORE_WHOLE = [
    ("method=resrep", *COMPACTING, "sparsity.target=0.5", "trainer.precision=64-true"),
    (
        "method=l1_filters",
        "schedule=cubic",
        "schedule.cubic.every=1",
        "method.filters.flops=0.9",
        "sparsity.target=0.7",
    ),
    ("method=l1_filters", "schedule=iterative", *rates_of(HRANK)),
    ("method=resrep", *COMPACTING, *rates_of(HRANK)),
    ("method=sfp", "sparsity.target=0.001"),
    ("method=resrep", *COMPACTING, "sparsity.target=0.0", "method.filters.flops=0.5"),
    ("method=resrep", *COMPACTING, "sparsity.target=0.0"),
]


@pytest.mark.parametrize(
    "request_",
    [*WHOLE, *(pytest.param(request_, marks=pytest.mark.full) for request_ in MORE_WHOLE)],
    ids=lambda request_: " ".join(part for part in request_ if "compacting" not in part)[:70],
)
def test_filters_never_come_back_and_the_network_ends_whole(request_, compose, quiet, with_starts):
    """Whatever check lets through ends with whole channels gone, at most as many weights as asked, none reopened."""
    config = compose(*request_, "training.finetune.epochs=4")
    try:
        check(config)
    except UserError:
        return
    result = run(with_starts(config), "x", quiet)
    changes = [row["change"] for row in lines(config)]
    assert "open" not in changes or config.schedule.name == "soft"
    assert is_whole(convs(load_network(run_dir(config).best), "mask"))
    assert result["kept"] <= round((1 - config.sparsity.target) * TOTAL) + 3
    assert result["small"]["weights"] == result["kept"]


def test_multiply_adds_that_cannot_go_are_refused_before_anything_trains(compose):
    with pytest.raises(UserError, match=r"method\.filters\.flops"):
        check(compose("method=l1_filters", "sparsity.target=0.9", "method.filters.flops=0.9999"))


@pytest.fixture
def network(monkeypatch):
    """network("mlp", builder) -> a network that model.name=mlp finds."""

    def add(name, builder):
        module = types.ModuleType(f"sparse_lab.models.{name}")
        setattr(module, name, builder)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(registry._NETWORKS, name, registry.Entry(name, smallest=8, torchvision=name))

    return add


def mlp(spec):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 20), nn.ReLU(), nn.Linear(20, spec.num_classes))


def without_norm(spec):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, spec.num_classes),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "builder", "said"),
    [
        ("l1_filters", mlp, "method l1_filters prunes filters, and mlp has no convolution"),
        ("resrep", mlp, "method resrep prunes filters, and mlp has no convolution"),
        ("resrep", without_norm, "is not followed by a BatchNorm"),
    ],
)
def test_a_network_that_lacks_what_a_method_needs_is_refused(method, builder, said, network, tmp_path, capsys):
    network(builder.__name__, builder)
    request = [f"method={method}", f"model.name={builder.__name__}", "dataset=digits", "sparsity.target=0.5"]
    assert main([*request, "training.finetune.optimizer=sgd", f"paths.outputs={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("status.json"))
