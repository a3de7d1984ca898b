from __future__ import annotations

import os

import pytest

from sparse_lab.host import machine


def test_the_memory_that_is_available_is_what_every_control_group_allows(tmp_path, monkeypatch):
    """Files that are cached there count as free, and a group without a limit says nothing."""
    groups = (("", "max", "9", 0), ("job", "9000", "4000", 1000), ("job/step", "7000", "3500", 0))
    for folder, limit, used, files in groups:
        (tmp_path / folder).mkdir(exist_ok=True)
        for name, text in (("memory.max", limit), ("memory.current", used),
                           ("memory.stat", f"anon 5\ninactive_file {files}\nactive_file 0")):  # fmt: skip
            (tmp_path / folder / name).write_text(f"{text}\n")
    said = {"/proc/meminfo": ["MemTotal: 99 kB", "MemAvailable: 50 kB"], "/proc/self/cgroup": ["0::/job/step"]}
    real = machine._lines
    monkeypatch.setattr(machine, "_lines", lambda path: said[str(path)] if str(path) in said else real(path))
    monkeypatch.setattr(machine, "CGROUPS", ((str(tmp_path), "memory.max", "memory.current"),))
    assert machine.available_memory() == 3500, "of the step: the job has 6000, the machine 51,200"
    said["/proc/self/cgroup"] = ["0::/job"]
    assert machine.available_memory() == 6000
    said["/proc/self/cgroup"] = ["0::/elsewhere/in/the/host"]
    assert machine.available_memory() == 51200


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "250000 100000"}, 3),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "1600000 100000"}, 8),
        ({"cpu.cfs_quota_us": "200000", "cpu.cfs_period_us": "100000"}, 2),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, 8),
        ({"cpu.max": "0 0"}, 8),
    ],
)
def test_the_processors_that_are_usable_are_those_of_the_affinity_and_of_every_control_group(
    files, cores, tmp_path, monkeypatch
):
    (tmp_path / "job" / "step").mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / "job" / name).write_text(f"{text}\n")
    real = machine._lines
    monkeypatch.setattr(
        machine, "_lines", lambda path: ["0::/job/step"] if str(path) == "/proc/self/cgroup" else real(path)
    )
    monkeypatch.setattr(machine, "QUOTAS", tuple((str(tmp_path), names) for _, names in machine.QUOTAS))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert machine.usable_cores() == cores
