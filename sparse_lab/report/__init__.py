"""Tables, pictures and pages from the records of runs, beside the numbers that others published.

This room reads JSON files from disk and needs neither torch nor Lightning nor Hydra, so that a report can be made on
any machine that the records were copied to. The published numbers are data: `published.yaml`.
"""

from __future__ import annotations

from sparse_lab.report.load.published import Published, load
from sparse_lab.report.load.records import Finished, Records, Status, Unfinished, read
from sparse_lab.report.tables.aggregate import distinct, levels, long, wide
from sparse_lab.report.write import Written, show, write

__all__ = [
    "Finished",
    "Published",
    "Records",
    "Status",
    "Unfinished",
    "Written",
    "distinct",
    "levels",
    "load",
    "long",
    "read",
    "show",
    "wide",
    "write",
]
