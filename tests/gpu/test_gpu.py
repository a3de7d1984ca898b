"""On a GPU: `pytest -m gpu`. The same batches, the same step compiled or not, masks that hold, no waiting in a step."""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from rich.console import Console

from sparse_lab import data, models
from sparse_lab.config import Config
from sparse_lab.experiment import runner as room
from sparse_lab.experiment.identity import run_dir
from sparse_lab.experiment.runner import run
from sparse_lab.sparsity.topk import top_k
from sparse_lab.sweep.plan import Request
from sparse_lab.training.checkpoint_io import load_network
from sparse_lab.training.device import device_of, layout_of
from sparse_lab.training.step import TrainingStep, compute

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]
GPU = torch.device("cuda", 0)
SMALL = (
    "dataset=synthetic",
    "dataset.train_limit=1280",
    "model.width=0.25",
    "training=digits",
    "training.epochs=3",
    "trainer=gpu",
    "trainer.progress=false",
)


@pytest.fixture
def compose(tmp_path: Path) -> Callable[..., Config]:
    def make(*words: str, folder: str = "runs") -> Config:
        return Request.read([]).compose([*SMALL, f"paths.outputs={tmp_path / folder}", *words]).config()

    return make


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


def test_the_gpu_is_chosen_by_itself(compose):
    assert device_of("auto") == GPU == device_of("gpu") and device_of("cpu").type == "cpu"
    assert run_dir(compose("trainer=auto")).config.trainer.precision == "bf16-mixed"


def test_batches_are_those_of_a_cpu(compose):
    config = compose()
    here, there = (data.build(config.dataset, config.training, 1, where) for where in ("cpu", GPU))
    for (images, labels), (ours, our_labels) in zip(here.train, there.train, strict=True):
        assert ours.device == GPU and ours.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(labels, our_labels.cpu()) and torch.allclose(images, ours.cpu(), atol=1e-5)
    plain, ahead = (torch.cat([images.cpu() for images, _ in one.test]) for one in (here, there))
    assert torch.allclose(plain, ahead, atol=1e-5)


@pytest.mark.parametrize("how", ["full", "graphs"])
def test_a_step_is_the_same_however_it_is_computed(how):
    """In float64, four steps: warm-up, recording and playing of a graph are among them."""
    torch.manual_seed(0)
    eager = models.build("vgg16", 10, 0.25, 32).double().to(GPU, memory_format=layout_of(GPU))
    fast, said = copy.deepcopy(eager), []
    step = TrainingStep(fast, 0.1, how, said.append)
    ways = {
        "eager": (eager, lambda *batch: compute(eager, *batch, 0.1), torch.Tensor.backward),
        "fast": (fast, step, step.backward),
    }
    found = {}
    for name, (model, call, backward) in ways.items():
        generator = torch.Generator().manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
        figures = []
        for _ in range(4):
            images = torch.randn(16, 3, 32, 32, dtype=torch.float64, generator=generator).to(GPU)
            labels = torch.randint(0, 10, (16,), generator=generator).to(GPU)
            optimizer.zero_grad()
            loss, one = call(images.contiguous(memory_format=torch.channels_last), labels)
            backward(loss)
            optimizer.step()
            figures.append(one.clone())
        found[name] = [*figures, *model.state_dict().values()]
    assert step.failed is None and len(said) == 1
    for ours, theirs in zip(found["fast"], found["eager"], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("values", ["distinct", "tied", "mostly excluded"])
def test_a_selection_is_that_of_a_cpu(values):
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(50, 40, 3, 3, generator=generator)
    if values == "tied":
        scores = (scores * 7).floor()
    if values == "mostly excluded":
        scores[torch.rand(scores.shape, generator=generator) < 0.97] = -torch.inf
    for k in (0, 1, 100, 540, 17_999, 18_000):
        for chance in (None, 5):
            drawn = [None if chance is None else torch.Generator().manual_seed(chance) for _ in range(2)]
            assert torch.equal(top_k(scores, k, drawn[0]), top_k(scores.to(GPU), k, drawn[1]).cpu())


class Watch(pl.Callback):
    """Counts what lives outside of the masks after every step, weights and their optimizer state."""

    def __init__(self) -> None:
        self.steps, self.alive = 0, 0

    def on_train_batch_end(self, trainer, pl_module, *rest):
        self.steps += 1
        for module in pl_module.model.modules():
            mask = getattr(module, "mask", None)
            if mask is not None:
                state = trainer.optimizers[0].state[module.weight].values()
                tensors = [module.weight, *(one for one in state if one.shape == mask.shape)]
                self.alive += sum(int(torch.count_nonzero(one[~mask])) for one in tensors)


class NoWaiting(pl.Callback):
    """From the second epoch on, whatever makes the host wait for the device within an epoch's steps is an error."""

    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch > 0 and batch_idx == 1:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps += trainer.current_epoch > 0 and batch_idx > 0
        if trainer.is_last_batch:
            torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, *rest):
        torch.cuda.set_sync_debug_mode("default")


def watched(watch: pl.Callback, last: bool, monkeypatch) -> None:
    made = room.make_trainer

    def with_watch(config, parts, folder):
        parts.callbacks.insert(len(parts.callbacks) if last else 0, watch)
        return made(config, parts, folder)

    monkeypatch.setattr(room, "make_trainer", with_watch)


@pytest.mark.parametrize(
    "words",
    [
        ("method=rigl", "method.drop_and_grow.update_every=7"),
        ("method=granet", "method.drop_and_grow.update_every=5", "schedule.cubic.every=5"),
        ("method=rigl", "training.optimizer=adamw", "training.lr=1e-3", "method.drop_and_grow.update_every=7"),
        ("method=rigl", "training.clip_norm=1.0", "training.clip_over=live", "method.drop_and_grow.update_every=7"),
        (
            "method=east",
            "model=resnet34",
            "method.drop_and_grow.update_every=7",
            "method.cycles.every=3",
            "training.clip_norm=1.0",
        ),
        ("method=rigl", "trainer.precision=16-mixed", "training.clip_norm=1.0", "method.drop_and_grow.update_every=7"),
    ],
    ids=["rigl", "granet", "adamw", "clipped", "east", "float16"],
)
def test_masks_hold_after_every_step(words, compose, quiet, monkeypatch):
    watch = Watch()
    watched(watch, True, monkeypatch)
    result = run(compose(*words, "sparsity=s95", "trainer.compile=graphs"), "test", quiet)
    assert watch.steps == 60 and watch.alive == 0
    assert result["kept"] == round(0.05 * result["total"]) and "NVIDIA" in result["device"]
    assert result["peak_memory_mb"] > 0


@pytest.mark.parametrize("how", ["graphs", "off"])
def test_no_step_waits_for_the_device(how, compose, quiet, monkeypatch):
    watch = NoWaiting()
    watched(watch, True, monkeypatch)
    run(compose("method=static", "training.clip_norm=1.0", f"trainer.compile={how}"), "test", quiet)
    assert watch.steps == 38


@pytest.mark.parametrize("how", ["full", "graphs"])
def test_two_runs_with_one_seed_are_equal(how, compose, quiet):
    found = []
    for folder in ("one", "other"):
        words = (
            "method=rigl",
            "method.drop_and_grow.update_every=7",
            "trainer.deterministic=true",
            f"trainer.compile={how}",
        )
        config = compose(*words, folder=folder)
        run(config, "test", quiet)
        with open(run_dir(config).path / "metrics.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        found.append((rows, load_network(run_dir(config).best)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(one, found[1][1][name]) for name, one in found[0][1].items())
