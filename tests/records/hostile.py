"""Files that somebody else may have left among the outputs: what lies in a record's place, and what a record says."""

from __future__ import annotations

import copy
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparse_lab.records.atomic_io import write_record
from sparse_lab.records.kept import FILE, keep_run
from sparse_lab.records.sweep_dir import SweepFolder, now

HERE = {"pid": os.getpid(), "host": socket.gethostname()}
NAMES = [f"vgg16-digits-dense-seed{seed}-0123456789" for seed in range(4)]
SWEEP, RUNS, TABLE = "sweeps/abcdef01", "runs", "table"


def result(name: str, seed: int) -> dict[str, Any]:
    return {
        "name": name, "cell": "c", "model": "vgg16", "dataset": "digits", "method": "oneshot", "seed": seed,
        "sparsity_target": 0.9, "sparsity": 0.9, "test_accuracy": 91.5, "validation_accuracy": 90.5, "kept": 1,
        "total": 10, "seconds": 1.0, "config": {"model": {"width": 1.0}},
        "levels": [{"level": 1, "sparsity": 0.9, "kept": 1, "test_accuracy": 91.5, "seconds": 1.0}],
    }  # fmt: skip


def lay(root: Path) -> Path:
    """A sweep of four runs: one is done, one runs, one has failed, one waits; and a table that keeps the first."""
    folder = SweepFolder(root / SWEEP)
    folder.path.mkdir(parents=True)
    planned = [
        {"name": name, "model": "vgg16", "dataset": "digits", "method": "oneshot", "sparsity": 0.9, "seed": seed}
        for seed, name in enumerate(NAMES)
    ]
    about = {"command": "sparse-lab -m", "started": now(), **HERE, "jobs": 4, "launcher": "basic", "runs": planned}
    folder.write_plan(about)
    for number, state in enumerate(("done", "running", "failed")):
        run = root / RUNS / NAMES[number]
        run.mkdir(parents=True)
        status = {"state": state, "error": None, "started": now(), **HERE, "updated": now(), "epoch": 1, "epochs": 2}
        (run / "status.json").write_text(json.dumps(status))
        (run / "config.yaml").write_text("seed: 1\n")
        (run / "metrics.csv").write_text("epoch,train_loss\n1,0.5\n")
        (run / "updates.jsonl").write_text('{"step": 1, "epoch": 0.5, "kept": 1, "total": 10}\n')
    write_record(root / RUNS / NAMES[0] / "result.json", result(NAMES[0], 0))
    folder.outcome(
        0, {"run": NAMES[0], "outcome": "done", "said": "91.50%", "value": 90.5, "test": 91.5, "swept": ["a=1"]}
    )
    folder.begin(1, NAMES[1])
    folder.outcome(2, {"run": NAMES[2], "outcome": "failed", "said": "no memory", "swept": ["a=3"]})
    keep_run(root / RUNS / NAMES[0], root / TABLE)
    return root


RECORDS = {
    "plan": f"{SWEEP}/plan.json",
    "outcome": f"{SWEEP}/002.json",
    "running": f"{SWEEP}/running-001.json",
    "status": f"{RUNS}/{NAMES[1]}/status.json",
    "result": f"{RUNS}/{NAMES[0]}/result.json",
}
FILES = {
    **RECORDS,
    "table": f"{TABLE}/{FILE}",
    "config": f"{RUNS}/{NAMES[0]}/config.yaml",
    "metrics": f"{RUNS}/{NAMES[0]}/metrics.csv",
    "updates": f"{RUNS}/{NAMES[0]}/updates.jsonl",
}
SEALED = {"plan", "outcome", "running", "result"}


def contents() -> dict[str, bytes]:
    """What is no record, by what it is."""
    return {
        "empty": b"",
        "blank": b" \n\n",
        "null": b"null",
        "a number": b"7",
        "a list": b"[]",
        "a text": b'"text"',
        "torn": b'{"state": "done", "name": "a',
        "UTF-16": '{"state": "done"}'.encode("utf-16"),
        "not UTF-8": b'{"state": "\xff\xfe\x80"}',
        "zeros": bytes(1000),
        "NaN": b'{"state": NaN, "jobs": NaN, "test_accuracy": NaN}',
        "infinity": b'{"jobs": Infinity, "epoch": -Infinity, "test_accuracy": 1e999}',
        "5,000 digits": b'{"jobs": ' + b"9" * 5000 + b"}",
        "deep lists": b"[" * 100_000,
        "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "deep but whole": b'{"a":' * 900 + b"1" + b"}" * 900,
        "a million lists": b"[" + b"[]," * 1_000_000 + b"[]]",
        "half a surrogate": b'{"state": "\\ud800", "run": "\\udfff"}',
    }


def fifo(path: Path) -> None:
    os.mkfifo(path)


def socket_of_a_server(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # an address has at most 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def sparse_file(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(10**9)


PLACES: dict[str, Callable[[Path], None]] = {
    "a pipe": fifo,
    "a socket": socket_of_a_server,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "memory": lambda path: path.symlink_to("/proc/self/mem"),
    "a gigabyte of zeros": sparse_file,
}


def put(path: Path, what: str) -> None:
    """Lay what `contents` or `PLACES` calls so in the place of a file."""
    path.unlink()
    if what in PLACES:
        PLACES[what](path)
    else:
        path.write_bytes(contents()[what])


VALUES: list[Any] = [
    *(None, True, False, 0, -1, 7, 1e9, 10**9, 10**400, 1e308, -0.0, 2.5, 7e9),
    *("", "7", "x" * 100_000, "../../../etc", "a/b", "..", "\x1b[2J\u202e\n", "\0", "ü", "2026-13-01"),
    *([], [[]], {}, [None] * 3, {"name": "../x"}, [{"name": []}], {"a": {"b": [1, {"c": None}]}}),
]


def nodes(plain: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value of a record, the record itself first."""
    yield path
    inner = plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list) else ()
    for key, value in inner:
        if key != "checksum":
            yield from nodes(value, (*path, key))


def replaced(plain: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The record with one node of it replaced."""
    if not path:
        return value
    new = copy.deepcopy(plain)
    place = new
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return new


def write(path: Path, record: Any, *, sealed: bool) -> None:
    """As one who knows how a checksum is made would write it."""
    if sealed and isinstance(record, dict):
        write_record(path, {key: value for key, value in record.items() if key != "checksum"})
    else:
        path.write_text(json.dumps(record))
