"""Copy the records of finished runs, without their checkpoints, so that a table can be made again from a small folder.

python scripts/keep_records.py outputs results/NAME
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

KEPT = ("config.yaml", "status.json", "metrics.csv", "result.json")


def keep(source: Path, target: Path) -> int:
    """Copy the four small files of every finished run below `source`; returns how many runs that were."""
    runs = sorted(path.parent for path in source.rglob("result.json"))
    for run in runs:
        (target / "runs" / run.name).mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            shutil.copyfile(run / name, target / "runs" / run.name / name)
    return len(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description="Copy records without checkpoints.")
    parser.add_argument("source", type=Path, help="a tree of runs")
    parser.add_argument("target", type=Path, help="folder to copy to")
    args = parser.parse_args()
    print(f"{keep(args.source, args.target)} records kept in {args.target}")


if __name__ == "__main__":
    main()
