"""Made-up records, written to disk as runs write them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparse_lab.records.atomic_io import checksum

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
        chosen = min(100.0, accuracy + 0.5)  # on the validation split
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
            "seconds": 0.0,
            "test_accuracy": accuracy,
            "validation_accuracy": chosen,
            "selected_on": "validation",
            "levels": [
                level(i + 1, share, validation, test)
                for i, (share, validation, test) in enumerate(levels or [(sparsity, chosen, accuracy)])
            ],
            "data": {"md5": {"train.gz": "0123abcd"}, "official": True},
            "config": {**config, "seed": seed},
            **result,
        }
        place = tmp_path / "runs" / (folder or name)
        place.mkdir(parents=True)
        (place / "result.json").write_text(json.dumps({**record, "checksum": checksum(record)}))
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
            "change": "drop_and_grow",
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


EVIL = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>${7*7}{{7*7}}</style></title>--><!-- javascript:alert(3)"
)


@pytest.fixture
def make_evil(make_run: MakeRun, make_status: Callable[..., Path], tmp_path: Path) -> Callable[[], Path]:
    """Writes records, a plan and a failed run in which all text wants to be run; returns where they lie."""

    def make() -> Path:
        known = {"command": EVIL, "commit": EVIL, "device": EVIL, "data": {"md5": {EVIL: EVIL}, "official": False}}
        for seed in (1, 2):
            make_run(EVIL, seed=seed, accuracy=80.0 + seed, model=EVIL, dataset=EVIL, folder=f"evil{seed}", **known)
        make_run("oneshot", settings={"training.note": EVIL})
        make_run("oneshot", settings={"training.note": "tame"}, selected_on=EVIL)
        make_status("lost", state="failed", error=EVIL)
        run = {
            "name": EVIL.replace("/", "|"),
            "model": EVIL,
            "dataset": EVIL,
            "method": EVIL,
            "sparsity": 0.5,
            "seed": EVIL,
        }
        write_record_of(tmp_path / "sweeps" / "one" / "plan.json", {"started": EVIL, "runs": [run]})
        return tmp_path

    return make


def write_record_of(path: Path, record: dict[str, Any]) -> None:
    """A record with its checksum, in a new folder."""
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**record, "checksum": checksum(record)}))


@pytest.fixture
def make_many() -> Callable[..., int]:
    """`many_runs` below."""
    return many_runs


def many_runs(root: Path, methods: int = 25, shares: int = 10, seeds: int = 4) -> int:
    """Writes methods x shares x seeds finished runs with metrics and all diagnostics; returns how many.

    A run has 21 layers, 36 changes of its masks and 22 epochs, as much as one of results/east_quick: about 70 KB.
    """
    targets = [0.9, 0.95, 0.968, 0.98, 0.9899, 0.995, 0.998, 0.999, 0.9995, 0.9999][:shares]
    for number in range(methods):
        for place, target in enumerate(targets):
            for seed in range(seeds):
                _one_of_many(root, number, place % 2, target, seed)
    return methods * len(targets) * seeds


def _one_of_many(root: Path, number: int, second: int, target: float, seed: int) -> None:
    model, method = ("resnet18", "vgg16")[second], f"method{number:02d}"
    config = config_of(model, 1.0, "cifar10", method, target, {})
    cell = hashlib.sha256(json.dumps(config).encode()).hexdigest()[:10]
    name = f"{model}-cifar10-{method}-{100 * target:g}-seed{seed}-{cell}"
    accuracy = 95 - number / 2 - 2 * seed / 7 - 0.02 / (1 - target) ** 0.8
    sizes = [1728 * 2 ** min(i // 2, 8) for i in range(21)]
    layers = [
        {"name": f"layer{i}.conv", "kept": round(n * (1 - target)), "total": n, "macs": n * 64}
        for i, n in enumerate(sizes)
    ]
    total, kept = sum(sizes), sum(layer["kept"] for layer in layers)
    record = {
        "name": name,
        "cell": cell,
        **{"model": model, "dataset": "cifar10", "method": method, "seed": seed, "width": 1.0},
        **{"sparsity_target": target, "sparsity": 1 - kept / total, "kept": kept, "total": total},
        **{"test_accuracy": accuracy, "validation_accuracy": accuracy, "selected_on": "validation", "explored": 0.1},
        "levels": [level(1, target, accuracy, accuracy)],
        "layers": layers,
        "flops": {"inference_dense": 2e9, "inference_sparse": 2e9 * (1 - target) * (1 + number / 9)},
        **{"seconds": 1000.0 + 40 * number + seed, "peak_memory_mb": 900.0 + number},
        **{"command": "sparse-lab -m ...", "commit": "0123abcd", "device": "cpu: one"},
        "data": {"md5": {"train.gz": "0123abcd"}, "official": True},
        "config": {**config, "seed": seed},
    }
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({**record, "checksum": checksum(record)}, indent=2))
    status = {"state": "done", "error": None, "epoch": 22, "epochs": 22, "updated": "2026-01-02T03:04:05+00:00"}
    (folder / "status.json").write_text(json.dumps(status))
    _went(folder, layers, kept, total)


def _went(folder: Path, layers: list[dict[str, Any]], kept: int, total: int) -> None:
    def put(name: str, rows: list[dict[str, Any]]) -> None:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    updates = []
    for i in range(36):
        more = round(kept * (1 + 0.5 * math.sin(i / 3) ** 2))
        by_layer = {
            one["name"]: {"kept": one["kept"], "total": one["total"], "effective": one["kept"] // 2} for one in layers
        }
        row = {
            "step": 25 * i,
            "epoch": i * 22 / 36,
            "change": "drop_and_grow",
            "asked": more,
            "total": total,
            "unique": total,
        }
        row |= {
            "sparsity": 1 - more / total,
            "kept": more,
            "effective": more // 2,
            "channels": 1200,
            "dead_channels": 700,
        }
        row |= {"dead_layers": [], "logits": 10, "live_logits": 9, "connected": True, "explored": 0.01 + i / 1000}
        updates.append({**row, "layers": by_layer})
    put("updates", updates)
    epochs = range(1, 23)
    shares = {f"layer{i}.relu": 0.5965003967285156 - i / 100 for i in range(33)}
    put("activations", [{"epoch": e, "beta": max(0.0, 1 - e / 10), "layers": shares} for e in epochs])
    parts = ("pruned positions", "live weights", "BatchNorm", "DyReLU", "sharing scales")
    put("gradients", [{"epoch": e, "parts": {part: 12.474321746826172 / e for part in parts}} for e in epochs])
    head = (
        "epoch,round,step,learning_rate,train_loss,train_accuracy,validation_loss,validation_accuracy,sparsity,kept\n"
    )
    rows = (
        f"{e},1,{40 * e},0.0495596934,{2.3 / e},{90 - 80 / e},{2.4 / e},{89 - 80 / e},0.99,{kept}\n" for e in epochs
    )
    (folder / "metrics.csv").write_text(head + "".join(rows))
