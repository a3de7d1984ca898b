"""The record of a run can always be written."""

from __future__ import annotations

import json
import math

from sparse_lab.experiment import result


def test_a_figure_that_is_no_number_is_null():
    made = result.finite({"a": [math.nan, 1.5, {"b": (math.inf, 2)}], "c": -math.inf, "d": "nan", "e": True})
    assert made == {"a": [None, 1.5, {"b": [None, 2]}], "c": None, "d": "nan", "e": True}
    assert json.loads(json.dumps(made, allow_nan=False)) == made
