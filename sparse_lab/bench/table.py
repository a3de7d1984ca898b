"""What was measured as text for a terminal, and as one CSV file that says all by itself."""

from __future__ import annotations

import csv
import datetime
import io
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from sparse_lab.bench.cells import (
    BACKWARD,
    DENSE,
    FORWARD,
    OPPONENTS,
    RIVALS,
    SAID,
    SPARSE,
    TRAINING,
    Cell,
    Facts,
    Measured,
    Settings,
    Spread,
)
from sparse_lab.bench.roofline import Machine, Work
from sparse_lab.bench.rounds import trial_batch
from sparse_lab.host.machine import version
from sparse_lab.records.atomic_io import write_text_atomic
from sparse_lab.records.system import commit, device_name

COLUMN = 12  # characters of a number
LABEL = 34
CUT = "*"  # behind a sparsity whose masks let no path through


def heading(settings: Settings) -> dict[str, str]:
    """Where and when, for the head of the table and for every row of the CSV."""
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "commit": commit() or "",
        "machine": device_name(torch.device("cpu")).removeprefix("cpu: "),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": version("numba") or "",
        "onnxruntime": version("onnxruntime") or "",
        **{name: version(name) or "" for name in OPPONENTS if name in settings.against},
        "width": f"{settings.width:g}",
        "storage": settings.storage,
    }


def title(head: dict[str, str]) -> list[str]:
    width = "" if head["width"] == "1" else f", width {head['width']}"
    versions = ", ".join(
        f"{name} {head[name]}" for name in ("python", "torch", "numba", "onnxruntime", *OPPONENTS) if head.get(name)
    )
    stored = "" if head["storage"] == "float32" else f", maps of sparse training stored in {head['storage']}"
    first = f"sparse-lab bench compute, {head['date']}, commit {head['commit'] or 'unknown'}{width}{stored}"
    return [first, head["machine"], versions]


def lines(measured: Measured, peaks: Machine | None, settings: Settings) -> Iterator[str]:
    """Everything that there is to print below the title."""
    if peaks is not None:
        pace = f"{peaks.bytes / 1e9:.1f} GB/s (streaming)"
        yield f"at best: {peaks.operations / 1e9:.0f} GFLOP/s (float32 matmul), {pace}"
    works = measured.works()
    for work in works:
        yield ""
        yield from _work(measured, work)
        for mask in measured.masks(*work):
            yield from _mask(measured, work, mask, peaks)
    yield from _kernels(measured, works)
    yield from _memory(measured)
    yield from _break_even(measured, works)
    if any(facts.connected is False for facts in measured.facts.values()):
        yield f"{CUT} no path leads from the image to a logit: such a network computes nothing, however fast"
    yield from measured.notes
    if measured.missing:
        yield f"not measured, for {settings.minutes:g} minutes were over (--minutes):"
        yield from (f"  {line}" for line in _grouped(measured.missing))


def _work(measured: Measured, work: tuple[str, str, int]) -> Iterator[str]:
    model, what, batch = work
    yield f"{model}, {SAID[what]}, batch {batch}"
    for name, said in RIVALS.items():
        cell = Cell(model, what, batch, name)
        if measured.time(cell) is None and name == "bf16":
            cell = Cell(model, what, trial_batch(batch), name)
        time, ratio = measured.time(cell), measured.ratio(cell)
        if time is None or ratio is None:
            continue
        rounds = "once" if time.rounds == 1 else f"{time.rounds} rounds"
        said += "" if cell.batch == batch else f" (batch {cell.batch})"
        faster = "" if name == DENSE else f"  {_number(ratio.median)}x dense float32 ({_range(ratio)})"
        yield f"  {said:{LABEL - 2}}{_ms(time.median)} ms ({_ms(time.low)}-{_ms(time.high)}, {rounds}){faster}"


def _mask(measured: Measured, work: tuple[str, str, int], mask: str, peaks: Machine | None) -> Iterator[str]:
    cells = measured.line(*work, mask)
    facts = [measured.about(cell) for cell in cells]
    times = [measured.time(cell) for cell in cells]
    names = [f"{cell.sparsity:g}%{CUT * (known.connected is False)}" for cell, known in zip(cells, facts, strict=True)]
    yield _row(f"  sparse, {mask} masks", names)
    yield _row("    milliseconds", ["" if time is None else _ms(time.median) for time in times])
    best = measured.best_dense(cells[0])
    against = [name for name in RIVALS if measured.ratio(cells[0].rival(name)) is not None]
    for name in against:
        ratios = [measured.ratio(cell, name) for cell in cells]
        said = f"times {RIVALS[name]}" + (" (best)" if name == best and len(against) > 1 else "")
        yield _row(f"    {said}", ["" if ratio is None else _number(ratio.median) for ratio in ratios])
        if name == DENSE:
            yield _row("      lowest-highest", ["" if ratio is None else _range(ratio) for ratio in ratios])
    for name in measured.opponents() if work[1] in (FORWARD, BACKWARD) else ():
        ratios = [measured.ratio(cell, name) for cell in cells]
        # one that does not know the layer has none
        yield _row(
            f"    times {OPPONENTS[name]}", ["-" if ratio is None else _number(ratio.median) for ratio in ratios]
        )
    if peaks is None or facts[0].macs is None:
        return
    reached = [roof(known, time, peaks) for known, time in zip(facts, times, strict=True)]
    for number, said in enumerate(("GFLOP/s", "GB/s", "bound / measured time, %")):
        yield _row(f"    {said}", ["" if one is None else _number(one[number]) for one in reached])


def roof(known: Facts, time: Spread | None, peaks: Machine) -> tuple[float, float, float] | None:
    """GFLOP/s and GB/s reached, and the least possible time as percent of the measured one."""
    if known.macs is None or known.bytes is None or time is None:
        return None
    bound = peaks.bound(Work(known.macs, known.bytes))
    return 2e-9 * known.macs / time.median, 1e-9 * known.bytes / time.median, 100.0 * bound / time.median


def _kernels(measured: Measured, works: Sequence[tuple[str, str, int]]) -> Iterator[str]:
    for work in works:
        for mask in measured.masks(*work)[:1]:
            cells = [cell for cell in measured.line(*work, mask) if measured.about(cell).shares]
            if not cells:
                continue
            yield ""
            yield _row(f"{work[0]}, {mask} masks: % of a step", [f"{cell.sparsity:g}%" for cell in cells])
            shares = [measured.about(cell).shares for cell in cells]
            for kind in dict.fromkeys(kind for share in reversed(shares) for kind in share):
                yield _row(f"  {kind}", [f"{100 * share.get(kind, 0.0):.1f}" for share in shares])


def _memory(measured: Measured) -> Iterator[str]:
    found = [(cell, known) for cell, known in measured.facts.items() if known.peak_mib is not None]
    if found:
        yield ""
        yield "peak resident memory of training steps, each in a process of its own (in it before the first step)"
    for cell, known in found:
        yield f"  {cell!s:{LABEL + 14}} {known.peak_mib:8,.0f} MiB ({known.start_mib:,.0f})"


def _break_even(measured: Measured, works: Sequence[tuple[str, str, int]]) -> Iterator[str]:
    yield ""
    for work in works:
        if work[1] == TRAINING:
            for mask in measured.masks(*work):
                best = RIVALS[measured.best_dense(Cell(*work, SPARSE))]
                where = measured.break_even(*work, mask)
                yield f"break-even of training, {work[0]}, {mask} masks: faster than the best dense ({best}) {where}"


def _grouped(cells: Sequence[Cell]) -> Iterator[str]:
    """Sparse cells of one kind of mask in one line."""
    groups: dict[str, list[str]] = {}
    for cell in cells:
        how = RIVALS.get(cell.candidate, f"{cell.candidate}, {cell.mask}")
        groups.setdefault(f"{cell.model}, {cell.what}, batch {cell.batch}: {how}", []).append(
            f"{cell.sparsity:g}%" if cell.mask else ""
        )
    return (f"{name} {' '.join(sorted(sparsities))}".rstrip() for name, sparsities in groups.items())


def _row(label: str, numbers: Sequence[str]) -> str:
    return f"{label:{LABEL}}" + "".join(f"{number:>{COLUMN}}" for number in numbers)


def _number(value: float) -> str:
    digits = 0 if value >= 99.5 else 1 if value >= 9.95 else 2
    return f"{value:.{digits}f}" if value >= 0.995 else f"{value:.3g}"


def _range(spread: Spread) -> str:
    return f"{_number(spread.low)}-{_number(spread.high)}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.0f}" if seconds >= 0.0995 else f"{1000 * seconds:.3g}"


def save(path: Path, measured: Measured, peaks: Machine | None, head: dict[str, str]) -> None:
    """One row a cell."""
    rows = [_record(measured, cell, peaks, head) for cell in measured.seconds]
    columns = dict.fromkeys(name for row in rows for name in row)
    kinds = [name for name in columns if name.startswith("share: ")]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*(name for name in columns if name not in kinds), *kinds], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomic(path, text.getvalue())


def _record(measured: Measured, cell: Cell, peaks: Machine | None, head: dict[str, str]) -> dict[str, object]:
    time, known = measured.time(cell), measured.facts.get(cell, Facts())
    assert time is not None
    row: dict[str, object] = {
        "model": cell.model,
        "what": cell.what,
        "batch": cell.batch,
        "candidate": cell.candidate,
        "masks": cell.mask,
        "sparsity": f"{cell.sparsity:g}" if cell.mask else "",
        "kept": known.kept,
        "weights": known.weights,
        "connected": known.connected,
        "rounds": time.rounds,
        **_columns(time, "{}_ms", lambda seconds: 1000 * seconds),
    }
    for name in (*RIVALS, *OPPONENTS):
        row |= _columns(measured.ratio(cell, name), f"times_{name}_{{}}")
    row |= _columns(measured.ratio(cell, measured.best_dense(cell)), "times_best_dense_{}")
    reached = None if peaks is None else roof(known, time, peaks)
    row |= {"macs": known.macs, "bytes": known.bytes}
    for number, name in enumerate(("gflop_per_s", "gb_per_s", "percent_of_bound")):
        row[name] = None if reached is None else f"{reached[number]:.5g}"
    row["peak_gflop_per_s"] = None if peaks is None else f"{peaks.operations / 1e9:.5g}"
    row["peak_gb_per_s"] = None if peaks is None else f"{peaks.bytes / 1e9:.5g}"
    row |= {"peak_mib": _rounded(known.peak_mib), "start_mib": _rounded(known.start_mib)}
    return {**row, **head, **{f"share: {kind}": f"{share:.4f}" for kind, share in known.shares.items()}}


def _columns(
    spread: Spread | None, name: str, of: Callable[[float], float] = lambda value: value
) -> dict[str, str | None]:
    parts = {"median": "median", "min": "low", "max": "high"}
    return {
        name.format(said): None if spread is None else f"{of(getattr(spread, part)):.5g}"
        for said, part in parts.items()
    }


def _rounded(value: float | None) -> str | None:
    return None if value is None else f"{value:.0f}"
