"""Made-up records, written to disk as runs write them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MakeRun = Callable[..., Path]


def config_of(
    model: str, width: float, dataset: str, method: str, sparsity: float, settings: dict[str, Any]
) -> dict[str, Any]:
    """A config as a run records it; `settings` are dotted keys."""
    config: dict[str, Any] = {
        "model": {"name": model, "width": width},
        "dataset": {"name": dataset},
        "method": {"name": method},
        "sparsity": {"target": sparsity},
        "training": {"epochs": 160, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0005},
    }
    for key, value in settings.items():
        *path, last = key.split(".")
        part = config
        for name in path:
            part = part.setdefault(name, {})
        part[last] = value
    return config


def level(number: int, sparsity: float, validation: float, test: float | None) -> dict[str, Any]:
    """One level that a run passed."""
    return {
        "level": number,
        "sparsity": sparsity,
        "kept": round(921344 * (1 - sparsity)),
        "validation_accuracy": validation,
        "test_accuracy": test,
        "best_epoch": 3,
        "epochs": 4,
        "seconds": 1.5,
        "effective": {"effective": 7, "dead_channels": 2, "connected": True, "live_logits": 10},
    }


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes a finished run under tmp_path/runs and returns its folder; `settings` are dotted config keys."""

    def make(
        method: str = "oneshot",
        sparsity: float = 0.99,
        seed: int = 1,
        accuracy: float = 90.0,
        *,
        model: str = "vgg16",
        dataset: str = "cifar10",
        width: float = 1.0,
        settings: dict[str, Any] | None = None,
        levels: list[tuple[float, float, float | None]] | None = None,
        folder: str | None = None,
        updated: str = "2026-01-02T03:04:05+00:00",
        **result: Any,
    ) -> Path:
        config = config_of(model, width, dataset, method, sparsity, settings or {})
        matters = {name: part for name, part in config.items() if name not in ("paths", "logger")}
        cell = hashlib.sha256(json.dumps(matters).encode()).hexdigest()[:10]
        name = f"{model}-{dataset}-{method}-{100 * sparsity:g}-seed{seed}-{cell}"
        record = {
            "name": name,
            "hash": cell,
            "cell": cell,
            "model": model,
            "width": width,
            "dataset": dataset,
            "method": method,
            "seed": seed,
            "sparsity_target": sparsity,
            "sparsity": sparsity,
            "kept": round(921344 * (1 - sparsity)),
            "total": 921344,
            "test_accuracy": accuracy,
            "validation_accuracy": accuracy + 0.5,
            "selected_on": "validation",
            "levels": [
                level(i + 1, share, validation, test)
                for i, (share, validation, test) in enumerate(levels or [(sparsity, accuracy + 0.5, accuracy)])
            ],
            "data": {"md5": {"train.gz": "0123abcd"}, "official": True},
            "config": {**config, "seed": seed},
            **result,
        }
        place = tmp_path / "runs" / (folder or name)
        place.mkdir(parents=True)
        (place / "result.json").write_text(json.dumps(record))
        status = {"state": "done", "error": None, "epoch": 160, "epochs": 160, "pid": 1, "host": "h"}
        status["updated"] = updated
        (place / "status.json").write_text(json.dumps(status))
        return place

    return make


@pytest.fixture
def update() -> Callable[..., dict[str, Any]]:
    """One line of updates.jsonl of a network of 10,000 weights, 100 of them kept and 60 with an effect."""

    def make(epoch: float, kept: int = 100, **values: Any) -> dict[str, Any]:
        return {
            "step": round(100 * epoch),
            "epoch": epoch,
            "change": "rewire",
            "asked": kept,
            "kept": kept,
            "total": 10_000,
            "unique": 10_000,
            "sparsity": 1 - kept / 10_000,
            "effective": 60,
            "connected": True,
            "live_logits": 10,
            "logits": 10,
            "dead_channels": 5,
            "channels": 50,
            "dead_layers": [],
            "explored": 0.02,
            **values,
        }

    return make


@pytest.fixture
def put_lines() -> Callable[..., None]:
    """Writes NAME.jsonl into a run's folder; `torn` is what stands after the last whole line."""

    def put(folder: Path, name: str, rows: list[dict[str, Any]], torn: str = "") -> None:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)

    return put


@pytest.fixture
def make_status(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run that has only a status.json and returns its folder."""

    def make(name: str, **status: Any) -> Path:
        place = tmp_path / "runs" / name
        place.mkdir(parents=True)
        (place / "status.json").write_text(json.dumps({"error": None, "epoch": 3, "epochs": 9, **status}))
        return place

    return make
