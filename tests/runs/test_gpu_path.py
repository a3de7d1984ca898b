"""What a run does on a GPU, on the CPU: images and weights channels last, batches made ahead, a compiled step."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
import torch

from sparse_lab.data import source
from sparse_lab.errors import UserError
from sparse_lab.experiment import backend, build
from sparse_lab.experiment.identity import run_dir
from sparse_lab.experiment.runner import run
from sparse_lab.experiment.validate import check_device
from sparse_lab.training import device
from sparse_lab.training.checkpoint_io import load_network

CLOSE = {"rtol": 1e-7, "atol": 1e-9}
METHODS = {
    "rigl": ("method=rigl", "method.drop_and_grow.update_every=2"),
    "granet": ("method=granet", "method.drop_and_grow.update_every=1", "schedule.cubic.every=1"),
    "regrow": ("method=iterative_regrow", "method.regrow.distribution=ssim", "schedule.iterative.share=0.6"),
    "east": (
        "method=east",
        "model=resnet34",
        "method.drop_and_grow.update_every=2",
        "method.cycles.every=1",
        "training.clip_norm=1.0",
    ),
    "live clipping": (
        "method=rigl",
        "training.clip_norm=0.1",
        "training.clip_over=live",
        "method.drop_and_grow.update_every=2",
    ),
}


def network(config) -> dict[str, torch.Tensor]:
    return load_network(run_dir(config).best)


def test_a_gpu_gets_images_and_weights_channels_last():
    assert device.layout_of(torch.device("cuda")) is torch.channels_last
    assert device.layout_of(torch.device("cpu")) is torch.contiguous_format


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "live clipping" else pytest.mark.full) for name in METHODS]
)
def test_every_step_is_the_same_in_the_gpus_layout(name, compose, quiet, with_starts, tmp_path, monkeypatch):
    config = compose(*METHODS[name], "sparsity.target=0.8", "trainer.precision=64-true")
    plain, turned = (
        with_starts(replace(config, paths=replace(config.paths, outputs=str(tmp_path / outputs))))
        for outputs in ("plain", "turned")
    )
    run(plain, "test", quiet)
    seen = []

    def layout_of(where):
        seen.append(where)
        return torch.channels_last

    monkeypatch.setattr(build, "layout_of", layout_of)
    monkeypatch.setattr(source, "layout_of", layout_of)
    run(turned, "test", quiet)
    assert seen
    wanted, found = network(plain), network(turned)
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():
        same = (
            torch.equal(found[key], value) if value.dtype == torch.bool else torch.allclose(found[key], value, **CLOSE)
        )
        assert same, key


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["rigl", "east"])
def test_every_step_is_the_same_compiled(name, compose, quiet, tmp_path):
    """EAST is compiled twice: with DyReLU and without."""
    words = (*METHODS[name], "sparsity.target=0.8", "trainer.precision=64-true")
    eager = compose(*words, "trainer.compile=off", f"paths.outputs={tmp_path / 'eager'}")
    fast = compose(*words, "trainer.compile=full", f"paths.outputs={tmp_path / 'fast'}")
    for one in (eager, fast):
        run(one, "test", quiet)
    assert run_dir(eager).name == run_dir(fast).name, "how a step is computed is no part of what a run is"
    wanted, found = network(eager), network(fast)
    for key, value in wanted.items():
        same = (
            torch.equal(found[key], value) if value.dtype == torch.bool else torch.allclose(found[key], value, **CLOSE)
        )
        assert same, key


def test_two_runs_with_one_seed_are_equal(compose, quiet, tmp_path):
    rows = []
    for name in ("one", "other"):
        config = compose(
            "method=rigl",
            "method.drop_and_grow.update_every=2",
            "trainer.deterministic=true",
            f"paths.outputs={tmp_path / name}",
        )
        result = run(config, "test", quiet)
        with open(run_dir(config).path / "metrics.csv", encoding="utf-8") as file:
            rows.append((result["test_accuracy"], result["validation_accuracy"], list(csv.DictReader(file))))
    assert rows[0] == rows[1]


def test_automatic_precision_is_that_of_the_device(compose, monkeypatch):
    config = compose("trainer=auto", "method=rigl")
    assert config.trainer.precision == "auto"
    assert backend.resolve_backend(config).trainer.precision == "32-true"
    names = [run_dir(config).name, run_dir(compose("trainer=cpu", "method=rigl")).name]
    assert names[0] == names[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "GPU_FILES", ("null",))  # every machine has this device
    assert backend.resolve_backend(config).trainer.precision == "bf16-mixed"
    assert run_dir(config).name != names[0]
    assert backend.resolve_backend(compose("trainer=cpu", "method=rigl")).trainer.precision == "32-true"


@pytest.mark.full
def test_on_a_gpu_paths_are_looked_at_now_and_then(compose, quiet, tmp_path, monkeypatch):
    """At pruning always; at exchanges at least so many steps behind the last look. Every change has its line."""
    words = ("method=rigl", "method.drop_and_grow.update_every=2", "method.drop_and_grow.end=1.0", "training.epochs=10")
    rows, flops, made = {}, [], build.MaskLogger
    for name, apart in (("all", 0), ("few", 7)):

        def with_apart(*args, _apart=apart, **keys):
            return made(*args, **{**keys, "apart": _apart})

        monkeypatch.setattr(build, "MaskLogger", with_apart)
        config = compose(*words, f"paths.outputs={tmp_path / name}")
        flops.append(run(config, "test", quiet)["flops"])
        lines = (run_dir(config).path / "updates.jsonl").read_text(encoding="utf-8").splitlines()
        rows[name] = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows["all"]] == [row["step"] for row in rows["few"]] == list(range(0, 20, 2))
    assert [row["step"] for row in rows["few"] if "effective" in row] == [0, 8, 16]
    assert all("effective" in row for row in rows["all"])
    for row, same in zip(rows["few"], rows["all"], strict=True):
        assert all(same[key] == value for key, value in row.items())
    assert flops[0] == flops[1]


def test_what_cannot_be_deterministic_on_a_gpu_is_refused(compose, monkeypatch):
    photos = ("trainer=auto", "model=resnet34", "dataset=imagenet", "method=rigl")
    check_device(compose(*photos))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "GPU_FILES", ("null",))  # every machine has this device
    with pytest.raises(UserError, match=r"max-pooling windows of resnet34 overlap.*trainer\.deterministic=false"):
        check_device(compose(*photos))
    check_device(compose(*photos, "trainer.deterministic=false"))
    check_device(compose("trainer=auto", "model=vgg16", "method=rigl"))
