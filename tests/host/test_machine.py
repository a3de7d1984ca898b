from __future__ import annotations

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
