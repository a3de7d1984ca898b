"""How many runs at a time there are on a machine by default, and with how many threads each."""

from __future__ import annotations

import os

import pytest

from sparse_lab.cli.main import main
from sparse_lab.experiment import compose
from sparse_lab.sweep import launchers

GIB = 2**30


@pytest.fixture
def machine(monkeypatch):
    """machine(processors, GiB that are free, GPUs)."""

    def make(cores: int, memory: float, gpus: int = 0) -> None:
        monkeypatch.setattr(compose, "usable_cores", lambda: cores)
        monkeypatch.setattr(launchers, "usable_cores", lambda: cores)
        monkeypatch.setattr(compose, "available_memory", lambda: int(memory * GIB))
        monkeypatch.setattr(compose, "gpus_a_job", lambda accelerator: int(accelerator != "cpu" and gpus > 0))
        compose.places.cache_clear()
        for name in (*launchers.THREADS, *launchers.WAITING):
            monkeypatch.delenv(name, raising=False)

    yield make
    compose.places.cache_clear()


@pytest.mark.parametrize(
    ("cores", "memory", "gpus", "accelerator", "places", "threads"),
    [
        (2, 17, 0, "auto", 2, "1"),
        (16, 64, 0, "cpu", 16, "1"),
        (16, 20, 0, "cpu", 8, "2"),
        (4, 1, 0, "cpu", 1, "4"),
        (32, 200, 1, "auto", 2, "16"),
        (32, 200, 1, "cpu", 32, "1"),
    ],
)
def test_there_is_a_run_on_each_processor_as_far_as_memory_goes(
    cores, memory, gpus, accelerator, places, threads, machine
):
    machine(cores, memory, gpus)
    assert compose.places(accelerator) == places
    launcher = launchers.Joblib(compose.places(accelerator))
    assert launcher.room == places
    assert launcher.environment == dict.fromkeys(launchers.THREADS, threads) | {"OMP_WAIT_POLICY": "PASSIVE"}


def test_what_is_asked_for_is_what_there_is(machine, monkeypatch):
    machine(16, 64)
    assert launchers.Joblib(4).environment["OMP_NUM_THREADS"] == "4"
    assert launchers.Joblib(-1).room == 16
    assert launchers.Joblib(32).environment["NUMBA_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    launcher = launchers.Joblib(4)
    assert "OMP_NUM_THREADS" not in launcher.environment and launcher.about.startswith("4 runs at a time, 3 threads")


def test_the_plan_says_how_many_run_at_a_time(machine, capsys, tmp_path, monkeypatch):
    machine(4, 64)
    monkeypatch.setattr("sparse_lab.sweep.launch.start", lambda request: 0)
    words = ["-m", "hydra/launcher=joblib", "seed=1,2", "dataset=synthetic", f"paths.outputs={tmp_path}"]
    for more, said in (([], "4 runs at a time, 1 thread each"), (["hydra.launcher.n_jobs=2"], "2 runs at a time, 2")):
        assert main([*words, *more]) == 0
        assert f"sweep: {said}" in capsys.readouterr().out


def test_jobs_of_submitits_local_executor_share_the_processors_out(machine):
    machine(8, 64)
    launcher = launchers.SubmititLocal()
    assert launcher.threads(4)["OMP_NUM_THREADS"] == "2" and launcher.threads(20)["OMP_NUM_THREADS"] == "1"
    with launchers._with(launcher.threads(4)):
        assert os.environ["MKL_NUM_THREADS"] == "2"
    assert "MKL_NUM_THREADS" not in os.environ
    assert launchers.SubmititSlurm().threads(4) == {}
