"""Do runs still end with the same bits? Makes a small run of every method and control and writes down what each left.

    python scripts/same_runs.py before.json                          on the commit before a change
    python scripts/same_runs.py after.json --against before.json     on the commit after it

Compared are the network with its masks, the optimizer's state and the random state of the last checkpoint, metrics.csv,
every mask change and the result; not compared is what must differ: names, times, commits, versions. Bits are those of
one machine: make both files on the same one. Exit status: 0 when all runs are equal, else 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

TOP = Path(__file__).resolve().parents[1]
TABLE = runpy.run_path(str(TOP / "tests" / "runs" / "test_every_method.py"), run_name="table")
SMALL = runpy.run_path(str(TOP / "tests" / "conftest.py"), run_name="conftest")["SMALL"]
LARGER = ("model.width=0.125", "dataset.train_limit=160", "training.batch_size=32")  # five steps an epoch
# what runs are asked beside their method: name -> overrides
VARIANTS: dict[str, tuple[str, ...]] = {
    "rigl, sparse": ("method=rigl", "compute=sparse", *TABLE["METHODS"]["rigl"]),
    "granet, sparse": ("method=granet", "compute=sparse", *TABLE["METHODS"]["granet"]),
    "east, sparse": ("method=east", "compute=sparse", *TABLE["METHODS"]["east"]),
    "iterative_regrow, sparse": ("method=iterative_regrow", "compute=sparse"),
    "acdc, adam": ("method=acdc", "training.optimizer=adam", "training.lr=0.003"),
    "rigl, adamw": ("method=rigl", "training.optimizer=adamw", "training.lr=0.003", *TABLE["METHODS"]["rigl"]),
    "rigl, clipped": ("method=rigl", "training.clip_norm=0.5", *TABLE["METHODS"]["rigl"]),
    "rigl, clipped over live": ("method=rigl", "training.clip_norm=0.5", "training.clip_over=live", "compute=sparse"),
    "gmp, nesterov": ("method=gmp", "training.nesterov=true", "schedule.cubic.every=2"),
    "oneshot_regrow, ssim": ("method=oneshot_regrow", "method.regrow.distribution=ssim", "method.regrow.value=kaiming"),
    "oneshot_regrow, on sparse": (
        "method=oneshot_regrow", "method.regrow.score_on=sparse", "method.regrow.score=gradient",
    ),
    "oneshot_regrow, dense": ("method=oneshot_regrow", "method.regrow.value=dense", "method.regrow.score=reference"),
    "oneshot, filters": ("method=l1_filters", "method.filters.flops=0.95"),
    "gmp, filters": ("method=l1_filters", "schedule=cubic", "schedule.cubic.every=2"),
    "lth, first epoch": ("method=lth", "method.prune.rewind_weights=1", "schedule.iterative.round_epochs=3"),
    "oneshot, patience": ("method=oneshot", "training.finetune.patience=1"),
    "oneshot, taylor": ("method=oneshot", "method.prune.score=taylor"),
    "rigl, diagnostics": ("method=rigl", *TABLE["METHODS"]["rigl"], *(
        f"diagnostics.{one}=true" for one in ("layers", "activations", "gradients")
    )),
}  # fmt: skip
# of result.json: what is of this moment, this machine or this commit; of configs, what keys are called
OF_THE_MOMENT = {
    "name", "cell", "hash", "request", "identity", "config", "command", "commit", "seconds", "started", "finished",
    "versions", "packages", "memory", "peak_memory_mb", "device", "checksum", "parent", "start", "host",
    "small_seconds",
}  # fmt: skip
CHANGES = {"rewire": "drop_and_grow", "mutate": "elastic_mutation"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="where to write what the runs left")
    parser.add_argument("--against", type=Path, metavar="FILE", help="what they left before")
    parser.add_argument("--only", default="", help="runs whose name holds this")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asked = {name: lines for name, lines in requests().items() if args.only in name}
        with ThreadPoolExecutor(2) as pool:
            made = pool.map(lambda item: left_by(Path(folder) / item[0].replace(", ", "-"), *item), asked.items())
            found = dict(zip(asked, made, strict=True))
    args.file.write_text(json.dumps(found, indent=1, sort_keys=True))
    if args.against is None:
        print(f"{len(found)} runs")
        return 0
    before = json.loads(args.against.read_text())
    wrong = {name: differing(before.get(name), now) for name, now in found.items()}
    for name, parts in wrong.items():
        print(f"{name}: {'the same bits' if not parts else 'DIFFERS in ' + ', '.join(parts)}")
    return int(any(wrong.values()))


def requests() -> dict[str, tuple[str, ...]]:
    table = {name: (f"method={name}", *TABLE["length"](name), *own) for name, own in TABLE["METHODS"].items()}
    return table | {name: (*TABLE["length"](name.partition(",")[0]), *own) for name, own in VARIANTS.items()}


def left_by(outputs: Path, name: str, own: tuple[str, ...]) -> dict[str, str]:
    """A hash for each thing that the run, and each run that it starts from, left."""
    command = [sys.executable, "-m", "sparse_lab", *SMALL, *LARGER, *TABLE["COMMON"], *own, f"paths.outputs={outputs}"]
    done = subprocess.run(command, cwd=TOP, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}
    found: dict[str, str] = {}
    # in the order in which they were made: names change
    for place in sorted((outputs / "runs").iterdir(), key=lambda one: (one / "config.yaml").stat().st_mtime_ns):
        label = place.name.rpartition("-")[0]
        while f"{label} result" in found:
            label += "'"
        found |= {f"{label} {part}": hash_of(value) for part, value in parts_of(place).items()}
    print(f"made {name}", flush=True)
    return found


def parts_of(place: Path) -> dict[str, Any]:
    from sparse_lab.training.checkpoint_io import load_checkpoint

    last = load_checkpoint(place / "checkpoints" / "last.ckpt")
    best = load_checkpoint(place / "checkpoints" / "best.ckpt")
    lines = {
        path.stem: [plain(json.loads(line)) for line in path.read_text().splitlines()] for path in place.glob("*.jsonl")
    }
    return {
        "network": best["network"],
        "last": last["state_dict"],
        "optimizer": last["optimizer_states"],
        "random": last["random_state"],
        "metrics": (place / "metrics.csv").read_text(),
        "result": plain(json.loads((place / "result.json").read_text())),
        **lines,
    }


def plain(value: Any) -> Any:
    """Without what is of the moment; mask changes by the names that they have now."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items() if key not in OF_THE_MOMENT}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return CHANGES.get(value, value) if isinstance(value, str) else value


def hash_of(value: Any) -> str:
    digest = hashlib.sha256()
    feed(digest, value)
    return digest.hexdigest()[:16]


def feed(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(str((value.dtype, tuple(value.shape))).encode() + value.contiguous().numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for one in value:
            feed(digest, one)
    else:
        digest.update(repr(value).encode())


def differing(before: dict[str, str] | None, now: dict[str, str]) -> list[str]:
    if before is None:
        return ["everything: it was not made before"]
    return sorted(part for part in before.keys() | now.keys() if before.get(part) != now.get(part)) or (
        ["everything: it failed"] if "error" in now else []
    )


if __name__ == "__main__":
    raise SystemExit(main())
