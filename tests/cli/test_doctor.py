"""`sparse-lab doctor`: what is here, and what a command lacks. It leaves nothing behind."""

from __future__ import annotations

import io
import json
import os
import sys
from collections import namedtuple
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_lab import data
from sparse_lab.cli.doctor import checks, command_checks
from sparse_lab.cli.main import main
from sparse_lab.experiment import backend
from sparse_lab.sweep.plan import Request

SMALL = ("dataset=digits", "training=digits", "trainer=cpu")


@pytest.fixture
def ask(tmp_path, capsys):
    """ask("method=dense") -> (exit status, the lines that end with what is missing, everything)."""

    def asked(*words: str) -> tuple[int, list[str], str]:
        status = main(["doctor", *words])
        out = capsys.readouterr().out
        return status, [line[8:] for line in out.splitlines() if line.startswith("missing ")], out

    return asked


def test_it_says_what_is_here_and_how_to_get_the_rest(ask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, missing, out = ask()
    assert status == 0 and not missing
    assert f"torch {metadata.version('torch')}" in out and f"{os.cpu_count()}" in out
    assert "ok      dataset=digits" in out
    assert "-       dataset=cifar10: CIFAR-10 is not in data" in out and "dataset.download=true" in out
    for name in ("wandb", "mlflow", "ray", "hydra-optuna-sweeper"):
        assert f"{name} {metadata.version(name)}" in out if checks.version(name) else checks.EXTRAS[name][1] in out
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_has_its_pip_line(ask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = metadata.version

    def without_ray(name: str) -> str:
        if name == "ray":
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "version", without_ray)
    status, _, out = ask()
    assert status == 0 and "-       hydra/launcher=ray: pip install 'sparse_lab[ray]'" in out


def test_what_is_broken_is_said_and_the_rest_goes_on(ask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1 / 0)
    monkeypatch.setattr(data, "check", lambda dataset: (_ for _ in ()).throw(RuntimeError("no\nsuch luck")))
    status, missing, out = ask()
    assert status == 1
    assert missing[0] == "threads: cannot be looked at (ZeroDivisionError: division by zero)"
    assert missing[1] == "data sets: cannot be looked at (RuntimeError: no such luck)"
    assert "outputs can be written" in out


def test_a_command_that_can_start(ask, tmp_path):
    status, missing, out = ask("-m", "method=oneshot", "seed=1,2", *SMALL, f"paths.outputs={tmp_path / 'out'}")
    assert status == 0 and not missing and "this command can start" in out
    assert "runs to make: 4, with those needed first" in out  # two dense ones and two pruned
    assert not list(tmp_path.iterdir())


def test_a_command_that_cannot_start_gets_everything_that_it_lacks(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sparse_lab.sweep.plan.find_spec", lambda name: None if "ray" in name else object())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ("method=east", "model=resnet34", "dataset=imagenet", "logger=mlflow", "trainer=gpu", "trainer.devices=2")
    status, missing, out = ask(
        "-m", *words, "hydra/launcher=ray", f"paths.data={tmp_path}", f"paths.outputs={tmp_path}"
    )
    assert status == 1 and "this command cannot start: 5 missing" in out
    said = "\n".join(missing)
    assert "pip install 'sparse_lab[ray]'" in said and "pip install 'sparse_lab[mlflow]'" in said
    assert "(DDP) does not go with -m" in said and "hydra/launcher=ray" in said
    assert "no GPU here: trainer=cpu" in said
    assert f"imagenet is not in {tmp_path}" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["metod=dense"], "unknown key 'metod'"),
        (["method=dense,oneshot"], "add -m"),
        (["method=oneshot", "sparsity.target=1.5"], "sparsity.target=1.5 is outside"),
        (["-m", "method=oneshot", "sparsity.target=0.9,1.5"], "sparsity.target=1.5 is outside"),
        (["-m", "seed=1,2", "hydra/launcher=submitit_slurm"], "no sbatch here"),
        (["hydra.launcher._target_=os.system"], "os.system is not among"),
        (["--nonsense"], "cannot read the command line"),
    ],
)
def test_what_is_wrong_with_a_request_is_missing_too(words, line, ask, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    status, missing, _ = ask(*words, *SMALL, f"paths.outputs={tmp_path}")
    assert status == 1
    assert len(missing) == 1 and line in missing[0]


def test_data_that_will_be_fetched_are_not_missing_and_are_not_fetched(ask, tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_: pytest.fail("it went to the network"))
    words = ("dataset=cifar10", "dataset.download=true", f"paths.data={tmp_path}", f"paths.outputs={tmp_path}")
    status, missing, out = ask(*words, "trainer=cpu")
    assert status == 0 and not missing and "cifar10 is fetched at the start" in out
    assert not list(tmp_path.iterdir())


def test_no_room_for_its_checkpoints(ask, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    status, (line,), _ = ask(*SMALL, "method=dense", f"paths.outputs={tmp_path / 'not' / 'there'}")
    assert status == 1 and "976.6 KiB free" in line and "make room there or set paths.outputs=DIR" in line


def test_outputs_that_cannot_be_written(ask, tmp_path):
    (tmp_path / "file").write_text("")
    status, (line,), _ = ask(*SMALL, f"paths.outputs={tmp_path / 'file' / 'x'}")
    assert status == 1 and "cannot write to" in line


@pytest.mark.full
def test_checkpoints_are_as_large_as_it_says(tmp_path):
    """Against real files, of a network so large that their heads do not count; oneshot makes its dense start too."""
    words = [*SMALL, "sparsity=s90", "model.width=0.5", f"paths.outputs={tmp_path}", "dataset.train_limit=16"]
    words += ["dataset.eval_limit=16", "training.batch_size=16", "training.epochs=1", "training.finetune.epochs=1"]
    assert main(["method=oneshot", *words]) == 0
    folders = {json.loads(path.read_text())["method"]: path.parent for path in tmp_path.rglob("result.json")}
    for method in ("dense", "oneshot"):
        config = Request.read([]).compose([f"method={method}", *words]).config()
        last, best = command_checks.checkpoint_bytes(config, config.sparsity.target)
        checkpoints = folders[method] / "checkpoints"
        assert last == pytest.approx((checkpoints / "last.ckpt").stat().st_size, rel=0.05)
        assert best == pytest.approx((checkpoints / "best.ckpt").stat().st_size, rel=0.05)
        frugal = replace(config, training=replace(config.training, optimizer="sgd", momentum=0.0))
        # oneshot ends with finetune's
        assert (command_checks.checkpoint_bytes(frugal, config.sparsity.target)[0] < last) is (method == "dense")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_marks_and_colours_are_for_terminals_alone(ask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, _, plain = ask()
    assert "\033[" not in plain and "✓" not in plain
    for variable, shown in (("NO_COLOR", "\n✓ "), ("COLOR", "\n\033[32m✓\033[0m ")):
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv(variable, "1")
        monkeypatch.setattr(sys, "stdout", Terminal())
        assert main(["doctor"]) == 0
        assert shown in sys.stdout.getvalue()  # type: ignore[attr-defined]


def test_no_secret_is_shown(ask, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "very-secret-value-1")
    status, missing, out = ask("logger.project=very-secret-value-1", *SMALL, f"paths.outputs={Path(tmp_path)}")
    assert status == 1 and "MLFLOW_TRACKING_TOKEN" in missing[0] and "very-secret" not in out


def test_sparse_arithmetic_is_looked_at(ask, tmp_path, monkeypatch):
    command = ("method=static", "compute=sparse", f"paths.outputs={tmp_path}", *SMALL)
    status, missing, out = ask(*command)
    assert status == 0 and not missing and f"compute=sparse: numba {metadata.version('numba')} with " in out
    monkeypatch.setitem(sys.modules, "numba", None)
    status, missing, _ = ask(*command)
    assert status == 1 and "compute=sparse: numba does not start" in missing[0]
    assert ask("method=static", f"paths.outputs={tmp_path}", *SMALL)[0] == 0


def test_what_auto_picks_is_said_and_a_gpu_in_the_way_of_sparse_is_a_fault(ask, tmp_path, monkeypatch):
    command = ("method=static", "sparsity=s99", f"paths.outputs={tmp_path}", "dataset=digits", "training=digits")
    status, _, out = ask(*command, "trainer=cpu", "compute=auto")
    assert status == 0 and "compute=auto picks sparse: 99% of the weights are to go" in out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "GPU_FILES", ("null",))  # every machine has this device
    status, missing, _ = ask(*command, "compute=sparse")
    assert status == 1 and missing == [
        "compute=sparse: it is for CPUs, and trainer=auto would take the GPU here: use trainer=cpu, or compute=dense"
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "seed=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=foo"],
        ["-m", "seed=1,2", "+hydra.launcher.foo=3"],
        ["-m", "seed=range(1,1)"],
        ["method=gmp", "sparsity=s90", "schedule.cubic.initial=0.999"],
        ["model.weights=/etc/passwd"],
        ["training.nesterov=true", "training.momentum=0", "training.optimizer=sgd"],
        ["dataset=synthetic", "dataset.image_size=4096", "model.width=0.0625"],
        ["dataset=synthetic", "dataset.mean=[1,2]"],
        ["dataset.train_limit=32", "dataset.eval_limit=4"],
        ["dataset=arrays", "dataset.file=labels.npz", "dataset.num_classes=5"],
        ["-m", "dataset=arrays", "dataset.file=labels.npz", "dataset.num_classes=10,5"],
        ["dataset=arrays", "dataset.file=none.npz"],
        ["training.epochs=1", "method=rigl", "method.drop_and_grow.update_every=1000"],
    ],
    ids=" ".join,
)
def test_what_it_lets_start_starts_and_what_it_does_not_is_refused_by_the_same_line(
    words, ask, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sparse_lab.data.room.available_memory", lambda: 2**30)
    labels = np.arange(200) % 10
    np.savez("labels.npz", images=np.zeros((200, 32, 32), dtype=np.uint8), labels=labels)
    whole = (*SMALL, *words, f"paths.outputs={tmp_path / 'out'}")
    status, missing, _ = ask(*whole)
    assert status == 1 and len(missing) == 1
    assert main(list(whole)) == 2
    assert capsys.readouterr().err.strip() == f"sparse-lab: {missing[0]}"
    assert not (tmp_path / "out" / "runs").exists()
