"""The promises that every method of the gallery keeps, one table for all of them. A new method is a line here."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch

from sparse_lab import models
from sparse_lab.experiment.identity import run_dir
from sparse_lab.experiment.runner import run
from sparse_lab.models import offsets
from sparse_lab.models.offsets import folded
from sparse_lab.models.surgery import rebuild_structure
from sparse_lab.training.checkpoint_io import load_network
from tests.runs.promises import End, check_report, die, stop

OFTEN = ("method.drop_and_grow.update_every=2",)
CYCLES = ("method.cycles.every=1", "method.cycles.lengths=[0.3,0.3]")
EAST = ("model=resnet34", *OFTEN, *CYCLES)
PHASING = ("method.dyrelu.unit=epochs", "method.dyrelu.begin=1.5", "method.dyrelu.end=3.5")
# SGD, for compactors have a momentum; rows are given up from the first step on
COMPACTING = ("method.compactors.begin=0", "method.compactors.every=1", "training.finetune.optimizer=sgd")
METHODS: dict[str, tuple[str, ...]] = {
    "dense": (),
    "oneshot": (),
    "iterative": (),
    "oneshot_regrow": (),
    "iterative_regrow": (),
    "oneshot_random_regrow": (),
    "iterative_random_regrow": (),
    "oneshot_extra": (),
    "iterative_extra": (),
    "oneshot_long": (),
    "iterative_long": (),
    "static": (),
    "set": OFTEN,
    "rigl": OFTEN,
    "set_itop": OFTEN,
    "rigl_itop": OFTEN,
    "east": (*EAST, *PHASING),
    "snip": (),
    "grasp": (),
    "synflow": ("method.prune.iterations=5",),
    "random_at_init": (),
    "magnitude_at_init": (),
    "gmp": ("schedule.cubic.every=1",),
    "lth": ("schedule.iterative.round_epochs=2",),
    "lrr": ("schedule.iterative.round_epochs=2",),
    "mest": ("method.elastic_mutation.update_every=1",),
    "mest_soft": ("method.elastic_mutation.update_every=1",),
    "granet": ("method.drop_and_grow.update_every=1",),
    "dctps": (),
    "dctps_rigl": OFTEN,
    "acdc": ("schedule.alternating.turn=0.1",),
    "l1_filters": (),
    "hrank": (),
    "sfp": (),
    "resrep": COMPACTING,
    "prune_on_the_fly": ("method.hypersphere.every=1",),
}
# whole filters go: at most as many weights stay as were asked for, and one channel more would pass that
FILTERS = {"l1_filters", "hrank", "sfp", "resrep"}
# a dense part stands beside the sparse weights, so the plain network that equals theirs is the folded one
OFFSETS = {"dctps", "dctps_rigl", "prune_on_the_fly"}
COMMON = ("sparsity.target=0.9", "method.regrow.budget=0.03", "schedule.iterative.share=0.6")
# what `make test` trains: of each way to change masks one. The others: `make test-all`
FAMILIES = {
    "iterative_regrow",
    "east",
    "gmp",
    "lth",
    "granet",
    "dctps_rigl",
    "acdc",
    "sfp",
    "resrep",
}
# six epochs hold three rounds of two, and all that EAST does
LONG = {name for name in METHODS if name.startswith("iterative")} | {"lth", "lrr", "east"}
LONG |= {name for name in METHODS if name.endswith(("_extra", "_long"))}  # the loss falls slowly where little is left


def length(method: str) -> tuple[str, ...]:
    """In all rounds together; an epoch has two steps."""
    epochs = 6 if method in LONG else 4
    return (f"training.epochs={epochs}", f"training.finetune.epochs={epochs}", f"training.regrow.epochs={epochs}")


def test_every_method_of_the_gallery_is_in_the_table():
    from sparse_lab.cli.methods import methods

    assert {row["name"] for row in methods()} == set(METHODS)


@pytest.fixture
def pair(compose, with_starts, tmp_path) -> Callable[..., list]:
    """pair(method, ...) -> the same run twice, in two folders; what it starts from lies there, finished."""

    def make(method: str, *overrides: str) -> list:
        words = (f"method={method}", *COMMON, *length(method), *METHODS[method], "diagnostics.gradients=true")
        config = compose(*words, *overrides)
        outputs = (str(tmp_path / name) for name in ("whole", "broken"))
        return [with_starts(replace(config, paths=replace(config.paths, outputs=folder))) for folder in outputs]

    return make


# each of these differs from another in a score, a length or a draw: they are interrupted by night alone
ALIKE = {name for name in METHODS if name.endswith(("_random_regrow", "_extra", "_long", "_at_init"))}
ALIKE |= {"oneshot", "iterative", "set_itop", "snip", "grasp"}


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name in FAMILIES else pytest.mark.full) for name in METHODS]
)
def test_each_method_keeps_its_promises(method, pair, quiet, watched, check_interrupted):
    """Trained once: exact count; zeros outside the masks after every step; no layer emptied; loads into a plain
    network; can be reported. Trained once more, stopped within an epoch and killed within another: the same bits.
    """
    whole, broken = pair(method)
    watched.clear()
    result = run(whole, "test", quiet)
    steps = dict(watched)
    assert sorted(steps) == list(range(1, 13 if method in LONG else 9))
    check_masks_and_network(method, whole, result)
    losses = [float(row["train_loss"]) for row in metrics(whole)]
    assert min(losses[1:]) < losses[0]
    check_report(whole, result)
    if method == "east":
        check_phases(check_interrupted(broken, [End(die, 3), End(stop, 5), End(die, 9)], whole, steps))
    elif method not in ALIKE:
        check_interrupted(broken, [End(stop, 3), End(die, 5)], whole, steps)


def check_phases(checkpoints: list[dict]) -> None:
    """EAST was interrupted before DyReLU faded (steps 3 to 7), while it did and after it; as the last step had it."""
    assert [checkpoint["global_step"] for checkpoint in checkpoints] == [2, 5, 8]
    for checkpoint, wanted in zip(checkpoints, ([1.0] * 33, [0.75] * 33, []), strict=True):
        assert [float(value) for name, value in checkpoint["state_dict"].items() if name.endswith(".beta")] == wanted
        assert len([name for name in checkpoint["state_dict"] if name.endswith(".scale")]) == 16


def check_masks_and_network(method, config, result) -> None:
    state = load_network(run_dir(config).best)
    masks = {name: value.numpy() for name, value in state.items() if name.endswith(".mask")}
    kept = sum(int(np.count_nonzero(mask)) for mask in masks.values())
    if method == "dense":
        assert result["kept"] == result["total"] and not masks and result["sparsity_target"] == 0
    else:
        wanted = 0.93 if method.endswith("_extra") else 0.9
        asked = round((1 - wanted) * result["total"])
        if method in FILTERS:
            assert result["kept"] <= asked < with_a_channel_more(masks)
        else:
            assert result["kept"] == asked
        assert kept == (result["kept_with_reuse"] if method == "east" else result["kept"])
        for name, mask in masks.items():
            assert mask.any() and not state[name.removesuffix("mask") + "weight"].numpy()[~mask].any(), name
    plain = models.build(config.model.name, width=0.0625)
    if method in OFFSETS:
        check_the_plain_network_of(state, plain)
    else:
        plain.load_state_dict({name: value for name, value in state.items() if not name.endswith("mask")})


def with_a_channel_more(masks: dict[str, np.ndarray]) -> int:
    """Weights of VGG16, a chain of layers, if the filters of the layer where that costs most were one more."""
    rows = [3, *(int(mask.any((1, 2, 3)).sum()) for name, mask in masks.items() if "features" in name), 10]

    def weights(rows: list[int]) -> int:
        return sum(below * above * 9 for below, above in pairwise(rows[:-1])) + rows[-2] * rows[-1]

    assert weights(rows) == sum(int(np.count_nonzero(mask)) for mask in masks.values())
    return max(weights([*rows[:i], rows[i] + 1, *rows[i + 1 :]]) for i in range(1, len(rows) - 1))


def check_the_plain_network_of(state: dict[str, torch.Tensor], plain: torch.nn.Module) -> None:
    """`state` holds offsets: it loads once `plain` follows it, and what is folded is sparse weights plus offsets."""
    rebuild_structure(plain, state)
    wrong = plain.load_state_dict(state, strict=False)
    assert not wrong.missing_keys and all(name.endswith(".mask") for name in wrong.unexpected_keys)
    flat = folded(plain).eval()
    assert {type(module) for module in flat.modules()}.isdisjoint(offsets.PLAIN)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(flat(images), plain.eval()(images), atol=1e-5)
    for name, module in flat.named_modules():
        if not isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            continue
        weight, mask = state[f"{name}.weight"], state[f"{name}.mask"]
        if f"{name}.mean" in state:
            mean = state[f"{name}.mean"].view(-1, *(1,) * (weight.dim() - 1)).expand_as(weight)
            wanted = torch.where(mask, weight, mean)
        else:
            wanted = weight + state[f"{name}.alpha"] * plain.get_submodule(name).basis
        assert torch.allclose(module.weight, wanted, atol=1e-7) and not hasattr(module, "mask"), name


@pytest.mark.nightly
@pytest.mark.parametrize("method", METHODS)
def test_each_method_goes_on_from_other_moments(method, pair, quiet, watched, check_interrupted):
    """Stopped within the third epoch, killed at its end, before it is saved; stopped before the very last step and
    killed in it. With a bar of its progress.
    """
    whole, broken = pair(method, "trainer.progress=true")
    watched.clear()
    run(whole, "x", quiet)
    steps = dict(watched)
    ends = [End(stop, 5), End(die, 6), End(stop, max(steps) - 1), End(die, max(steps))]
    check_interrupted(broken, ends, whole, steps)


def metrics(config) -> list[dict[str, str]]:
    with open(run_dir(config).path / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# each switch on and off; all three are on in `test_each_method_keeps_its_promises`, the others are for `make test-all`
FAST = {(True, False, True), (False, True, False)}


@pytest.mark.parametrize(
    "on",
    [pytest.param(on, marks=[] if on in FAST else pytest.mark.full) for on in product((True, False), repeat=3)],
    ids=lambda on: "-".join(map(str, on)),
)
def test_all_eight_ablations_of_east_run(on, compose, quiet, watched):
    dyrelu, sharing, cyclic = on
    switches = [
        f"method.{name}=null" for name, there in zip(("dyrelu", "sharing", "cycles"), on, strict=True) if not there
    ]
    config = compose("method=east", *EAST, *switches, *COMMON, "training.epochs=4", "diagnostics.activations=true")
    result = run(config, "x", quiet)
    assert len(watched) == 8
    assert result["total"] == 83_468 and result["kept"] == 8_347
    assert (result["unique"] < result["total"]) is sharing and (result["kept_with_reuse"] is not None) is sharing
    changes = [row["change"] for row in lines(config, "updates")]
    assert changes[0] == "prune" and changes[-1] == "drop_and_grow" and ("cycle" in changes) is cyclic
    betas = [row["beta"] for row in lines(config, "activations")]
    assert betas == ([1.0, 0.5, 0.0, 0.0] if dyrelu else [None] * 4)
    assert not any(".reduce." in name or ".scale" in name for name in load_network(run_dir(config).best))


def lines(config, name) -> list[dict]:
    return [json.loads(line) for line in (run_dir(config).path / f"{name}.jsonl").read_text().splitlines()]
