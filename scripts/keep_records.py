"""Copy the records of finished runs, without their checkpoints, so that a table can be made again from a small folder.

    python scripts/keep_records.py outputs results/NAME

The folders that the runs were told to use (paths.data, paths.outputs) become DATA and OUTPUTS in the copies: they name
one machine and mean nothing on another. Nothing else is changed; a record's checksum is that of the copy.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from omegaconf import OmegaConf

from sparse_lab.records.atomic_io import CHECKSUM, damaged, write_record, write_text_atomic

KEPT = ("config.yaml", "status.json", "metrics.csv", "result.json")
WHERE_THERE = ("updates.jsonl", "activations.jsonl", "gradients.jsonl")


def keep(source: Path, target: Path) -> int:
    """Copy the small files of every finished run below `source`; returns how many runs that were."""
    runs = sorted(path.parent for path in source.rglob("result.json"))
    for run in runs:
        keep_run(run, target)
    return len(runs)


def keep_run(run: Path, target: Path) -> None:
    """Copy the small files of one finished run to target/runs/NAME, its result last: with it the copy is whole."""
    place = target / "runs" / run.name
    place.mkdir(parents=True, exist_ok=True)
    paths = OmegaConf.load(run / "config.yaml").paths
    for name in (*(name for name in WHERE_THERE if (run / name).exists()), *KEPT):
        before = (run / name).read_text(encoding="utf-8")
        text = before
        for folder, neutral in sorted(((paths.outputs, "OUTPUTS"), (paths.data, "DATA")), key=lambda one: -len(one[0])):
            if Path(folder).is_absolute():
                for spelled in (folder, json.dumps(folder)[1:-1]):
                    text = text.replace(spelled, neutral)
        if name == "result.json" and text != before and CHECKSUM in (record := json.loads(text)):
            if damaged(json.loads(before)):
                raise ValueError(f"{run / name} is damaged: its checksum is wrong")
            write_record(place / name, record)
        else:
            write_text_atomic(place / name, text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Copy records without checkpoints.")
    parser.add_argument("source", type=Path, help="a tree of runs")
    parser.add_argument("target", type=Path, help="folder to copy to")
    args = parser.parse_args()
    print(f"{keep(args.source, args.target)} records kept in {args.target}")


if __name__ == "__main__":
    main()
