from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparse_lab.cli.report import main
from sparse_lab.records.atomic_io import write_record
from sparse_lab.report import read
from sparse_lab.report.load.planned import Planned, gaps, unfinished

Make = Callable[..., Path]
Plan = Callable[..., Path]


@pytest.fixture
def make_plan(tmp_path: Path) -> Plan:
    """Writes a sweep's plan of runs with these names, as `sparse-lab -m` does; returns its folder."""

    def make(names: list[str], sweep: str = "one", started: str = "2026-01-01T00:00:00+00:00", **more: Any) -> Path:
        folder = tmp_path / "sweeps" / sweep
        folder.mkdir(parents=True)
        known = {"model": "vgg16", "dataset": "cifar10", "method": "rigl", "sparsity": 0.99, "seed": 1}
        runs = [{"name": name, **known} for name in names]
        plan = {"command": "sparse-lab -m ...", "started": started, "pid": 1, "host": "h", "jobs": len(names)}
        write_record(folder / "plan.json", {**plan, "launcher": "basic", "runs": runs, **more})
        return folder

    return make


def states(root: Path) -> dict[str, str]:
    found, warnings = unfinished(read(root))
    assert not warnings
    return {run.name: run.status.state for run in found}


def test_planned_runs_are_known_by_their_own_state(
    make_run: Make, make_status: Make, make_plan: Plan, tmp_path: Path
) -> None:
    make_run(folder="done")
    make_status("broken", state="failed", error="no memory")
    make_status("stopped", state="interrupted", error="stopped by SIGTERM")
    make_status("elsewhere", state="running", host="another")
    make_plan(["done", "broken", "stopped", "elsewhere", "never"])
    said = {"broken": "failed", "stopped": "interrupted", "elsewhere": "running", "never": "not started"}
    assert states(tmp_path) == said
    [planned] = [run for run in unfinished(read(tmp_path))[0] if run.name == "broken"]
    assert isinstance(planned, Planned) and planned.status.error == "no memory"
    assert (planned.model, planned.dataset, planned.method) == ("vgg16", "cifar10", "rigl")
    assert (planned.sparsity, planned.seed) == ("99%", "1")


def test_a_job_whose_run_has_another_name_on_its_machine_is_done(
    make_run: Make, make_plan: Plan, tmp_path: Path
) -> None:
    """trainer.precision=auto, planned where there is no GPU and run where there is one."""
    make_run(folder="made-in-bf16")
    sweep = make_plan(["planned-in-float32", "never"])
    write_record(sweep / "0.json", {"outcome": "done", "run": "made-in-bf16", "said": "91%"})
    assert states(tmp_path) == {"never": "not started"}


def test_a_job_that_never_had_a_folder_says_why_in_the_sweep(
    make_status: Make, make_plan: Plan, tmp_path: Path
) -> None:
    first = make_plan(["a", "b", "c", "d"], started="2026-01-01T00:00:00+00:00")
    second = make_plan(["a", "b"], sweep="two", started="2026-01-02T00:00:00+00:00")
    write_record(first / "000.json", {"run": "a", "outcome": "failed", "said": "old"})
    write_record(second / "000.json", {"run": "a", "outcome": "failed", "said": "unknown\nscore 'x'"})
    write_record(first / "002.json", {"run": "c", "outcome": "stopped", "said": ""})
    write_record(first / "003.json", {"run": "d", "outcome": "done", "said": ""})
    make_status("b", state="running", host="another")
    write_record(second / "001.json", {"run": "b", "outcome": "failed", "said": "later"})
    found = {run.name: (run.status.state, run.status.error) for run in unfinished(read(tmp_path))[0]}
    assert found.pop("d") == ("unreadable", "the sweep says done, yet no record of it was found")
    assert found == {"a": ("failed", "unknown score 'x'"), "b": ("running", None), "c": ("interrupted", None)}


def test_runs_beside_the_sweeps_count_though_the_report_is_of_the_sweeps_alone(
    make_run: Make, make_status: Make, make_plan: Plan, tmp_path: Path
) -> None:
    make_run(folder="done")
    make_status("lost", state="failed")
    make_plan(["done", "lost", "never"])
    assert states(tmp_path / "sweeps") == {"lost": "failed", "never": "not started"}
    assert states(tmp_path / "sweeps" / "one") == {"lost": "failed", "never": "not started"}


@pytest.mark.parametrize(
    "runs",
    [None, {}, "x", [1], [{}], [{"name": 3}], [{"name": "../up"}], [{"name": ""}], [{"name": ".."}], [{"name": "a/b"}]],
)
def test_a_plan_without_sense_is_one_warning(make_plan: Plan, tmp_path: Path, runs: object) -> None:
    make_plan(["a"], runs=runs)
    found, [warning] = unfinished(read(tmp_path))
    assert not found and "plan.json" in warning


def test_a_damaged_plan_is_one_warning(make_plan: Plan, tmp_path: Path) -> None:
    path = make_plan(["a", "b"]) / "plan.json"
    path.write_text(path.read_text().replace('"a"', '"z"'))
    found, [warning] = unfinished(read(tmp_path))
    assert not found and "checksum" in warning and str(path) in warning


def test_a_plan_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "plan.json").write_text('{"runs": "to the hills"}')
    assert unfinished(read(tmp_path)) == ([], [])


def test_seeds_that_others_have_are_missed(make_run: Make, tmp_path: Path) -> None:
    for method, seeds in (("east", (1, 2, 3)), ("rigl", (1, 3)), ("set", (2,))):
        for seed in seeds:
            make_run(method=method, seed=seed)
    make_run(method="rigl", model="resnet34", seed=7)
    found = gaps(read(tmp_path).results)
    assert [(gap.model, gap.method, gap.seeds, gap.lacks) for gap in found] == [
        ("vgg16", "rigl", (1, 3), (2,)),
        ("vgg16", "set", (2,), (1, 3)),
    ]


def test_the_report_says_what_is_missing(
    make_run: Make, make_status: Make, make_plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(method="east", seed=1)
    make_run(method="east", seed=2)
    make_run(method="rigl", seed=1)
    make_status("lost", state="failed", error="no memory")
    make_plan(["lost", "never"])
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "missing: 1 of the runs that sweeps planned, not started" in said and "missing: 1 cell lacks seeds" in said
    for page in ("report.md", "report.html"):
        text = (tmp_path / "out" / page).read_text()
        assert "not started" in text and "never" in text and "no memory" in text


def test_a_plan_alone_makes_a_report(make_plan: Plan, tmp_path: Path) -> None:
    make_plan(["never"])
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert "never" in (tmp_path / "out" / "report.html").read_text()


def test_jobs_that_cannot_be_read_are_warnings(make_plan: Plan, tmp_path: Path) -> None:
    folder = make_plan(["a"])
    (folder / "000.json").write_text("{")
    (folder / "running-000.json").write_text("{")
    write_record(folder / "001.json", {"run": ["?"], "outcome": ["failed"], "said": None})
    found, warnings = unfinished(read(tmp_path))
    assert [run.status.state for run in found] == ["not started"]
    assert [name in line for name, line in zip(("000.json", "001.json"), warnings, strict=True)] == [True, True]


def test_a_plan_that_is_a_link_to_itself_is_a_warning(make_plan: Plan, tmp_path: Path) -> None:
    plan = make_plan(["a"]) / "plan.json"
    plan.unlink()
    plan.symlink_to(plan.name)
    found, [warning] = unfinished(read(tmp_path))
    assert not found and str(plan) in warning
