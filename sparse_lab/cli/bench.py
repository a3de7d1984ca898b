"""The words of `sparse-lab bench`. No torch here, so that --help answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparse_lab.bench.cells import INFERENCE, LAYERS, MASKS, OPPONENTS, RIVALS, SPARSITIES, TRAINING, Settings
from sparse_lab.errors import UserError
from sparse_lab.models import LIBRARIES, names

NETWORKS = [name for name in names() if name not in LIBRARIES]
COMPUTE = "sparse arithmetic against dense: training and inference at each sparsity (also without the word compute)"
TRAIN = "images a second of whole runs, dense and masked, beside a bare loop and a plain PyTorch loop"
OTHERS = {
    "selection": "exact top-k over 25 M scores, against a ResNet-34 training step (batch 128) and other ways to select",
    "masks": "what masks cost that hold after each optimizer step, and RigL attached to ResNet-34, against the step",
}
AFTER = """\
Every candidate is called in turn, round after round, so that what disturbs the machine disturbs all of them; a ratio is
the median of the ratios within a round, with the lowest and the highest beside it. Ctrl-C and --minutes end the bench
with a table of what there is.

  sparse-lab bench                                     VGG16 and ResNet-34, about 10 minutes each
  sparse-lab bench --model vgg16 --sparsity 99 99.9    one network, two sparsities
  sparse-lab bench --width 0.25 --repeats 3            narrow networks: a first look
  sparse-lab bench --what layers --against sparselab sparseprop   single layers, beside other libraries
"""

TRAIN_AFTER = """\
`images/s`: median over timed epochs of the steps alone; `whole epochs`: with validation, records and checkpoints;
`x bare`, `x plain`: against a bare loop over the same tensors and the same compiled step, and against a plain PyTorch
loop with torchvision's transforms in a DataLoader, both in the runs' precision; `overhead`: of masks and what changes
them, against the first line. A method with DyReLU or cycles has a line for each phase in which steps cost otherwise.

  sparse-lab bench train                                          VGG16 on what is here
  sparse-lab bench train --model resnet34 --method dense rigl east --sparsity 99.9 training=east
  sparse-lab bench train --model resnet34 --method east --sparsity 99.99 --device cpu training=east compute=sparse
    training.clip_over=all_estimated                              each phase of EAST, sparse, on a CPU
  sparse-lab bench train --method static --together 4             how much four runs at once get through
"""


def main(argv: list[str]) -> int:
    """Run one bench and print its table. Exit status 0, or 130 after Ctrl-C."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["compute", *argv]
    args = _parser().parse_args(argv)
    if args.bench == "compute":
        from sparse_lab.bench import compute

        return compute.run(_settings(args), args.out)
    if args.bench == "train":
        return _train(args)
    from sparse_lab.bench import interleaved, masks, selection

    times, base = {"selection": selection.measure, "masks": masks.measure}[args.bench](args.repeats)
    interleaved.show(args.bench, times, base)
    if args.csv is not None:
        interleaved.save(args.csv, times, base)
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="sparse-lab bench",
        formatter_class=raw,
        description="Speed on this machine, as ratios.",
        epilog="Without a word: compute, with compute's options (`sparse-lab bench compute --help`).\n\n" + AFTER,
    )
    benches = parser.add_subparsers(dest="bench", required=True)
    one = benches.add_parser("compute", help=COMPUTE, description=COMPUTE, epilog=AFTER, formatter_class=raw)
    many: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    one.add_argument(
        "--model", choices=NETWORKS, default=["vgg16", "resnet34"], help=_of(NETWORKS, "vgg16 resnet34"), **many
    )
    what = (TRAINING, INFERENCE, LAYERS)
    said = _of(what, "training and inference, and layers where a library is asked for that knows nothing else")
    one.add_argument("--what", choices=what, default=None, help=said, **many)
    one.add_argument("--masks", choices=MASKS, default=list(MASKS), help=_of(MASKS, "all"), **many)
    percent = (
        "percent of the weights that are zero, in [0, 100) (default " + " ".join(f"{s:g}" for s in SPARSITIES) + ")"
    )
    one.add_argument("--sparsity", type=float, nargs="+", default=list(SPARSITIES), metavar="PERCENT", help=percent)
    rivals = [name for name in RIVALS if name != "dense"]
    others = f"; {' and '.join(OPPONENTS)} (pip install NAME) know single layers"
    one.add_argument(
        "--against",
        choices=[*rivals, *OPPONENTS],
        nargs="*",
        default=rivals,
        metavar="NAME",
        help=_of([*rivals, *OPPONENTS], " ".join(rivals)) + f"; dense float32 is always measured{others}",
    )
    one.add_argument("--batch", type=int, default=128, help="images of a training step and of inference (default 128)")
    one.add_argument("--width", type=float, default=1.0, help="factor on every channel count (default 1)")
    stored = "how sparse training steps store maps: float32 or bf16 (default float32)"
    one.add_argument("--storage", choices=("float32", "bf16"), default="float32", help=stored)
    one.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds (default 5)")
    one.add_argument("--minutes", type=float, default=None, help="time for all of it (default: 10 for each network)")
    out = Path("outputs/bench")
    one.add_argument("--out", type=Path, default=out, metavar="DIR", help=f"for compute.csv and .png (default {out})")
    _train_words(benches.add_parser("train", help=TRAIN, description=TRAIN, epilog=TRAIN_AFTER, formatter_class=raw))
    for name, text in OTHERS.items():
        one = benches.add_parser(name, help=text, description=text)
        one.add_argument("--repeats", type=int, default=5, metavar="N", help="interleaved rounds (default 5)")
        one.add_argument("--csv", type=Path, default=None, metavar="FILE", help="write the table there too")
    return parser


def _train_words(one: argparse.ArgumentParser) -> None:
    one.add_argument("--model", choices=NETWORKS, default="vgg16", metavar="NAME", help=_of(NETWORKS, "vgg16"))
    methods = ["dense", "static", "rigl"]
    text = "methods that train from scratch; the others' overhead is against the first (default dense static rigl)"
    one.add_argument("--method", nargs="+", default=methods, metavar="NAME", help=text)
    one.add_argument("--sparsity", type=float, default=99.0, metavar="PERCENT", help="of the masks (default 99)")
    devices = ("auto", "cpu", "gpu")
    one.add_argument("--device", choices=devices, default="auto", help="default auto: a GPU where there is one")
    ways = ("auto", "full", "graphs", "off")
    one.add_argument("--compile", choices=ways, default="auto", help="trainer.compile (default auto: full on a GPU)")
    one.add_argument("--deterministic", action="store_true", help="only deterministic kernels (default: any)")
    one.add_argument("--batch", type=int, default=128, help="images of a step (default 128)")
    one.add_argument("--width", type=float, default=1.0, help="factor on every channel count (default 1)")
    one.add_argument(
        "--steps", type=int, default=None, metavar="N", help="of an epoch (default: 300 on a GPU, 4 on a CPU)"
    )
    one.add_argument("--epochs", type=int, default=3, metavar="N", help="timed ones, after one that is not (default 3)")
    one.add_argument("--repeats", type=int, default=2, metavar="N", help="of everything, in turn (default 2)")
    one.add_argument("--workers", type=int, default=4, metavar="N", help="of the plain loop's DataLoader (default 4)")
    text = "then N runs of the last method at once, each a process, against one with a single thread (default 0: none)"
    one.add_argument("--together", type=int, default=0, metavar="N", help=text)
    one.add_argument("--csv", type=Path, default=None, metavar="FILE", help="write the table there too")
    one.add_argument("option", nargs="*", metavar="KEY=VALUE", help="further settings of the runs, as for sparse-lab")


def _train(args: argparse.Namespace) -> int:
    from sparse_lab.bench import together, train, train_table
    from sparse_lab.training.device import device_of

    on_gpu = device_of("cpu" if args.device == "cpu" else "auto").type == "cuda"
    numbers = ("batch", "epochs", "repeats")
    steps = (300 if on_gpu else 4) if args.steps is None else args.steps
    for name, value, least in (
        *((name, getattr(args, name), 1) for name in numbers),
        ("steps", steps, 1),
        ("workers", args.workers, 0),
        ("together", args.together, 0),
    ):
        if value < least:
            raise UserError(f"bench train: --{name} must be at least {least}, not {value}")
    settings = train.Settings(
        model=args.model,
        methods=tuple(dict.fromkeys(args.method)),
        sparsity=args.sparsity,
        device=args.device,
        compile=args.compile,
        deterministic=args.deterministic,
        batch=args.batch,
        width=args.width,
        steps=steps,
        epochs=args.epochs,
        repeats=args.repeats,
        workers=args.workers,
        together=args.together,
        options=tuple(args.option),
    )
    print(train_table.title(settings), flush=True)

    def say(line: str) -> None:
        print(f"  {line}", flush=True)

    found = train.measure(settings, say)
    print(train_table.text(found), flush=True)
    if args.csv is not None:
        train_table.save(args.csv, settings, found)
    if settings.together:
        print(together.measure(settings, settings.methods[-1], say) or f"{settings.together} runs at once: one failed")
    return 0


def _of(choices: Iterable[str], default: str) -> str:
    return f"{', '.join(choices)} (default {default})"


def _settings(args: argparse.Namespace) -> Settings:
    """Raises UserError for a number out of range."""
    minutes = 10.0 * len(set(args.model)) if args.minutes is None else args.minutes
    for name, value, fits in (
        ("sparsity", args.sparsity, all(0.0 <= one < 100.0 for one in args.sparsity)),
        ("batch", args.batch, args.batch >= 1),
        ("repeats", args.repeats, args.repeats >= 1),
        ("minutes", minutes, minutes > 0.0),
    ):
        if not fits:
            allowed = "in [0, 100)" if name == "sparsity" else "at least 1" if name != "minutes" else "above 0"
            raise UserError(f"bench: --{name} must be {allowed}, not {value}")
    others = [name for name in args.against if name in OPPONENTS]
    what = tuple(dict.fromkeys(args.what or [*([LAYERS] if others else []), TRAINING, INFERENCE]))
    if others and LAYERS not in what:
        raise UserError(f"bench: {others[0]} knows single layers alone: add {LAYERS} to --what")
    return Settings(
        models=tuple(dict.fromkeys(args.model)),
        what=what,
        masks=tuple(dict.fromkeys(args.masks)),
        sparsities=tuple(sorted(set(args.sparsity))),
        against=tuple(dict.fromkeys(args.against)),
        batch=args.batch,
        width=args.width,
        repeats=args.repeats,
        minutes=minutes,
        storage=args.storage,
    )
