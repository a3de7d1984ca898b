"""`sparse-lab evaluate RUN_OR_FILE`: a network that was trained, on its test set or on other images."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparse_lab.evaluate.evaluation import Evaluation

EPILOG = """\
examples:
  sparse-lab evaluate outputs/runs/NAME                                    # its own test set again, class by class
  sparse-lab evaluate outputs/runs/NAME --data photos/2024                 # all photos there, or their test/
  sparse-lab evaluate network.sparse --data more.npz --json
  sparse-lab evaluate outputs/runs/NAME --data dataset=cifar10 paths.data=/data dataset.eval_limit=1000
  sparse-lab evaluate outputs/runs/NAME/checkpoints/last.ckpt --split validation

RUN_OR_FILE: a run's folder; a checkpoint in it (best.ckpt, last.ckpt); or a file of sparse-lab export (.sparse, .onnx,
.pt). --data: a folder of photos, an .npz file, or words of the command (dataset=NAME, dataset.KEY=VALUE,
paths.data=DIR); words without dataset=NAME change the run's own data. Images are normalised as the network's were.
Classes are matched by name where both sides have names, else by number. Shown is the test set; of other data without
one, all of it.

Written beside the run, or the file: evaluations/NAME.json and NAME.png (the confusion matrix). The same request has the
same name. Calibration error: 15 bins of equal width (Guo et al. 2017, arXiv 1706.04599).
"""
LISTED = 30  # classes; of more the worst
WORST = 10
NAMED = 5
WIDEST = 30  # of a class's name


def main(argv: list[str]) -> int:
    """Evaluate, print, write. Returns 0; raises UserError for what cannot be evaluated."""
    args = _parser().parse_args(argv)
    from sparse_lab.evaluate import evaluation, images, subject

    network = subject.opened(args.subject)
    shown = images.chosen(network, args.data, args.split)
    folder = evaluation.folder_of(network, args.out)
    done = evaluation.evaluate(network, shown)
    if args.json:
        from sparse_lab.records.redaction import clean

        print(json.dumps(clean(done.record), indent=2, allow_nan=False))
        print(evaluation.write(done, folder), file=sys.stderr)
        return 0
    from sparse_lab.records.atomic_io import printable

    for line in _lines(done):
        print(printable(line))
    print(evaluation.write(done, folder))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparse-lab evaluate",
        description="Show a trained network images, and say how good it is: top-1 and top-5 accuracy, accuracy class "
        "by class and over the classes alike (balanced), loss, calibration error, and what is taken for what.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("subject", type=Path, metavar="RUN_OR_FILE")
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="WORD", help="a path, or KEY=VALUE words; default: the run's own"
    )
    parser.add_argument("--split", choices=("test", "validation", "train"), help="default: test")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: evaluations/ beside the run or the file")
    parser.add_argument("--json", action="store_true", help="print the record, and nothing else")
    return parser


def _lines(done: Evaluation) -> Iterator[str]:
    record = done.record
    network, about = record["network"], record["data"]
    yield f"{network['name'] or network['file']} on {about['said']} (classes matched by {about['classes_matched_by']})"
    top5 = f", top-5 {record['top5']:.2f}%" if "top5" in record else ""
    yield (
        f"top-1 {record['top1']:.2f}%{top5}, balanced {record['balanced_accuracy']:.2f}%, loss {record['loss']:.4f}, "
        f"calibration error {record['calibration_error']:.2f}% (15 bins)"
    )
    said = network["test_accuracy"]
    whole = about["split"] == "test" and about["used"] == about["whole"]
    if whole and about["trained_on_these_files"] and said is not None:
        yield f"the run's record says {said:.2f}%"
    if absent := about["classes_without_an_image"]:
        more = f" and {len(absent) - NAMED:,} more" if len(absent) > NAMED else ""
        yield f"note: no image of {', '.join(absent[:NAMED])}{more}: {len(absent):,} of {len(done.names):,} classes"
    yield from _table(done)


def _table(done: Evaluation) -> Iterator[str]:
    """A line a class with images, or the worst ones: how many are recognised, and what most others are taken for."""
    from rich.cells import cell_len, set_cell_size

    found = [(name, one["images"], one["accuracy"]) for name, one in done.record["per_class"].items() if one["images"]]
    if len(found) > LISTED:
        found = sorted(found, key=lambda one: one[2])[:WORST]
        yield f"the {WORST} classes that are recognised worst:"
    shown = {name: set_cell_size(name, min(cell_len(name), WIDEST)) for name, _, _ in found}
    width = max(5, *map(cell_len, shown.values()))
    yield f"{'class':{width}}  images  accuracy  most often taken for"
    for name, images, accuracy in found:
        others = {other: count for other, count in done.record["confusion"][name].items() if other != name}
        most = max(others, key=lambda other: others[other], default=None)
        taken = "" if most is None else f"  {most} ({others[most]:,})"
        yield f"{set_cell_size(shown[name], width)}  {images:6,}  {accuracy:7.2f}%{taken}"
