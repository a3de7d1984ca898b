"""Data sets: batches come out as tensors on the device, already augmented and normalised.

`build` reads a data set, splits it by seed and gives a `Data` with a train, a validation and a test loader; `check`
says before a long chain of runs whether the files are there and intact; `fingerprint_of` tells data sets apart by what
their files hold; `names` lists what is known. Nothing heavy is
imported before `build` or `check` is called.
"""

from __future__ import annotations

from sparse_lab.data.reads import fingerprint_of, look_again
from sparse_lab.data.registry import (
    Data,
    build,
    check,
    check_shares,
    expected_images,
    module_of,
    names,
    register_dataset,
)

__all__ = [
    "Data",
    "build",
    "check",
    "check_shares",
    "expected_images",
    "fingerprint_of",
    "look_again",
    "module_of",
    "names",
    "register_dataset",
]
