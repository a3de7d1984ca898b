"""Hypothesis for this room: no deadline on a shared machine, and the same examples every time."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile(
    "sparsity", deadline=None, max_examples=80 if os.environ.get("NIGHT") else 25, derandomize=True, database=None
)
settings.load_profile("sparsity")
