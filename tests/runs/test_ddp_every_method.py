"""Every method of the gallery in two processes over gloo: both hold the same masks after every change, and the same
weights at the end.

One pair of processes makes all the runs (this file, started as a script), for starting a pair takes longer than most of
the runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import pytest

Pair = list[dict[str, dict[str, Any]]]
HERE = Path(__file__).parent
TABLE = runpy.run_path(str(HERE / "test_every_method.py"), run_name="table")
METHODS, FILTERS, COMMON, length = TABLE["METHODS"], TABLE["FILTERS"], TABLE["COMMON"], TABLE["length"]
SMALL = runpy.run_path(str(HERE.parent / "conftest.py"), run_name="conftest")["SMALL"]
# two steps an epoch in each
PAIR = ("trainer.devices=2", "trainer.accelerator=cpu", "training.batch_size=32", "dataset.train_limit=128")
LEVEL = ("kept", "best_epoch", "test_accuracy", "validation_accuracy")
SELECTED_ON_TEST = "oneshot, selected on the test set"  # which each process reads by itself
RUNS = {name: (f"method={name}", *length(name), *own) for name, own in METHODS.items()}
IN_GROUPS = "rigl, two batches a step"
RUNS[IN_GROUPS] = (*RUNS["rigl"], "training.accumulate=2")
RUNS[SELECTED_ON_TEST] = ("method=oneshot", *length("oneshot"), "training.select=test_best", "seed=2")
# one of each kind of algorithm (pruning and regrowth, drop and grow by gradients and at random, cycles, whole filters,
# the sphere); the others are for the night
FAMILIES = {"oneshot_regrow", "rigl", "mest", "east", "sfp", "prune_on_the_fly", IN_GROUPS, SELECTED_ON_TEST}


def run_in_a_pair(names: list[str], folder: Path) -> Pair:
    """What both processes say of these runs: [rank][name of the run]."""
    (folder / "names.json").write_text(json.dumps(names))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [start(rank, port, folder) for rank in (0, 1)]
    try:
        ended = time.monotonic() + 900
        while time.monotonic() < ended and any(one.poll() is None for one in both):
            if any(one.poll() for one in both):  # the other would wait for it
                break
            time.sleep(0.2)
    finally:
        for one in both:
            one.kill()
            one.wait()
    said = [[json.loads(line) for line in (folder / f"{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)]
    return [{row["name"]: row for row in rows} for rows in said]


def start(rank: int, port: int, folder: Path) -> subprocess.Popen[bytes]:
    """One of the two, with what Lightning tells the processes that it starts itself."""
    about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    own = {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with open(folder / f"{rank}.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, __file__, str(folder), str(rank)],
            env={**os.environ, **about, **own},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.full
def test_both_hold_the_same_masks_after_every_change(tmp_path):
    """One test: another for each method would be shared out over pytest's workers, and each would make the pair."""
    check_pair([name for name in RUNS if name in FAMILIES], tmp_path)


@pytest.mark.nightly(long=True)
def test_so_they_do_with_every_other_method(tmp_path):
    check_pair([name for name in RUNS if name not in FAMILIES], tmp_path)


def check_pair(names: list[str], folder: Path) -> None:
    pair = run_in_a_pair(names, folder)
    for said in pair:
        assert [*said] == [*names, "end"], list(said.values())[-1]
    for name in names:
        check_same(name, pair)


def check_same(name: str, pair: Pair) -> None:
    first, second = (said.get(name, {"error": "it was not reached"}) for said in pair)
    assert "error" not in first and "error" not in second, (first.get("error"), second.get("error"))
    for part in ("changes", "masks", "weights", "levels"):
        assert first[part] == second[part], (name, part)
    if name == "dense":
        assert first["kept"] == first["total"] and not first["changes"]
        return
    # controls only train on, whoever makes the run that they start from
    assert (first["own_changes"] > 0) is not name.endswith(("_extra", "_long")), name
    asked = round((1 - (0.93 if name.endswith("_extra") else 0.9)) * first["total"])
    if name in FILTERS:
        assert 0 < first["kept"] <= asked, name
    else:
        assert first["kept"] == asked, name


def work(folder: Path, rank: int) -> None:
    """All runs, one after the other; a line of JSON for each."""
    import torch
    from rich.console import Console

    from sparse_lab.experiment.build import Parts
    from sparse_lab.experiment.runner import run
    from sparse_lab.sparsity.masks import Masks
    from sparse_lab.sweep.plan import Request

    torch.set_num_threads(1)
    changes: list[str] = []
    made: list[tuple[Parts, int]] = []  # of each run, and how many changes there were when it began to train
    set_masks, put_together = Masks.set, Parts.__init__

    def watched(self, *rest, **more) -> None:
        set_masks(self, *rest, **more)
        changes.append(hash_of(self.masks()))

    def kept(self, *rest, **more) -> None:
        put_together(self, *rest, **more)
        made.append((self, len(changes)))

    Masks.set, Parts.__init__ = watched, kept  # type: ignore[method-assign]
    request = Request.read([])
    for name in json.loads((folder / "names.json").read_text()):
        changes.clear()
        made.clear()
        where = f"paths.outputs={folder / 'outputs'}"
        config = request.compose([*SMALL, *COMMON, *RUNS[name], *PAIR, where]).config()
        try:
            result = run(config, "test", Console(quiet=True))
        except BaseException:
            tell(folder, rank, {"name": name, "error": traceback.format_exc()})
            raise
        parts, before = made[-1]
        state = parts.model.named_parameters()
        tell(
            folder,
            rank,
            {
                "name": name,
                "changes": changes,
                "own_changes": len(changes) - before,
                "masks": hash_of(parts.masks.masks() if parts.masks else {}),
                "weights": hash_of({key: value.detach() for key, value in state}),
                "levels": [[level[key] for key in LEVEL] for level in parts.rounds.levels],
                **{key: result[key] for key in ("kept", "total")},
            },
        )
    tell(folder, rank, {"name": "end"})


def hash_of(tensors: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, value in tensors.items():
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


def tell(folder: Path, rank: int, row: dict[str, Any]) -> None:
    with open(folder / f"{rank}.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
