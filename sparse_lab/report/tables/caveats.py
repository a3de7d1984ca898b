"""What a reader must know before trusting a table: one line each, found in the records themselves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from sparse_lab.records.record import is_number
from sparse_lab.report.load.published import TOLERANCE
from sparse_lab.report.load.records import Finished, section
from sparse_lab.report.tables.aggregate import distinct
from sparse_lab.report.tables.cell import percent
from sparse_lab.report.tables.data_used import computed, data_changed, data_of, few, partial
from sparse_lab.report.tables.labels import changing, labels


def notes(runs: Sequence[Finished]) -> list[str]:
    """Left-out runs, unofficial data files, selection on test, missed targets and settings that change along a row."""
    counted, left_out = distinct(runs)
    return [
        *left_out,
        *_unofficial(counted),
        *_selected_on_test(counted),
        *_selected_on_few(counted),
        *_subsets(counted),
        *_other_data(counted),
        *_computed(counted),
        *_estimated(counted),
        *_not_counted(counted),
        *_not_followed(counted),
        *_missed(counted),
        *_uneven(counted),
        *changing(counted, labels(counted)),
    ]


def _unofficial(runs: Sequence[Finished]) -> list[str]:
    files: dict[tuple[str, str], int] = defaultdict(int)
    for run in runs:
        data = section(run.result, "data")
        if data.get("official") is not True:
            md5 = data.get("md5")
            said = ", ".join(f"{name} {value}" for name, value in sorted(md5.items())) if isinstance(md5, dict) else md5
            files[run.result["dataset"], str(said or "not recorded")] += 1
    return [f"{name}: files not official (md5 {said}) in {_runs(count)}" for (name, said), count in files.items()]


def _selected_on_test(runs: Sequence[Finished]) -> list[str]:
    count = sum(run.result.get("selected_on") == "test" for run in runs)
    return [f"selected on test in {_runs(count)}: these accuracies are optimistic"] if count else []


def _selected_on_few(runs: Sequence[Finished]) -> list[str]:
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for run in runs:
        if (line := few(run)) is not None:
            counts[run.result["dataset"], line] += 1
    return [f"{name}: {line} in {_runs(count)}: next to chance" for (name, line), count in counts.items()]


def _subsets(runs: Sequence[Finished]) -> list[str]:
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for run in runs:
        for line in partial(run):
            counts[run.result["dataset"], line] += 1
    return [f"{name}: {_runs(count)} {line}" for (name, line), count in counts.items()]


def _other_data(runs: Sequence[Finished]) -> list[str]:
    """Cells whose records disagree on the data, and runs whose data changed."""
    read: dict[str, set[str]] = defaultdict(set)
    names: dict[str, str] = {}
    for run in runs:
        read[run.cell].add(data_of(run))
        names.setdefault(run.cell, run.name)
    lines = [f"{run.name}: the files of its data set changed while it trained" for run in runs if data_changed(run)]
    return lines + [
        f"{names[cell]} and its other seeds did not read the same data ({len(data)} different sets of files)"
        for cell, data in read.items()
        if len(data) > 1
    ]


def _computed(runs: Sequence[Finished]) -> list[str]:
    """How runs of one cell were computed, where that differs: it can change the last bits of a result."""
    ways: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for run in runs:
        for kind, value in computed(run):
            ways[kind][run.cell].add(value)
    lines = []
    for kind, cells in ways.items():
        mixed = [values for values in cells.values() if len(values) > 1]
        if mixed:
            found = sorted(set().union(*mixed))
            count = "1 cell was" if len(mixed) == 1 else f"{len(mixed)} cells were"
            lines.append(f"{count} computed with more than one {kind}: {', '.join(found)}")
    return lines


def _estimated(runs: Sequence[Finished]) -> list[str]:
    """Runs that did not know the norm that their gradients were clipped by."""
    count = sum("all_estimated" in _clipped_over(run) for run in runs)
    how = "clipped by an estimate of their norm over all positions (clip_over=all_estimated)"
    return [f"gradients were {how} in {_runs(count)}"] if count else []


def _clipped_over(run: Finished) -> list[object]:
    training = section(run.config, "training")
    return [one.get("clip_over") for one in (training, section(training, "finetune"), section(training, "regrow"))]


def _not_counted(runs: Sequence[Finished]) -> list[str]:
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for run in runs:
        found = run.result.get("uncounted")
        known = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
        if known:
            weights = sum(int(one["weights"]) for one in known if is_number(one.get("weights")))
            kinds = ", ".join(sorted({str(one.get("kind")) for one in known}))
            counts[run.result["model"], f"{weights:,} weights ({kinds})"] += 1
    return [f"{model}: {said} are not counted and dense in {_runs(count)}" for (model, said), count in counts.items()]


def _not_followed(runs: Sequence[Finished]) -> list[str]:
    """Networks of which it is not known whether their masks cut them."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for run in runs:
        why = section(run.levels[-1], "effective").get("not_known") if run.levels else None
        if isinstance(why, str):
            counts[run.result["model"], why] += 1
    return [
        f"{model}: which weights lie on a path is not known in {_runs(count)} ({why})"
        for (model, why), count in counts.items()
    ]


def _missed(runs: Sequence[Finished]) -> list[str]:
    return [
        f"{run.name}: asked for {percent(run.sparsity)}, reached {percent(run.result['sparsity'])}"
        for run in runs
        if run.result["method"] != "dense"
        and is_number(run.result.get("sparsity"))
        and abs(run.result["sparsity"] - run.sparsity) > TOLERANCE
    ]


def _uneven(runs: Sequence[Finished]) -> list[str]:
    kept: dict[str, set[int]] = defaultdict(set)
    names: dict[str, str] = {}
    for run in runs:
        if is_number(run.result.get("kept")):
            kept[run.cell].add(int(run.result["kept"]))
            names.setdefault(run.cell, run.name)
    return [
        f"{names[cell]} and its other seeds keep {min(counts):,} to {max(counts):,} weights: the table shows the most"
        for cell, counts in kept.items()
        if len(counts) > 1
    ]


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"
