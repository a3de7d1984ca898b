from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from sparse_lab.report import levels, load, long, read, wide
from sparse_lab.report.render.latex import _SIGNS, latex
from sparse_lab.report.render.sections import cells
from sparse_lab.report.tables.aggregate import COLUMNS
from sparse_lab.report.tables.caveats import notes
from sparse_lab.report.tables.cell import MARKS, marks, percent
from sparse_lab.report.tables.labels import foldable

Make = Callable[..., Path]


def tabulate(root: Path) -> pd.DataFrame:
    return long(read(root).results, load())


def test_mean_and_deviation_agree_with_the_statistics_module(make_run: Make, tmp_path: Path) -> None:
    values = [91.2, 90.7, 91.9, 88.4]
    for seed, value in enumerate(values):
        make_run(seed=seed, accuracy=value)
    table = tabulate(tmp_path)
    assert list(table.columns) == list(COLUMNS) and len(table) == 1
    row = table.iloc[0]
    assert row["seeds"] == 4
    assert row["mean"] == pytest.approx(statistics.fmean(values))
    assert row["std"] == pytest.approx(statistics.stdev(values))
    assert (row["min"], row["max"]) == (88.4, 91.9)
    assert row["kept"] == 9213


def test_one_seed_has_no_deviation(make_run: Make, tmp_path: Path) -> None:
    make_run(accuracy=90.0)
    table = tabulate(tmp_path)
    assert math.isnan(table.iloc[0]["std"])
    assert wide(table, "vgg16", "cifar10").loc["oneshot", "99% (9,213 kept)"] == "90.00 [91.03 ± 0.17] ↓"


def test_the_published_number_stands_beside_full_width_only(make_run: Make, tmp_path: Path) -> None:
    make_run(accuracy=92.0)
    make_run(accuracy=80.0, width=0.25)
    table = tabulate(tmp_path).set_index("width")
    assert table.loc[1.0, "published"] == 91.03 and table.loc[1.0, "published_std"] == 0.17
    assert table.loc[1.0, "difference"] == pytest.approx(92.0 - 91.03)
    assert math.isnan(table.loc[0.25, "published"]) and math.isnan(table.loc[0.25, "difference"])


def test_cells_that_differ_are_never_merged(make_run: Make, tmp_path: Path) -> None:
    make_run(accuracy=80.0, settings={"training.epochs": 3})
    make_run(accuracy=90.0, settings={"training.epochs": 5})
    table = tabulate(tmp_path)
    assert dict(zip(table["method"], table["mean"], strict=True)) == {
        "oneshot (training.epochs=3)": 80.0,
        "oneshot (training.epochs=5)": 90.0,
    }
    grid = wide(table, "vgg16", "cifar10")
    assert list(grid["99% (9,213 kept)"]) == ["80.00 [91.03 ± 0.17] ↓", "90.00 [91.03 ± 0.17] ↓"]


def test_a_variant_keeps_its_name_at_its_other_sparsities(make_run: Make, tmp_path: Path) -> None:
    make_run(sparsity=0.9, settings={"training.epochs": 3})
    make_run(sparsity=0.9, settings={"training.epochs": 5})
    make_run(sparsity=0.99, settings={"training.epochs": 3})
    make_run(method="gmp", sparsity=0.99)
    table = tabulate(tmp_path)
    assert set(table.loc[table["sparsity"] == 0.99, "method"]) == {"oneshot (training.epochs=3)", "gmp"}


def test_more_than_three_settings_are_cut_and_still_tell_cells_apart(make_run: Make, tmp_path: Path) -> None:
    common = {"training.epochs": 1, "training.lr": 0.5, "training.momentum": 0.1}
    make_run(accuracy=80.0)
    make_run(accuracy=81.0, settings={**common, "training.weight_decay": 0.1})
    make_run(accuracy=82.0, settings={**common, "training.weight_decay": 0.2})
    table = tabulate(tmp_path)
    assert len(set(table["method"])) == 3
    assert "oneshot (training.epochs=160, training.lr=0.1, training.momentum=0.9, ...)" in set(table["method"])
    grid = wide(table, "vgg16", "cifar10")
    assert sorted(cell[:5] for cell in grid.iloc[:, 0]) == ["80.00", "81.00", "82.00"]


def test_keys_that_change_no_result_are_not_named(make_run: Make, tmp_path: Path) -> None:
    for place, epochs in (("a", 3), ("b", 5)):
        silent = {"paths.data": place, "logger.project": place, "trainer.accelerator": place, "dataset.root": place}
        make_run(settings={**silent, "training.epochs": epochs})
    assert set(tabulate(tmp_path)["method"]) == {"oneshot (training.epochs=3)", "oneshot (training.epochs=5)"}


def test_records_of_before_a_key_was_renamed_differ_only_where_values_do(make_run: Make, tmp_path: Path) -> None:
    """Records with 0.1's names beside records with 0.2's: a row's name holds today's name of what differs, no other."""
    before = {"method.rewire.fraction": 0.3, "method.rewire.every": 100, "method.prune.allocation": "erk"}
    before |= {
        "method.parts": ["prune", "rewire"],
        "method.sharing": True,
        "method.cyclic": True,
        "method.cycles.every": 5,
    }
    before |= {"method.dyrelu": True, "method.phasing.begin": 0.2, "method.prune.unit": "filters", "method.regrow": {}}
    make_run(settings={**before, "schedule.name": "cubic", "schedule.every": 9, "schedule.end": 0.5})
    now = {"method.drop_and_grow.drop_fraction": 0.5, "method.drop_and_grow.update_every": 100}
    now |= {
        "method.prune.distribution": "erk",
        "method.sharing": {},
        "method.cycles.every": 5,
        "method.dyrelu.begin": 0.2,
    }
    make_run(settings={**now, "schedule.cubic.every": 9, "schedule.cubic.end": 0.5})
    assert set(tabulate(tmp_path)["method"]) == {
        "oneshot (method.drop_and_grow.drop_fraction=0.3)",
        "oneshot (method.drop_and_grow.drop_fraction=0.5)",
    }


def test_a_part_with_nothing_to_set_tells_rows_apart(make_run: Make, tmp_path: Path) -> None:
    make_run(settings={"method.name": "east", "method.sharing": {}})
    make_run(settings={"method.name": "east"})
    assert set(tabulate(tmp_path)["method"]) == {"oneshot (method.sharing={})", "oneshot"}


def test_cells_without_a_known_difference_are_told_apart_by_their_hash(make_run: Make, tmp_path: Path) -> None:
    make_run(accuracy=80.0, cell="aaaa", folder="a")
    make_run(accuracy=90.0, cell="bbbb", folder="b")
    assert set(tabulate(tmp_path)["method"]) == {"oneshot (cell aaaa)", "oneshot (cell bbbb)"}


def test_duplicates_count_once_and_the_last_one_counts(make_run: Make, tmp_path: Path) -> None:
    make_run(seed=1, accuracy=80.0, folder="z", updated="2026-01-01T00:00:00+00:00")
    make_run(seed=1, accuracy=90.0, folder="a", updated="2026-01-01T02:30:00+02:00")
    make_run(seed=2, accuracy=92.0, folder="b")
    make_run(seed=2, accuracy=92.0, folder="c")
    records = read(tmp_path)
    row = long(records.results, []).iloc[0]
    assert (row["seeds"], row["mean"]) == (2, 91.0)
    assert len(levels(records.results)) == 2
    said = notes(records.results)
    assert any("80.00%" in note and "90.00%" in note for note in said) and any(
        note.startswith("1 cop") for note in said
    )


def test_dense_is_at_sparsity_zero_and_heads_the_table(make_run: Make, tmp_path: Path) -> None:
    make_run(method="another", sparsity=0.99)
    make_run(method="dense", sparsity=0.99, accuracy=94.0)
    table = tabulate(tmp_path)
    assert list(table["method"]) == ["dense", "another"] and table.iloc[0]["sparsity"] == 0


def test_marks_say_what_was_not_clean(make_run: Make, seal: Callable[..., None], tmp_path: Path) -> None:
    make_run(seed=1, data={"md5": {"train.gz": "feed"}, "official": False}, selected_on="test")
    make_run(seed=2)
    make_run(method="cut", seed=1, folder="cut")
    path = tmp_path / "runs" / "cut" / "result.json"
    seal(path, json.loads(path.read_text().replace('"connected": true', '"connected": false')))
    records = read(tmp_path)
    table = long(records.results, [])
    grid = wide(table, "vgg16", "cifar10")
    assert grid.loc["oneshot"].iloc[0].endswith(" †‡≠") and grid.loc["cut"].iloc[0].endswith(" §")
    said = "\n".join(notes(records.results))
    assert "files not official (md5 train.gz feed)" in said and "selected on test in 1 run" in said
    assert "its other seeds did not read the same data (2 different sets of files)" in said
    assert not table.set_index("method").loc["cut", "connected"]


def test_notes_name_missed_targets_and_settings_that_change_along_a_row(
    make_run: Make, seal: Callable[..., None], tmp_path: Path
) -> None:
    make_run(sparsity=0.9)
    make_run(sparsity=0.99, settings={"training.epochs": 5})
    path = next((tmp_path / "runs").glob("*-90-*")) / "result.json"
    record = json.loads(path.read_text())
    kept = round(0.12 * record["total"])
    seal(path, {**record, "kept": kept, "sparsity": 1 - kept / record["total"]})
    said = notes(read(tmp_path).results)
    assert any("asked for 90%, reached 88%" in note for note in said)
    assert any("row also changes training.epochs" in note for note in said)


def test_levels_hold_every_level_of_every_run(make_run: Make, tmp_path: Path) -> None:
    steps = [(0.2, 93.0, 92.5), (0.36, 92.0, 91.5), (0.488, 91.0, 90.5)]
    for seed in (1, 2):
        make_run(method="iterative", sparsity=0.488, seed=seed, levels=steps)
    table = levels(read(tmp_path).results)
    assert list(table["level"]) == [1, 2, 3] * 2 and list(table["seed"]) == [1] * 3 + [2] * 3
    assert list(table["test_accuracy"]) == [92.5, 91.5, 90.5] * 2
    assert set(table["effective"]) == {7} and set(table["connected"]) == {True}


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0%"), (0.5, "50%"), (0.9685, "96.85%"), (0.9999, "99.99%"), (0.988471, "98.8471%")]
)
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


def test_a_setting_is_shown_with_the_digits_that_a_person_typed(make_run: Make, tmp_path: Path) -> None:
    make_run(settings={"training.lr": 0.1 * 3})
    make_run(settings={"training.lr": 0.0003})
    assert set(tabulate(tmp_path)["method"]) == {"oneshot (training.lr=0.3)", "oneshot (training.lr=0.0003)"}


def test_runs_on_a_subset_are_named(make_run: Make, tmp_path: Path) -> None:
    make_run(seed=1, settings={"dataset.train_limit": 77})
    make_run(method="whole", seed=1)
    said = [line for line in notes(read(tmp_path).results) if "trained on" in line]
    assert said == ["cifar10: 1 run trained on 77 images only"]


def test_effective_explored_and_reused_weights_are_means_and_maxima_over_seeds(
    make_run: Make, seal: Callable[..., None], tmp_path: Path
) -> None:
    for seed, (effective, explored, reuse) in enumerate([(30, 0.25, 120), (90, 0.5, 130), (None, None, None)]):
        said = {"explored": explored, "kept_with_reuse": reuse, "unique": 500}
        folder = make_run(seed=seed, levels=[(0.5, 90.0, 90.0), (0.99, 80.0, 80.0)], **said)
        path = folder / "result.json"
        record = json.loads(path.read_text())
        record["levels"][0]["effective"] = {"kept": 100, "effective": 1}
        record["levels"][1]["effective"] = {"kept": 100, "effective": effective}
        seal(path, record)
    make_run(method="old", levels=[(0.99, 80.0, 80.0)])
    table = tabulate(tmp_path).set_index("method")
    assert table.loc["oneshot", "effective"] == pytest.approx(0.6)
    assert table.loc["oneshot", "explored"] == pytest.approx(0.375)
    assert table.loc["oneshot", "kept_with_reuse"] == 130
    assert table.loc["old", ["effective", "explored", "kept_with_reuse"]].isna().all()


@pytest.mark.parametrize("value", ["much", -0.1, 1.5, True, float("nan"), 10**400])
def test_senseless_shares_are_not_counted(make_run: Make, tmp_path: Path, value: object) -> None:
    make_run(explored=value, kept_with_reuse=-1 if value == 1.5 else value)
    row = tabulate(tmp_path).iloc[0]
    assert math.isnan(row["explored"]) and pd.isna(row["kept_with_reuse"])


def test_filters_that_went_have_columns_of_their_own(make_run: Make, tmp_path: Path) -> None:
    small = {"parameters": 6022, "removed": {"flops": 0.84}, "removed_filters": {"flops": 0.64}}
    make_run(method="hrank", small=small)
    make_run(method="hrank", seed=2, small={**small, "parameters": 6000, "removed": {"flops": 0.86}})
    make_run(method="oneshot")
    table = tabulate(tmp_path).set_index("method")
    assert table.loc["hrank", "parameters_left"] == 6022
    assert table.loc["hrank", "flops_removed"] == pytest.approx(0.85)
    assert table.loc["hrank", "filters_only"] == pytest.approx(0.64)
    assert table.loc["oneshot", ["parameters_left", "flops_removed", "filters_only"]].isna().all()


def test_the_verdict_stands_where_a_number_is_published(make_run: Make, tmp_path: Path) -> None:
    for method, accuracy in (("oneshot", 91.1), ("lamp_oneshot", 90.0), ("synflow", 91.0), ("mine", 99.0)):
        make_run(method=method, accuracy=accuracy)
    table = tabulate(tmp_path).set_index("method")
    assert table["verdict"].dropna().to_dict() == {
        "oneshot": "within one published std",
        "lamp_oneshot": "below",
        "synflow": "above (no std given)",
    }
    grid = wide(table.reset_index(), "vgg16", "cifar10")["99% (9,213 kept)"]
    assert grid["oneshot"] == "91.10 [91.03 ± 0.17] ≈" and grid["synflow"] == "91.00 [90.08] ↑"
    assert grid["mine"] == "99.00"
    said = marks(table)
    assert [line[0] for line in said] == ["≈", "↑", "↓"] and "within one published" in said[0]


def test_what_runs_cost_is_a_mean_and_the_most_memory(make_run: Make, tmp_path: Path) -> None:
    for seed, seconds in ((1, 10.0), (2, 30.0)):
        cost = {"flops": {"inference_sparse": 100 * seed}, "peak_memory_mb": 5.5 * seed}
        make_run(seed=seed, seconds=seconds, **cost)
    make_run(method="old", seconds=0, flops=3, peak_memory_mb=-1)
    table = tabulate(tmp_path).set_index("method")
    costs = ["seconds", "inference_flops", "peak_memory_mb"]
    assert list(table.loc["oneshot", costs]) == [20.0, 150.0, 11.0]
    assert table.loc["old", costs].isna().all()


def test_a_setting_too_long_for_a_line_is_broken_before_its_value() -> None:
    label = "regrow (method.regrow.distribution=ssim, epochs=3)"
    assert foldable(label, 30) == "regrow (method.regrow.distribution= ssim, epochs=3)"
    assert foldable(label, 40) == label


def test_runs_on_part_of_the_data_are_marked_in_their_cell_and_named(make_run: Make, tmp_path: Path) -> None:
    def images(train: int, test: int) -> dict[str, dict[str, int]]:
        return {"train": {"used": train, "whole": 45_000}, "validation": {"used": 5_000, "whole": 5_000},
                "test": {"used": test, "whole": 10_000}}  # fmt: skip

    make_run(method="debug", images=images(45_000, 10))
    make_run(method="short", images=images(1_234, 10_000))
    make_run(method="whole", images=images(45_000, 10_000))
    make_run(method="old", settings={"training.limit_batches": 2})
    records = read(tmp_path)
    table = long(records.results, [])
    column = wide(table, "vgg16", "cifar10").iloc[:, 0]
    assert {method: cell.endswith(" ¶") for method, cell in column.items()} == {
        "debug": True, "short": True, "whole": False, "old": True,
    }  # fmt: skip
    assert {line for line in notes(records.results) if line.startswith("cifar10: 1 run ")} == {
        "cifar10: 1 run tested on 10 of 10,000 test images",
        "cifar10: 1 run trained on 1,234 of 45,000 training images",
        "cifar10: 1 run trained on 2 batches an epoch only",
    }
    assert any(line.startswith("¶ at least one run trained, selected or tested on part") for line in marks(table))


def test_epochs_that_next_to_no_images_selected_are_named(make_run: Make, tmp_path: Path) -> None:
    """Also where they are all that there are."""
    for method, selected_on, images in (
        ("one", "validation", 1),
        ("enough", "validation", 10),
        ("last", "last epoch", 1),
    ):
        make_run(method=method, selected_on=selected_on, settings={"dataset.num_classes": 10},
                 images={"validation": {"used": images, "whole": images}})  # fmt: skip
    assert [line for line in notes(read(tmp_path).results) if "selected" in line] == [
        "cifar10: epochs were selected by 1 validation image of 10 classes in 1 run: next to chance"
    ]


def test_a_cell_whose_records_disagree_on_the_data_is_marked(make_run: Make, tmp_path: Path) -> None:
    for seed, fingerprint in ((1, "a"), (2, "b")):
        make_run(method="two", seed=seed, data={"md5": {}, "official": True, "fingerprint": fingerprint})
        make_run(method="one", seed=seed, data={"md5": {}, "official": True, "fingerprint": "a"})
    make_run(method="moved", data={"md5": {}, "official": True, "fingerprint": "a", "changed": True})
    records = read(tmp_path)
    column = wide(long(records.results, []), "vgg16", "cifar10").iloc[:, 0]
    assert {method: "≠" in cell for method, cell in column.items()} == {"two": True, "one": False, "moved": True}
    said = notes(records.results)
    assert sum("did not read the same data (2 different sets of files)" in line for line in said) == 1
    assert sum("changed while it trained" in line for line in said) == 1


def test_seeds_that_were_computed_in_different_ways_are_named(make_run: Make, tmp_path: Path) -> None:
    way = {"device": "cpu: one, 2 threads", "torch": "2.15.0", "compile": "off", "deterministic": True}
    make_run(method="mixed", seed=1, computed=[way])
    make_run(method="mixed", seed=2, computed=[way, {**way, "torch": "2.16.0"}])
    make_run(method="same", seed=1, computed=[way])
    make_run(method="old", seed=1, device="cpu: other", versions={"torch": "2.14.0"})
    said = [line for line in notes(read(tmp_path).results) if "computed" in line]
    assert said == ["1 cell was computed with more than one version of torch: 2.15.0, 2.16.0"]


def test_runs_that_clipped_by_an_estimate_are_named(make_run: Make, tmp_path: Path) -> None:
    for seed, key in enumerate(("training.clip_over", "training.finetune.clip_over")):
        make_run(method="rigl", seed=seed, settings={key: "all_estimated"})
    make_run(method="set", settings={"training.clip_over": "all"})
    found = [line for line in notes(read(tmp_path).results) if line.startswith("gradients")]
    assert found == [
        "gradients were clipped by an estimate of their norm over all positions (clip_over=all_estimated) in 2 runs"
    ]


def test_rows_that_differ_in_their_data_or_processes_say_so(make_run: Make, tmp_path: Path) -> None:
    for cell, data, ranks in (("a", "0123456789ab", 0), ("b", "fedcba987654", 0), ("c", "0123456789ab", 2)):
        make_run(folder=cell, cell=cell, data={"md5": {}, "official": True, "fingerprint": data}, ranks=ranks)
    assert set(tabulate(tmp_path)["method"]) == {
        "oneshot (data=01234567)", "oneshot (data=fedcba98)", "oneshot (data=01234567, processes=2)",
    }  # fmt: skip


def test_kept_weights_that_are_zero_are_told_apart(make_run: Make, tmp_path: Path) -> None:
    make_run(method="oneshot", seed=1, nonzero=9213)
    make_run(method="rigl", seed=1, nonzero=9213)
    make_run(method="rigl", seed=2, nonzero=9104)
    make_run(method="set", sparsity=0.9, nonzero=92134)
    make_run(method="old", sparsity=0.9)
    table = tabulate(tmp_path)
    by_method = table.set_index("method")["nonzero"]
    assert (by_method["oneshot"], by_method["rigl"], by_method["set"]) == (9213, 9104, 92134)
    assert pd.isna(by_method["old"])
    assert list(wide(table, "vgg16", "cifar10")) == ["90% (92,134 kept)", "99% (9,213 kept, 9,104 to 9,213 not zero)"]
    assert "9,213 kept, 9,104 to 9,213 not zero" in latex(table)
    assert dict(zip(table["method"], cells(table)["nonzero"], strict=True)) == {
        "oneshot": "9,213", "rigl": "9,104", "set": "92,134", "old": ""
    }  # fmt: skip
    assert "nonzero" not in cells(table[table["method"] == "old"]), "records of before do not say"


@pytest.mark.parametrize("value", [-1, "many", None, math.nan, 1e300, [3]])
def test_a_nonsense_number_of_nonzero_weights_is_none(make_run: Make, tmp_path: Path, value: object) -> None:
    make_run(nonzero=value)
    assert pd.isna(tabulate(tmp_path).iloc[0]["nonzero"])
    assert list(wide(tabulate(tmp_path), "vgg16", "cifar10")) == ["99% (9,213 kept)"]


def test_each_level_says_how_many_are_not_zero(make_run: Make, seal: Callable[..., None], tmp_path: Path) -> None:
    folder = make_run()
    record = json.loads((folder / "result.json").read_text())
    record["levels"][0]["nonzero"] = 9000
    seal(folder / "result.json", record)
    assert levels(read(tmp_path).results)["nonzero"].tolist() == [9000]


def test_each_level_says_how_good_its_classes_are(make_run: Make, seal: Callable[..., None], tmp_path: Path) -> None:
    folder = make_run(levels=[(0.5, 90.0, 90.0), (0.9, 80.0, 80.0), (0.95, 70.0, 70.0), (0.99, 60.0, 60.0)])
    record = json.loads((folder / "result.json").read_text())
    said = ([90.0, 70.0, None, 50.0], [None, None], "damaged", [1e9, True, 40.0])
    for level, one in zip(record["levels"], said, strict=True):
        level["class_accuracy"] = one
    seal(folder / "result.json", record)
    make_run(method="old")  # which recorded none
    table = levels(read(tmp_path).results).set_index(["method", "level"])
    assert table.loc[("oneshot", 1), ["balanced_accuracy", "worst_class_accuracy"]].tolist() == [70.0, 50.0]
    assert table.loc[("oneshot", 4), ["balanced_accuracy", "worst_class_accuracy"]].tolist() == [40.0, 40.0]
    others = table.drop(index=[("oneshot", 1), ("oneshot", 4)])
    assert len(others) == 3 and others["balanced_accuracy"].isna().all()


def test_what_a_network_does_not_count_is_noted(make_run: Make, tmp_path: Path) -> None:
    lstm = [
        {"name": "a.weight_hh_l0", "kind": "LSTM", "weights": 1200},
        {"name": "b", "kind": "Parameter", "weights": 34},
    ]
    make_run(seed=1, uncounted=lstm)
    make_run(seed=2, uncounted=lstm)
    make_run(method="rigl", uncounted=[])
    make_run(method="set", uncounted="damaged")
    found = [line for line in notes(read(tmp_path).results) if "counted" in line]
    assert found == ["vgg16: 1,234 weights (LSTM, Parameter) are not counted and dense in 2 runs"]


def test_every_mark_has_a_sign_in_latex(make_run: Make, tmp_path: Path) -> None:
    make_run(seed=1, selected_on="test", data={"md5": {}, "official": False, "changed": True},
             settings={"dataset.train_limit": 7})  # fmt: skip
    table = tabulate(tmp_path)
    said = latex(table)
    assert all(sign in said for sign in (r"\dagger", r"\ddagger", r"\P", r"\neq")) and "?" not in said
    assert cells(table)["same_data"].tolist() == ["no"] and cells(table)["partial"].tolist() == [
        "trained on 7 images only"
    ]
    assert set(MARKS) <= set(_SIGNS)


def test_what_could_not_be_followed_is_noted_and_not_called_cut(
    make_run: Make, seal: Callable[..., None], tmp_path: Path
) -> None:
    unknown = {"kept": 90, "effective": None, "connected": None, "not_known": "it looks at values on its way (gt)"}
    for seed in (1, 2):
        folder = make_run(seed=seed)
        record = json.loads((folder / "result.json").read_text())
        record["levels"][-1]["effective"] = unknown
        seal(folder / "result.json", record)
    records = read(tmp_path).results
    [line] = [line for line in notes(records) if "not known" in line]
    assert line == "vgg16: which weights lie on a path is not known in 2 runs (it looks at values on its way (gt))"
    assert long(records, []).iloc[0]["connected"] is None
