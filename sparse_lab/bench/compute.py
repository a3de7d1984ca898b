"""`sparse-lab bench compute`: sparse arithmetic against dense, one network after the other."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from sparse_lab.bench import inference, layers, memory, picture, table, training
from sparse_lab.bench.cells import (
    DENSE,
    IMAGE_SIZE,
    INFERENCE,
    LAYERS,
    SPARSE,
    TRAINING,
    Cell,
    Entry,
    Measured,
    Say,
    Settings,
)
from sparse_lab.bench.patterns import Patterns, build
from sparse_lab.bench.roofline import Machine, machine
from sparse_lab.bench.rounds import Budget, measure, too_slow, trial_batch
from sparse_lab.errors import UserError
from sparse_lab.sparsity import masks

WEIGHTS = {LAYERS: 1.0, TRAINING: 2.0, INFERENCE: 1.0}  # shares of the time
MEMORY_AT = 99.0  # percent: the sparsity, of those asked for, whose peak memory is measured is the nearest to it


def run(settings: Settings, out: Path) -> int:
    """Measure, print, and write compute.csv and compute.png. Exit status 0, or 130 after Ctrl-C."""
    for model in settings.models if set(settings.what) != {LAYERS} else ():
        _check(model, settings)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"bench: cannot write to {out} ({error.strerror}): choose another --out") from None
    say, done = _progress()
    measured, peaks, status = Measured(), None, 0
    heading = table.heading(settings)
    print("\n".join(table.title(heading)), flush=True)
    try:
        say("what the machine can do at best")
        peaks = machine()
        collect(settings, measured, say)
    except KeyboardInterrupt:
        measured.note("interrupted: not everything was measured")
        status = 130
    finally:
        done()
        finish(measured, peaks, heading, settings, out)
    return status


def _check(model: str, settings: Settings) -> None:
    """Raises UserError for a network that cannot be built, or whose layers do not all keep a weight."""
    import torch

    from sparse_lab import models

    with torch.device("meta"):
        network = models.build(model, 10, settings.width, IMAGE_SIZE)
    for sparsity in settings.sparsities:
        kept, needed = masks.num_kept(sparsity / 100.0, masks.count(network)), len(masks.layers(network))
        if kept < needed:
            raise UserError(
                f"bench: {model} has {needed} layers, and {sparsity:g}% leaves {kept} weights: "
                f"choose a lower --sparsity or a larger --width"
            )


def collect(settings: Settings, measured: Measured, say: Say) -> None:
    """Single layers, then all networks, training before inference: what says most comes first, for the time may be over
    before the end.
    """
    work = [(what, model) for what in settings.what if what != LAYERS for model in settings.models]
    kinds_of_layers = layers.kinds(settings.width) if LAYERS in settings.what else []
    shares = [WEIGHTS[LAYERS] / len(kinds_of_layers) for _ in kinds_of_layers]
    budget = Budget(60.0 * settings.minutes, shares + [WEIGHTS[what] for what, _ in work])
    patterns = {model: Patterns(model, settings.width, settings.sparsities) for model in settings.models}
    kinds: dict[str, Callable[[str, Settings, Patterns], Iterator[Entry]]] = {
        TRAINING: training.entries,
        INFERENCE: inference.entries,
    }
    for kind in kinds_of_layers:
        measure(list(layers.entries(kind, settings)), settings.repeats, budget.part(), measured, say)
    for what, model in work:
        over = budget.part()
        say(f"{model}, {what}", "making ready")
        if what == TRAINING:
            _memory(settings, model, patterns[model], measured, say)
        here = _without_hopeless_bf16(settings, what, model, measured)
        measure(list(kinds[what](model, here, patterns[model])), settings.repeats, over, measured, say)


def _without_hopeless_bf16(settings: Settings, what: str, model: str, measured: Measured) -> Settings:
    if "bf16" not in settings.against:
        return settings
    room = training if what == TRAINING else inference
    network = build(model, settings.width).train(what == TRAINING)
    images = trial_batch(settings.batch)
    pair = room.dense_entry(model, network, images), room.bfloat16_entry(model, network, images)
    if not too_slow(*pair, measured):
        return settings
    return replace(settings, against=tuple(name for name in settings.against if name != "bf16"))


def _memory(settings: Settings, model: str, patterns: Patterns, measured: Measured, say: Say) -> None:
    """Of a dense step, and of a sparse one under the first kind of masks."""
    sparsity = min(settings.sparsities, key=lambda one: abs(one - MEMORY_AT))
    dense = Cell(model, TRAINING, settings.batch, DENSE)
    sparse = Cell(model, TRAINING, settings.batch, SPARSE, settings.masks[0], sparsity)
    for cell, pattern in ((dense, None), (sparse, partial(patterns, sparse.mask, sparsity))):
        say(f"{model}, peak memory", str(cell))
        found = memory.peak(
            model, settings.width, settings.batch, None if pattern is None else pattern(), settings.storage
        )
        if found is None:
            measured.note(f"the process that measures memory failed for {cell}")
        else:
            measured.about(cell).start_mib, measured.about(cell).peak_mib = found


def finish(measured: Measured, peaks: Machine | None, heading: dict[str, str], settings: Settings, out: Path) -> None:
    """Print what there is and write it."""
    print("\n".join(table.lines(measured, peaks, settings)))
    if not measured.seconds:
        return
    table.save(out / "compute.csv", measured, peaks, heading)
    drawn = [out / "compute.csv"]
    if measured.works():
        picture.save(out / "compute.png", measured, heading)
        drawn.append(out / "compute.png")
    print("written: " + ", ".join(os.path.relpath(path) for path in drawn))


def _progress() -> tuple[Say, Callable[[], None]]:
    """What is measured now: a line that is written over on a terminal, else a line for each new piece of work."""
    if sys.stderr.isatty():
        from rich.console import Console

        status = Console(stderr=True).status("", refresh_per_second=2)  # a spinner takes time from what is timed
        status.start()
        return lambda work, detail="": status.update(f"{work}  {detail}"), status.stop
    said: list[str] = []

    def say(work: str, detail: str = "") -> None:
        if said[-1:] != [work]:
            said.append(work)
            print(f"measuring {work}", file=sys.stderr, flush=True)

    return say, lambda: None
