"""How fast the command starts, counted in what is imported and composed: seconds differ from machine to machine."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from sparse_lab.cli.main import main
from sparse_lab.config import parts_of
from sparse_lab.errors import UserError
from sparse_lab.experiment import compose
from sparse_lab.experiment.backend import GPU_FILES
from sparse_lab.experiment.compose import ConfigSource, telling, to_config
from sparse_lab.experiment.security.secrets import check_values
from sparse_lab.sweep.plan import Request

SHORT = (
    "dataset=digits", "training=digits", "model.width=0.0625", "dataset.train_limit=128", "dataset.eval_limit=100",
    "training.epochs=1", "trainer.progress=false",
)  # fmt: skip
HEAVY = ("torch", "pytorch_lightning", "torchvision", "torchmetrics", "torch._dynamo", "scipy", "sklearn", "numba")
COMMAND = """
import sys
from sparse_lab.cli.main import main
heavy, *request = sys.argv[1:]
status = main(request)
print("imported:", *[name for name in heavy.split() if name in sys.modules])
sys.exit(status)
"""


def started(*argv: str) -> tuple[str, set[str]]:
    """What the command says in a process of its own, and which heavy packages it has imported when it ends."""
    command = [sys.executable, "-c", COMMAND, " ".join(HEAVY), *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    said, _, imported = done.stdout.rpartition("imported:")
    return said, set(imported.split())


def test_the_package_itself_imports_nothing_heavy():
    """Neither torch nor Hydra: some dozens of Python's own modules, which take some milliseconds."""
    code = "import sys; before = set(sys.modules); import sparse_lab; print(*sorted(set(sys.modules) - before))"
    new = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "sparse_lab" in new and len(new) < 40
    strange = {name.partition(".")[0] for name in new} - {"sparse_lab", *sys.stdlib_module_names}
    assert not strange


@pytest.mark.skipif(any(list(Path("/dev").glob(name)) for name in GPU_FILES), reason="a GPU is asked through torch")
def test_a_run_imports_what_it_needs_and_a_finished_one_nothing(tmp_path):
    """torchvision, torchmetrics and torch._dynamo take longer to import than torch; digits need no scikit-learn."""
    request = (*SHORT, "trainer=auto", f"paths.outputs={tmp_path}")
    said, imported = started(*request)
    assert "test " in said and imported == {"torch", "pytorch_lightning"}
    said, imported = started(*request)
    assert "done already" in said and not imported
    said, imported = started("-m", *request, "seed=1,1")
    assert "2 jobs ask for 1 run" in said and "1 run: 1 skipped" in said and not imported


def test_torchvision_is_imported_where_a_data_set_needs_it(tmp_path):
    """It imports parts of torch._dynamo, which is kept out of the checks."""
    command = [sys.executable, "-m", "sparse_lab", "dataset=cifar10", f"paths.data={tmp_path}", "trainer=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "CIFAR-10 is not in" in done.stderr


def test_a_damaged_result_is_not_taken_for_a_finished_run(tmp_path, capsys):
    request = [*SHORT, "trainer=cpu", f"paths.outputs={tmp_path}"]
    assert main(request) == 0
    [result] = tmp_path.glob("runs/*/result.json")
    result.write_text(result.read_text().replace('"seed": 1', '"seed": 2'))
    capsys.readouterr()
    assert main(request) == 0
    said = capsys.readouterr().out
    assert "done already" not in said and "goes on from last.ckpt" in said


@pytest.mark.full
def test_what_was_kept_out_can_be_had_afterwards():
    """Lightning was imported without them: torch.compile works, and Lightning knows what it makes."""
    check = """
from sparse_lab.training.light_imports import import_lightning
import_lightning()
import torch
from lightning_fabric.wrappers import OptimizedModule
import pytorch_lightning.core.module as module
layer = torch.nn.Linear(2, 2)
assert not isinstance(layer, OptimizedModule) and not isinstance(layer, module.Metric)
compiled = torch.compile(layer, backend="eager")
assert isinstance(compiled, OptimizedModule)
assert torch.equal(compiled(torch.ones(1, 2)), layer(torch.ones(1, 2)))
import torchmetrics, torchmetrics.classification
accuracy = torchmetrics.classification.MulticlassAccuracy(2)
assert isinstance(accuracy, module.Metric) and not isinstance(layer, module.Metric)
for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
    optimizer = kind(layer.parameters(), lr=0.1)
    loss = optimizer.step(lambda: optimizer.zero_grad() or (s := layer(torch.ones(1, 2)).sum()).backward() or s)
    assert loss.requires_grad and torch.is_grad_enabled()
"""
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# --- composing ---

AXES = {
    "method": ["east", "rigl", "iterative_regrow", "lth", "dense", "hrank"],
    "sparsity": ["s90", "s99_9"],
    "training": ["standard", "east"],
    "seed": ["1", "77"],
    "sparsity.target": ["0.91", "0.97"],
    "training.epochs": ["3", "40"],
    "training.finetune.epochs": ["${training.epochs}", "5"],
    "method.cycles.lengths": ["[0.1,0.2]", "[0.3]"],
    "training.clip_norm": ["null", "1.5"],
    "dataset.root": ["${paths.data}/x", "'a b'"],
    "training.augment": ["{flip:false}", "{crop_padding:2}"],  # merged into what is there: Hydra's own work
}


# the parts of each, read off conf/method
OWN = {
    "east": {"sharing", "dyrelu", "prune", "cycles", "drop_and_grow"},
    "rigl": {"prune", "drop_and_grow"},
    "iterative_regrow": {"prune", "regrow"},
    "lth": {"prune"},
    "dense": set(),
    "hrank": {"prune", "filters"},
}
SCHEDULE = {"east": "constant", "rigl": "constant", "iterative_regrow": "iterative", "lth": "iterative"}


def as_hydra(request, lines):
    """What Hydra itself makes of all lines, without the parts that the method does not have."""
    config = to_config(request.source.through_hydra(lines))
    own = {*OWN[config.method.name], SCHEDULE.get(config.method.name, "one_shot")}
    for group in (config.method, config.schedule):
        for part in parts_of(type(group)):
            if part not in own:
                setattr(group, part, None)
    return config


@pytest.mark.parametrize("draw", [0, *(pytest.param(draw, marks=pytest.mark.full) for draw in (1, 2, 3))])
def test_jobs_are_composed_as_hydra_composes_them(draw):
    """Any axes, in any order, together with fixed overrides."""
    chance = random.Random(draw)
    axes = {key: AXES[key] for key in chance.sample(list(AXES), 5)}
    request = Request.read(["-m", "model=resnet34", "seed=5", *(f"{key}={','.join(axes[key])}" for key in axes)])
    request.read_experiment_axes()
    composer, jobs = request.composer(), request.corners()
    assert len(jobs) == math.prod(map(len, axes.values())) and sorted(composer.order(jobs)) == list(range(len(jobs)))
    for job in chance.sample(jobs, 3):
        lines = [f"{key}={value}" for key, value in job.items()]
        wanted = as_hydra(request, [*request.fixed, *lines])
        assert composer.config(job) == wanted == request.compose(lines).config()


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "lines",
    [
        ["training.augment.flip=false", "training.augment={flip:true}"],
        ["training.augment={flip:true}", "training.augment.flip=false"],
        ["training.epochs=7", "training=east", "training.epochs=9", "dataset.root='a b'"],
        ["method.cycles.lengths=[0.1,0.2]", "method.cycles.lengths=[0.3]", "method=east"],
        ["seed=4", "hydra.job.name=x", "seed=5"],
        ["training.finetune.epochs=${training.epochs}", "training.epochs=4", "++seed=3"],
        ["training.clip_norm=null", "logger=[wandb,tensorboard]", "logger.project=p"],
    ],
)
def test_overrides_in_any_order_are_what_hydra_makes_of_them(lines):
    request = Request.read([])
    for _ in range(2):  # put together anew, and from what was kept
        assert request.compose(lines).config() == as_hydra(request, lines)


def test_hydra_composes_choices_not_values(monkeypatch):
    request = Request.read(["-m", "method=set,rigl", "sparsity=s90,s99", "seed=range(1,6)", "training.epochs=1,2"])
    composed = []
    original = ConfigSource.through_hydra

    def counted(self, lines):
        composed.append(lines)
        return original(self, lines)

    monkeypatch.setattr(ConfigSource, "through_hydra", counted)
    monkeypatch.setattr(compose, "PUT_TOGETHER", {})
    request.read_experiment_axes()
    composer, jobs = request.composer(), request.corners()
    configs = [composer.config(jobs[number]) for number in composer.order(jobs)]
    assert len({(c.method.name, c.sparsity.target, c.seed, c.training.epochs) for c in configs}) == 40
    assert len(composed) == 1 + 4


def test_a_wrong_value_is_told_as_hydra_tells_it():
    request = Request.read(["-m", "seed=1,one"])
    request.read_experiment_axes()
    composer = request.composer()
    with pytest.raises(UserError) as fast:
        composer.config({"seed": "one"})
    with pytest.raises(UserError) as whole:
        request.source.through_hydra(["seed=one"])
    assert str(fast.value) == str(whole.value) and "seed" in str(fast.value)


def test_a_secret_that_a_swept_value_points_to_is_refused(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "a-secret-of-mine-1")
    request = Request.read(["-m", "logger.project=plain,${oc.env:MY_API_KEY}"])
    request.read_experiment_axes()
    composer = request.composer()
    assert composer.config({"logger.project": "plain"}).logger.project == "plain"
    with pytest.raises(UserError, match=r"logger\.project would hold the value of MY_API_KEY"):
        composer.config({"logger.project": "${oc.env:MY_API_KEY}"})


def test_values_are_looked_at_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "a-secret-of-mine-1")
    config = Request.read([]).compose(["method=oneshot_regrow", "method.regrow.given=[a,b]"]).config()
    check_values(config)
    config.method.regrow.given[1] = "x a-secret-of-mine-1"
    with pytest.raises(UserError, match=r"method\.regrow\.given\.1"):
        check_values(config)


def test_a_swept_choice_that_sets_the_launcher_is_refused(tmp_path):
    (tmp_path / "experiment").mkdir()
    for name, jobs in (("one", 1), ("two", 2)):
        content = {"defaults": [{"override /hydra/launcher": "joblib"}], "hydra": {"launcher": {"n_jobs": jobs}}}
        text = f"# @package _global_\n{yaml.safe_dump(content)}"
        (tmp_path / "experiment" / f"{name}.yaml").write_text(text)
    request = Request.read(["-m", "--config-dir", str(tmp_path), "experiment=one,two"])
    with pytest.raises(UserError, match="experiment=one chooses hydra/launcher=joblib, which Hydra ignores"):
        request.check()


# --- waiting ---


def test_a_line_is_said_while_something_takes_long(monkeypatch):
    monkeypatch.setattr(compose, "FIRST_LINE", 0.01)
    monkeypatch.setattr(compose, "NEXT_LINES", 0.01)
    said, twice = [], threading.Event()

    def say(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            twice.set()

    with telling(1000, say) as at:
        at("composing", 34)
        assert twice.wait(30)
    after = len(said)
    assert said[1].startswith("composing job 34 of 1,000, ")
    assert not any(thread.name == "telling" for thread in threading.enumerate()) and len(said) == after


def test_what_is_quick_says_nothing():
    said: list[str] = []
    with telling(3, said.append) as at:
        at("checking", 3)
    assert not said
