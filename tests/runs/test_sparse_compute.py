"""compute=sparse inside of runs: the masks and weights of compute=dense, for every method; exact resume; refusals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from sparse_lab import models
from sparse_lab.callbacks.checkpoint import Checkpoint
from sparse_lab.callbacks.nan_guard import NanGuard
from sparse_lab.errors import UserError
from sparse_lab.experiment import backend
from sparse_lab.experiment.identity import run_dir, run_name
from sparse_lab.experiment.runner import run
from sparse_lab.experiment.validate import check, check_request
from sparse_lab.methods.table import starts
from sparse_lab.registering import REGISTERED, take_out
from sparse_lab.sparse_cpu.optimizer import LiveOptimizer
from sparse_lab.sparsity.masks import Masks
from sparse_lab.sweep.plan import Request
from sparse_lab.training import clipping
from sparse_lab.training.checkpoint_io import load_checkpoint, load_network

OFTEN = ("method.drop_and_grow.update_every=2",)
# density moves across the quarter from which on torch computes
CYCLES = ("method.cycles.every=1", "method.cycles.lengths=[0.3,0.3]", "method.cycles.multiplier=2")
# without a warm-up: with one, channels lose their last weight before the end (see COMMON)
EAST = ("model=resnet34", "sparsity.target=0.9", "training.warmup=0", *OFTEN, *CYCLES)
METHODS: dict[str, tuple[str, ...]] = {
    "static": (),
    "set": OFTEN,
    "set_itop": OFTEN,
    "rigl": OFTEN,
    "rigl_itop": OFTEN,
    "east": EAST,
    "snip": (),
    "grasp": (),
    "synflow": ("method.prune.iterations=5",),
    "random_at_init": (),
    "magnitude_at_init": (),
    "mest": ("method.elastic_mutation.update_every=1",),
    "mest_soft": ("method.elastic_mutation.update_every=1",),
    "granet": ("method.drop_and_grow.update_every=1",),
    "gmp": ("schedule.cubic.every=1",),
    "acdc": ("schedule.alternating.turn=0.1",),
    "oneshot": (),
    "iterative": (),
    "lth": ("schedule.iterative.round_epochs=2",),
    "lrr": ("schedule.iterative.round_epochs=2",),
    "oneshot_regrow": (),
    "iterative_regrow": (),
}
# sparse arithmetic knows nothing of a method but how its masks come and change: one that exchanges weights at every
# step that it may. `make test-all` does the others
FAST = {"rigl"}
# fewer weights would leave channels without any: BatchNorm blows up the rounding of their constant maps, layer by layer
COMMON = (
    "sparsity.target=0.8",
    "method.regrow.budget=0.02",
    "schedule.iterative.share=0.6",
    "training.epochs=4",
    "training.finetune.epochs=4",
    "training.regrow.epochs=4",
)
EXACT = "trainer.precision=64-true"


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name in FAST else pytest.mark.full) for name in METHODS]
)
def test_every_method_ends_with_the_masks_and_weights_of_dense_arithmetic(method, compose, quiet, with_starts):
    dense = with_starts(compose(f"method={method}", *COMMON, *METHODS[method], EXACT, "diagnostics.gradients=true"))
    sparse = replace(dense, compute="sparse")
    records = [run(config, "x", quiet) for config in (dense, sparse)]
    assert [record["compute"] for record in records] == ["dense", "sparse"]
    if dense.method.init_from == "dense":
        assert records[0]["start"] == records[1]["start"]
    first, second = (load_network(run_dir(config).best) for config in (dense, sparse))
    same(first, second)
    optimizers = [load_checkpoint(run_dir(config).last)["optimizer_states"][0]["state"] for config in (dense, sparse)]
    assert [state.keys() for state in optimizers[0].values()] == [state.keys() for state in optimizers[1].values()]
    same(*(dict(tensors(state)) for state in optimizers))
    assert records[0]["explored"] == records[1]["explored"]


@pytest.mark.full
def test_gradients_of_several_batches_add_up_as_in_dense_arithmetic(compose, quiet):
    """RigL reads those of pruned weights, of every batch of a step; clipping measures their sum."""
    words = ("method=rigl", "training.accumulate=2", "training.clip_norm=0.05", "dataset.train_limit=48")
    dense = compose(*COMMON, *OFTEN, *words, EXACT)
    sparse = replace(dense, compute="sparse")
    for config in (dense, sparse):
        run(config, "x", quiet)
    same(*(load_network(run_dir(config).best) for config in (dense, sparse)))


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Masks to the last position, numbers to 1e-6 of the largest.

    The gradients of biases in front of BatchNorm are rounding alone, which Adam blows up to some 1e-9.
    """
    assert first.keys() == second.keys()
    for name, value in first.items():
        if value.dtype == torch.bool:
            assert torch.equal(value, second[name]), name
        else:
            error = (value.double() - second[name].double()).abs().max()
            assert error <= 1e-6 * value.double().abs().max() + 1e-8, (name, float(error))


def tensors(part, path="") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(part, torch.Tensor):
        yield path, part
    elif isinstance(part, dict):
        for key, value in part.items():
            yield from tensors(value, f"{path}/{key}")


@pytest.mark.parametrize(
    ("over", "gradients"),
    [
        ("all", "after_clipping"),
        ("all_estimated", "after_clipping"),
        pytest.param("live", "before_clipping", marks=pytest.mark.full),
        pytest.param("all", "before_clipping", marks=pytest.mark.full),
        pytest.param("live", "after_clipping", marks=pytest.mark.full),
    ],
)
def test_clipping_is_that_of_dense_arithmetic(over, gradients, compose, quiet):
    """A norm so small that every step is clipped; MEST's score reads the gradients before it or after it."""
    clipped = (
        "training.clip_norm=0.05",
        f"training.clip_over={over}",
        f"method.elastic_mutation.gradients={gradients}",
    )
    often = f"method.elastic_mutation.update_every={3 if over == 'all_estimated' else 1}"
    dense = compose("method=mest", often, *COMMON, *clipped, EXACT)
    sparse = replace(dense, compute="sparse")
    for config in (dense, sparse):
        run(config, "x", quiet)
    same(*(load_network(run_dir(config).best) for config in (dense, sparse)))
    other = replace(dense, training=replace(dense.training, clip_over="live" if over == "all" else "all"))
    assert run_name(other) != run_name(dense)


def test_an_estimate_measured_in_every_step_is_the_norm_itself(compose, quiet, monkeypatch):
    """The very bits of a run that clips over all positions."""
    words = (*COMMON, "method=rigl", "method.drop_and_grow.update_every=3", "training.clip_norm=0.05", "compute=sparse")
    exact, estimated = compose(*words), compose(*words, "training.clip_over=all_estimated")
    run(exact, "x", quiet)
    monkeypatch.setattr(clipping, "MEASURE_EVERY", 1)
    run(estimated, "x", quiet)
    first, second = (load_network(run_dir(config).best) for config in (exact, estimated))
    assert run_name(exact) != run_name(estimated) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("asked", "steps"),
    [
        (("method=rigl", "method.drop_and_grow.update_every=2"), [1, 3]),
        (("method=set", "method.drop_and_grow.update_every=2"), []),
        (("method=static", "training.epochs=2"), []),
        (("method=static", "training.epochs=2", "training.clip_norm=1"), list(range(4))),
        (("method=static", "training.epochs=2", "training.clip_norm=1", "training.clip_over=live"), []),
        (("method=static", "training.epochs=2", "training.clip_norm=1", "training.clip_over=all_estimated"), [0]),
    ],
)
def test_dense_gradients_are_computed_in_the_steps_that_need_them_alone(asked, steps, compose, quiet, monkeypatch):
    seen: list[bool] = []

    def watch(optimizer, *_):
        weights = list(optimizer.live)
        assert optimizer.stepped == set(weights)
        seen.append(all(weight.grad is not None for weight in weights))
        assert seen[-1] or all(weight.grad is None for weight in weights)

    monkeypatch.setattr(
        Checkpoint, "on_fit_start", lambda self, trainer, *_: trainer.optimizers[0].register_step_post_hook(watch)
    )
    run(compose(*COMMON, *asked, "compute=sparse"), "x", quiet)
    assert [number for number, dense in enumerate(seen) if dense] == steps


def test_masks_are_enforced_where_they_must_be_alone(compose, quiet, monkeypatch):
    """Whole weights are multiplied by masks where a mask has changed, before the first step; not in every step."""
    multiplied: list[int] = []
    foreach = torch._foreach_mul_
    monkeypatch.setattr(
        torch, "_foreach_mul_", lambda values, by: (multiplied.append(len(values)), foreach(values, by))
    )
    enforced: list[int] = []
    enforce = Masks.enforce

    def count(self, *args, **kwargs):
        before = len(multiplied)
        enforce(self, *args, **kwargs)
        if args and isinstance(args[0], LiveOptimizer):
            enforced.append(len(multiplied) - before)

    monkeypatch.setattr(Masks, "enforce", count)
    run(compose("method=static", *COMMON, "training.epochs=2", "compute=sparse"), "x", quiet)
    assert enforced == [1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "method", ["rigl", *(pytest.param(name, marks=pytest.mark.full) for name in ("east", "iterative_regrow"))]
)
def test_a_run_that_died_twice_goes_on_to_the_same_bits(method, compose, quiet, with_starts, tmp_path, monkeypatch):
    """Two steps an epoch: after a whole epoch, before it is saved, and then within the next one."""
    config = compose(f"method={method}", *COMMON, *METHODS[method], "compute=sparse", "diagnostics.gradients=true")
    whole, broken = (
        with_starts(replace(config, paths=replace(config.paths, outputs=str(tmp_path / name))))
        for name in ("whole", "broken")
    )
    run(whole, "x", quiet)
    for step in (4, 5):

        def die(self, trainer, *rest, step=step):
            if trainer.global_step == step:
                raise RuntimeError("pulled the plug")

        with monkeypatch.context() as patch:
            patch.setattr(NanGuard, "on_train_batch_end", die)
            with pytest.raises(RuntimeError, match="pulled the plug"):
                run(broken, "x", quiet)
        assert load_checkpoint(run_dir(broken).last)["global_step"] == {4: 2, 5: 4}[step]
        if step == 5:  # the checkpoint of step 4 is of after the first death
            assert_same_rows(whole, broken, epochs=2)
    run(broken, "x", quiet)
    for read in (lambda config: load_network(run_dir(config).best), state_of):
        first, second = (read(config) for config in (whole, broken))
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for name in ("metrics.csv", "updates.jsonl", "gradients.jsonl"):
        first, second = (run_dir(config).path / name for config in (whole, broken))
        assert first.exists() == second.exists() and (not first.exists() or first.read_bytes() == second.read_bytes())


def assert_same_rows(whole, broken, epochs: int) -> None:
    """So far: one row an epoch, below a line of names."""
    first, second = ((run_dir(config).path / "metrics.csv").read_text().splitlines() for config in (whole, broken))
    assert first[: epochs + 1] == second[: epochs + 1], "wrong since the first death"


def state_of(config) -> dict[str, torch.Tensor]:
    last = load_checkpoint(run_dir(config).last)
    return dict(tensors({"network": last["state_dict"], "optimizer": dict(enumerate(last["optimizer_states"]))}))


def test_dense_and_sparse_runs_have_folders_of_their_own_and_share_their_dense_start(compose):
    dense, sparse = (compose("method=oneshot", f"compute={compute}") for compute in ("dense", "sparse"))
    assert run_name(dense) == run_name(compose("method=oneshot")) != run_name(sparse)
    assert run_name(starts(dense).get("parent")) == run_name(starts(sparse).get("parent"))
    assert run_name(compose("method=dense", "compute=sparse")) == run_name(compose("method=dense"))


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        (("method=dense",), "vgg16-cifar10-dense-seed1-32a8108d13"),
        (("method=rigl", "model=resnet34", "training=east"), "resnet34-cifar10-rigl-99-seed1-93b2f9f186"),
        (("method=acdc",), "vgg16-cifar10-acdc-99-seed1-3dbd956936"),
    ],
)
def test_runs_keep_the_names_that_they_have(asked, name):
    """Those of 0.2: whoever upgrades finds their runs again."""
    config = Request.read([]).compose(list(asked)).config()
    assert run_name(config) == name == run_name(replace(config, training=replace(config.training, clip_over="all")))
    live = replace(config, training=replace(config.training, clip_over="live"))
    clips = config.training.clip_norm is not None  # what nothing reads is in no name
    assert (run_name(live) != name) == clips == (config.method.name == "rigl")


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (("trainer.accelerator=gpu",), "trainer.accelerator=gpu: use trainer=cpu, or compute=dense"),
        (("trainer.devices=2",), "use trainer.devices=1"),
        (("trainer.precision=16-mixed",), "use trainer.precision=32-true"),
        (("method=dctps",), "method dctps adds a dense matrix"),
        (("method=sfp",), "trains dense up to its last step"),
        (("method=resrep", "training.finetune.optimizer=sgd"), "trains dense up to its last step"),
        (("method=prune_on_the_fly",), "trains dense up to its last step"),
    ],
)
def test_what_cannot_be_computed_sparsely_is_refused_in_one_line(asked, line, compose):
    config = compose("method=static", *asked, "compute=sparse")
    with pytest.raises(UserError, match=line) as caught:
        check_request(config)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("compute=sparse: ")
    check_request(compose("method=static", *asked))
    assert backend.choose(compose("method=static", *asked, "compute=auto")).compute == "dense"


def test_a_gpu_that_would_be_taken_is_refused(compose, monkeypatch):
    config = compose("method=static", "trainer.accelerator=auto", "compute=sparse")
    check(config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "GPU_FILES", ("null",))  # every machine has this device
    with pytest.raises(UserError, match="trainer=auto would take the GPU here: use trainer=cpu, or compute=dense"):
        check(config)
    check(replace(config, compute="auto"))


def test_an_unknown_arithmetic_names_the_known_ones(compose):
    with pytest.raises(UserError, match=r"compute=quick: .*auto, dense, sparse"):
        check_request(compose("compute=quick"))


@pytest.fixture
def vit():
    """timm's ViT, small, as a network of one's own."""
    timm = pytest.importorskip("timm")

    @models.register_model
    def small_vit(num_classes, width, image_size):
        return timm.create_model(
            "vit_tiny_patch16_224", num_classes=num_classes, img_size=image_size, patch_size=8, depth=2, embed_dim=48
        )

    yield small_vit.__name__
    take_out([REGISTERED[-1]])


def test_rigl_on_a_transformer_ends_as_in_dense_arithmetic(vit, compose, quiet):
    words = (*COMMON, "method=rigl", *OFTEN, EXACT, "training.epochs=2")
    dense = compose(*words)
    dense = replace(dense, model=replace(dense.model, name=vit))
    sparse = replace(dense, compute="sparse")
    records = [run(config, "x", quiet) for config in (dense, sparse)]
    assert [record["compute"] for record in records] == ["dense", "sparse"]
    same(*(load_network(run_dir(config).best) for config in (dense, sparse)))
    assert records[0]["explored"] == records[1]["explored"] and records[0]["explored"] > 0
