"""Copy the records of finished runs, without their checkpoints, so that a table can be made again from a small folder.

    python scripts/keep_records.py outputs results/NAME

The folders that the runs were told to use (paths.data, paths.outputs) become DATA and OUTPUTS in the copies: they name
one machine and mean nothing on another. Nothing else is changed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from omegaconf import OmegaConf

KEPT = ("config.yaml", "status.json", "metrics.csv", "result.json")
WHERE_THERE = ("updates.jsonl", "activations.jsonl", "gradients.jsonl")


def keep(source: Path, target: Path) -> int:
    """Copy the small files of every finished run below `source`; returns how many runs that were."""
    runs = sorted(path.parent for path in source.rglob("result.json"))
    for run in runs:
        (target / "runs" / run.name).mkdir(parents=True, exist_ok=True)
        paths = OmegaConf.load(run / "config.yaml").paths
        for name in (*KEPT, *(name for name in WHERE_THERE if (run / name).exists())):
            text = (run / name).read_text(encoding="utf-8")
            for folder, neutral in ((paths.outputs, "OUTPUTS"), (paths.data, "DATA")):
                if Path(folder).is_absolute():
                    text = text.replace(folder, neutral)
            (target / "runs" / run.name / name).write_text(text, encoding="utf-8")
    return len(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description="Copy records without checkpoints.")
    parser.add_argument("source", type=Path, help="a tree of runs")
    parser.add_argument("target", type=Path, help="folder to copy to")
    args = parser.parse_args()
    print(f"{keep(args.source, args.target)} records kept in {args.target}")


if __name__ == "__main__":
    main()
