"""The promises that every method of the gallery keeps, one table for all of them. A new method is a line here."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Iterator
from functools import partial
from itertools import pairwise, product

import numpy as np
import pytest
import torch

from sparse_lab import models, stages
from sparse_lab.callbacks.diverged import StopWhenDiverged
from sparse_lab.callbacks.keep_masks import KeepMasks
from sparse_lab.callbacks.save_last import SaveLast
from sparse_lab.models import offsets
from sparse_lab.models.offsets import folded
from sparse_lab.models.surgery import match
from sparse_lab.record import RunFolder
from sparse_lab.run import run
from sparse_lab.training.files import load, load_network
from sparse_lab.training.stop import Stopped

OFTEN = ("method.rewire.every=2",)
EAST = ("model=resnet34", *OFTEN, "method.cycles.every=1", "method.cycles.lengths=[0.3,0.3]")
# SGD, for compactors have a momentum; rows are given up from the first step on
COMPACTING = ("method.compacting.begin=0", "method.compacting.every=1", "training.finetune.optimizer=sgd")
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
    "east": EAST,
    "snip": (),
    "grasp": (),
    "synflow": ("method.prune.iterations=5",),
    "random_at_init": (),
    "magnitude_at_init": (),
    "gmp": ("schedule.every=1",),
    "lamp_oneshot": (),
    "lamp_iterative": (),
    "lth": ("schedule.round_epochs=2",),
    "lrr": ("schedule.round_epochs=2",),
    "mest": ("method.rewire.every=1",),
    "mest_soft": ("method.rewire.every=1",),
    "granet": ("method.rewire.every=1",),
    "dctps": (),
    "dctps_rigl": OFTEN,
    "acdc": ("schedule.turn=0.1",),
    "l1_filters": (),
    "hrank": (),
    "sfp": (),
    "resrep": COMPACTING,
    "prune_on_the_fly": ("method.sphere.every=1",),
}
# whole filters go: at most as many weights stay as were asked for, and one channel more would pass that
FILTERS = {"l1_filters", "hrank", "sfp", "resrep"}
# a dense part stands beside the sparse weights, so the plain network that equals theirs is the folded one
OFFSETS = {"dctps", "dctps_rigl", "prune_on_the_fly"}
# those of which `make test` sees that they go on after a signal; `make test-all` does the others
STOPPED = ("dense", "iterative_regrow", "east", "resrep", "prune_on_the_fly")
COMMON = ("sparsity.target=0.9", "method.regrow.budget=0.03", "schedule.share=0.6")
SIX_EPOCHS = ("training.epochs=6", "training.finetune.epochs=6", "training.regrow.epochs=6")


def test_every_method_of_the_gallery_is_in_the_table():
    from sparse_lab.gallery import methods

    assert {row["name"] for row in methods()} == set(METHODS)


@pytest.fixture
def watched(monkeypatch) -> list[int]:
    """Looks at the network after everything that follows an optimizer step; one entry a step."""
    steps: list[int] = []

    def look(optimizer, masks) -> None:
        for name, module in masks.layers.items():
            mask = masks[name]
            assert mask.any(), f"{name} is empty"
            assert not module.weight[~mask].any(), name
            same_shape = [v for v in optimizer.state[module.weight].values() if v.shape == mask.shape]
            assert same_shape, "this optimizer keeps no state of the weight's shape"
            assert not any(value[~mask].any() for value in same_shape), name
        steps.append(1)

    def last_of_all(self, trainer, module) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, KeepMasks):
                trainer.optimizers[0].register_step_post_hook(partial(after, callback.masks))

    def after(masks, optimizer, *_) -> None:
        look(optimizer, masks)

    monkeypatch.setattr(SaveLast, "on_fit_start", last_of_all)
    return steps


@pytest.mark.parametrize("method", METHODS)
def test_each_method_keeps_its_promises(method, compose, quiet, watched):
    """Trains; exact count; zeros outside the masks after every step; no layer emptied; loads into a plain network."""
    config = compose(f"method={method}", *COMMON, *SIX_EPOCHS, *METHODS[method])
    result = run(config, "test", quiet)
    state = load_network(RunFolder(config).best)
    masks = {name: value.numpy() for name, value in state.items() if name.endswith(".mask")}
    kept = sum(int(np.count_nonzero(mask)) for mask in masks.values())
    if method == "dense":
        assert result["kept"] == result["total"] and not masks and result["sparsity_target"] == 0
    else:
        assert watched
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
    losses = [float(row["train_loss"]) for row in metrics(config)]
    assert min(losses[1:]) < losses[0]


def with_a_channel_more(masks: dict[str, np.ndarray]) -> int:
    """Weights of VGG16, a chain of layers, if the filters of the layer where that costs most were one more."""
    rows = [3, *(int(mask.any((1, 2, 3)).sum()) for name, mask in masks.items() if "features" in name), 10]

    def weights(rows: list[int]) -> int:
        return sum(below * above * 9 for below, above in pairwise(rows[:-1])) + rows[-2] * rows[-1]

    assert weights(rows) == sum(int(np.count_nonzero(mask)) for mask in masks.values())
    return max(weights([*rows[:i], rows[i] + 1, *rows[i + 1 :]]) for i in range(1, len(rows) - 1))


def check_the_plain_network_of(state: dict[str, torch.Tensor], plain: torch.nn.Module) -> None:
    """`state` holds offsets: it loads once `plain` follows it, and what is folded is sparse weights plus offsets."""
    match(plain, state)
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


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_died_goes_on_to_the_same_bits(method, compose, quiet, tmp_path, monkeypatch):
    check_an_interrupted_run(die, (f"method={method}", *METHODS[method]), 5, compose, quiet, tmp_path, monkeypatch)


@pytest.mark.parametrize("method", STOPPED)
def test_a_run_that_was_asked_to_stop_goes_on_to_the_same_bits(method, compose, quiet, tmp_path, monkeypatch):
    check_a_stopped_run(method, compose, quiet, tmp_path, monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize("method", sorted(METHODS.keys() - set(STOPPED)))
def test_every_other_run_that_was_asked_to_stop_goes_on(method, compose, quiet, tmp_path, monkeypatch):
    check_a_stopped_run(method, compose, quiet, tmp_path, monkeypatch)


def check_a_stopped_run(method, compose, quiet, tmp_path, monkeypatch) -> None:
    """Stopped in the middle of an epoch, and saved there."""
    overrides = (f"method={method}", *METHODS[method], "diagnostics.gradients=true", "trainer.progress=true")
    checkpoint = check_an_interrupted_run(preempt, overrides, 5, compose, quiet, tmp_path, monkeypatch)
    assert checkpoint["global_step"] == 5


@pytest.mark.parametrize(("phase", "step"), [("before", 3), ("during", 7), ("after", 9)])
def test_east_goes_on_from_every_phase_of_dyrelu(phase, step, compose, quiet, tmp_path, monkeypatch):
    """Two steps an epoch: the checkpoints are those of steps 2, 6 and 8; DyReLU fades from step 3 to step 7."""
    phasing = ("method.phasing.unit=epochs", "method.phasing.begin=1.5", "method.phasing.end=3.5")
    overrides = ("method=east", *EAST, *phasing)
    checkpoint = check_an_interrupted_run(die, overrides, step, compose, quiet, tmp_path, monkeypatch)
    assert checkpoint["global_step"] == step - 1
    betas = [float(value) for name, value in checkpoint["state_dict"].items() if name.endswith(".beta")]
    # as the last step before the checkpoint had it, step 1 or step 5
    assert betas == {"before": [1.0] * 33, "during": [0.5] * 33, "after": []}[phase]
    scales = [name for name in checkpoint["state_dict"] if name.endswith(".scale")]
    assert len(scales) == 16


def die() -> None:
    raise RuntimeError("pulled the plug")


def preempt() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def check_an_interrupted_run(how, overrides, step, compose, quiet, tmp_path, monkeypatch) -> dict:
    """The same run twice, once interrupted after `step` steps; all that they leave must be equal. Returns the
    checkpoint that the second one went on from.
    """
    whole, broken = (
        compose(*overrides, *COMMON, *SIX_EPOCHS, f"paths.outputs={tmp_path / name}") for name in ("whole", "broken")
    )
    run(whole, "x", quiet)
    parent = stages.parent(broken)
    if parent is not None:
        run(parent, "x", quiet)

    def interrupt(self, trainer, *rest):
        if trainer.global_step == step:
            how()

    with monkeypatch.context() as patch:
        patch.setattr(StopWhenDiverged, "on_train_batch_end", interrupt)
        with pytest.raises(RuntimeError if how is die else Stopped) as caught:
            run(broken, "x", quiet)
    status = json.loads((RunFolder(broken).path / "status.json").read_text())
    if how is die:
        assert status["state"] == "failed" and "pulled the plug" in status["error"]
    else:
        assert status["state"] == "interrupted" and f"SIGTERM: saved at step {step};" in status["error"]
        assert caught.value.status == 143
    checkpoint = load(RunFolder(broken).last)
    run(broken, "x", quiet)
    first, second = (load_network(RunFolder(config).best) for config in (whole, broken))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    parts = ("state_dict", "optimizer_states", "random_state")
    first, second = (
        dict(tensors({key: load(RunFolder(config).last)[key] for key in parts})) for config in (whole, broken)
    )
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    for name in ("metrics.csv", "updates.jsonl", "gradients.jsonl"):
        paths = [RunFolder(config).path / name for config in (whole, broken)]
        assert paths[0].exists() == paths[1].exists()
        assert not paths[0].exists() or paths[0].read_bytes() == paths[1].read_bytes()
    return checkpoint


def tensors(part, path="") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a nested checkpoint, by its path."""
    if isinstance(part, torch.Tensor):
        yield path, part
    elif isinstance(part, (dict, list)):
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            yield from tensors(value, f"{path}/{key}")


def metrics(config) -> list[dict[str, str]]:
    with open(RunFolder(config).path / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("on", list(product((True, False), repeat=3)), ids=lambda on: "-".join(map(str, on)))
def test_all_eight_ablations_of_east_run(on, compose, quiet, watched):
    dyrelu, sharing, cyclic = on
    switches = [
        f"method.{name}={str(value).lower()}" for name, value in zip(("dyrelu", "sharing", "cyclic"), on, strict=True)
    ]
    config = compose("method=east", *EAST, *switches, *COMMON, "training.epochs=4", "diagnostics.activations=true")
    result = run(config, "x", quiet)
    assert len(watched) == 8
    assert result["total"] == 83_468 and result["kept"] == 8_347
    assert (result["unique"] < result["total"]) is sharing and (result["kept_with_reuse"] is not None) is sharing
    changes = [row["change"] for row in lines(config, "updates")]
    assert changes[0] == "prune" and changes[-1] == "rewire" and ("cycle" in changes) is cyclic
    betas = [row["beta"] for row in lines(config, "activations")]
    assert betas == ([1.0, 0.5, 0.0, 0.0] if dyrelu else [None] * 4)
    assert not any(".reduce." in name or ".scale" in name for name in load_network(RunFolder(config).best))


def lines(config, name) -> list[dict]:
    return [json.loads(line) for line in (RunFolder(config).path / f"{name}.jsonl").read_text().splitlines()]
