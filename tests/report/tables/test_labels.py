"""Names of rows that no plot and no page could hold."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from sparse_lab.report import read
from sparse_lab.report.tables.labels import LONGEST, labels
from sparse_lab.report.write import write

LONG = 100_000


def test_a_name_of_100_000_signs_is_shortened_and_still_its_own(make_run: Callable[..., Path], tmp_path: Path) -> None:
    for number in range(3):
        make_run(method=f"{'m' * LONG}{number}{'n' * LONG}", folder=f"long{number}")
    make_run(method="mine", folder="mine")
    begun = time.process_time()
    written = write([tmp_path], tmp_path)
    assert time.process_time() - begun < 5
    names = set(labels(read(tmp_path).results).values())
    assert len(names) == 4 and "mine" in names
    assert all(len(name) <= LONGEST for name in names)
    assert names == set(written.made_from.table["method"])
