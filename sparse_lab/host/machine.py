"""What the machine says of itself, and which packages are here. No torch: a request is composed by it."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

CGROUPS = (  # version 2, version 1
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
QUOTAS = (  # version 2 (quota and period in one file), version 1; microseconds
    ("/sys/fs/cgroup", ("cpu.max",)),
    ("/sys/fs/cgroup/cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")),
)


def version(package: str) -> str | None:
    """Return the version of an installed package; None where it is not here."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def processor() -> str:
    """Return the processor's name."""
    named = (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


@cache
def instructions() -> frozenset[str]:
    """Return what the processor can do beside the basics, as Linux spells it (avx2, avx512_bf16)."""
    flags = (line.partition(":")[2].split() for line in _lines("/proc/cpuinfo") if line.startswith("flags"))
    return frozenset(next(flags, ()))


def usable_cores() -> int:
    """Return how many processors this process may keep busy: those that it may run on, and no more than the time that
    the control groups (containers, jobs of a cluster) give it; 1 at least.
    """
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for top, files in QUOTAS:
        for folder in _groups(top):
            said = " ".join(line for file in files for line in _lines(folder / file)).split()
            if len(said) == 2 and all(word.isdecimal() and int(word) for word in said):
                found = min(found, math.ceil(int(said[0]) / int(said[1])))
    return max(1, found)


def available_memory() -> int:
    """Return the bytes that this process may still take: what the machine has free, and what the control groups
    (containers, jobs of a cluster) allow. What files are cached in counts as free.
    """
    found = [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")]
    found += [
        left for top, limit, used in CGROUPS for folder in _groups(top) for left in _left(folder / limit, folder / used)
    ]
    return min(found, default=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def size(count: int) -> str:
    """Return a number of bytes as a person would say it."""
    unit, name = next((one for one in ((2**30, "GiB"), (2**20, "MiB")) if count >= one[0]), (2**10, "KiB"))
    return f"{count / unit:,.1f} {name}"


def _groups(top: str) -> Iterator[Path]:
    """The folders of this process's control groups below `top`, each with those that it lies in."""
    groups = [line.rpartition(":")[2].strip("/") for line in _lines("/proc/self/cgroup")]
    for group in dict.fromkeys(("", *groups)):  # in a container the group's own name may not be there
        for folder in (Path(top, group), *Path(top, group).parents):
            if folder == Path(top).parent:
                break
            yield folder


def _left(limit: Path, used: Path) -> list[int]:
    """Bytes that a control group may still take; nothing where it has no limit."""
    allowed, taken = (next(iter(_lines(path)), "") for path in (limit, used))
    if not allowed.isdecimal() or not taken.isdecimal():
        return []
    cached = [line.split() for line in _lines(limit.with_name("memory.stat"))]
    files = sum(int(count) for name, count in cached if name in ("active_file", "inactive_file"))
    return [int(allowed) - max(0, int(taken) - files)]


def _lines(path: Path | str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
