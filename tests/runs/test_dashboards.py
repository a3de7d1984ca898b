"""Dashboards are extra: offline, without a prompt, each run its own, and never in the way."""

from __future__ import annotations

import pytorch_lightning as pl
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparse_lab.record import RunFolder
from sparse_lab.run import run


def test_tensorboard_gets_one_row_an_epoch(compose, quiet):
    config = compose("method=dense", "logger=tensorboard")
    result = run(config, "x", quiet)
    events = EventAccumulator(str(RunFolder(config).path / "tensorboard"))
    events.Reload()
    seen = events.Scalars("validation_accuracy")
    assert len(seen) == 2 and abs(max(one.value for one in seen) - result["validation_accuracy"]) < 1e-3


def test_wandb_is_offline_without_a_key_and_each_run_has_its_own(compose, quiet, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    for seed in (1, 2):
        config = compose("method=dense", "logger=wandb", f"seed={seed}")
        run(config, "x", quiet)
        assert wandb.run is None, "a run that is not finished takes in the next one"
        assert len(list((RunFolder(config).path / "wandb").glob("offline-run-*"))) == 1


def test_a_dashboard_that_fails_is_said_once_and_the_run_goes_on(compose, monkeypatch, capsys):
    def down(self, *rest, **kwargs):
        raise ConnectionError("the server is down")

    monkeypatch.setattr(pl.loggers.TensorBoardLogger, "log_metrics", down)
    result = run(compose("method=dense", "logger=tensorboard"), "x", Console(width=200))
    assert result["levels"][0]["epochs"] == 2
    assert capsys.readouterr().out.count("the server is down") == 1


def test_a_dashboard_that_cannot_be_opened_does_not_stop_a_run(compose, monkeypatch, capsys):
    def broken(self, *rest, **kwargs):
        raise ValueError("no such place")

    monkeypatch.setattr(pl.loggers.TensorBoardLogger, "__init__", broken)
    run(compose("method=dense", "logger=tensorboard"), "x", Console(width=200))
    assert capsys.readouterr().out.count("no such place") == 1
