"""Runs of a second or two under tmp_path, and what is known of them without any dashboard."""

from __future__ import annotations

import pytest


@pytest.fixture
def small(three_epochs: tuple[str, ...]) -> tuple[str, ...]:
    return three_epochs
