"""The schema's ranges: no number of any key may be NaN, infinite or absurd, those of lists neither."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest

from sparse_lab import config as schema
from sparse_lab.config import Config, check_ranges, parts_of
from sparse_lab.errors import UserError

HUGE = 10**40


def groups(group: type = Config, path: str = "") -> Iterator[tuple[str, type]]:
    """Every group and part of the schema, by its path."""
    yield path, group
    for entry in dataclasses.fields(group):
        name = f"{path}{entry.name}."
        if entry.metadata.get("part"):
            yield from groups(parts_of(group)[entry.name], name)
        elif dataclasses.is_dataclass(kind := getattr(group(), entry.name)):
            yield from groups(type(kind), name)


def numbers() -> Iterator[tuple[str, type, str, Any]]:
    """Every key of a number or of a list of them: its path, group, name and default."""
    for path, group in groups():
        for entry in dataclasses.fields(group):
            text = str(entry.type)
            if "float" in text or "int" in text:
                yield f"{path}{entry.name}", group, entry.name, getattr(group(), entry.name)


NUMBERS = list(numbers())


def refused(group: type, path: str, name: str, value: Any) -> str:
    with pytest.raises(UserError) as error:
        check_ranges(dataclasses.replace(group(), **{name: value}), path)
    said = str(error.value)
    assert f"{path}.{name}".lstrip(".") in said and len(said.splitlines()) == 1 and len(said) < 400
    return said


def test_no_number_of_any_key_may_be_nan_infinite_or_absurd():
    accepted = []
    for key, group, name, default in NUMBERS:
        path = key.rpartition(".")[0]
        whole = "float" not in str(group.__dataclass_fields__[name].type)
        for bad in [HUGE, -HUGE] if whole else [math.nan, math.inf, -math.inf]:
            try:
                refused(group, path, name, [bad] if isinstance(default, list) else bad)
            except BaseException as error:  # pytest's own, too
                accepted.append(f"{key}={bad:.3g}: {type(error).__name__}")
    assert not accepted and len(NUMBERS) > 80


@pytest.mark.parametrize(
    ("group", "name", "value", "wanted"),
    [
        (schema.RecipeConfig, "milestones", [-1.0, 5.0], "-1 is outside (0, 1)"),
        (schema.RecipeConfig, "milestones", [0.75, 0.5], "must be rising"),
        (schema.RecipeConfig, "milestones", [0.5, 0.5], "must be rising"),
        (schema.ElasticMutationConfig, "milestones", [0.5, 1.0], "1 is outside (0, 1)"),
        (schema.DatasetConfig, "std", [0.5, 0.5, 0.0], "outside (0, 1000000]"),
        (schema.DatasetConfig, "mean", [0.5, 1e9], "outside [-1000000, 1000000]"),
        (schema.FiltersConfig, "rates", [0.5, 1.5], "1.5 is outside [0, 1]"),
        (schema.CyclesConfig, "lengths", [0.2, -0.1], "-0.1 is outside [0, 100000]"),
        (schema.Config, "seed", 2**32, "outside [0, 4294967295]"),
        (schema.AlternatingConfig, "turn", 1e-9, "outside [0.0001, 1]"),
        (schema.CubicConfig, "every", 10**9, "outside [1, 10000000]"),
        (schema.PathsConfig, "outputs", "~/x", "write the folder out"),
        (schema.SparsityConfig, "layers", {"fc": 0.5, "layer4.*": 1.0}, "x.layers.layer4.*=1 is outside [0, 1)"),
        (schema.SparsityConfig, "layers", {"fc": math.nan}, "x.layers.fc=nan is outside [0, 1)"),
    ],
)
def test_lists_and_ranges(group, name, value, wanted):
    assert wanted in refused(group, "x", name, value)


def test_floats_are_those_that_a_person_would_write():
    for step in range(1, 200):
        by_hand = float(Decimal("0.9") + step * Decimal("0.0003"))
        assert schema.as_written(0.9 + step * 0.0003) == by_hand
    assert schema.as_written({"a": [0.1 * 3, 2, "x", None, True]}) == {"a": [0.3, 2, "x", None, True]}
    assert str(schema.as_written(-0.0)) == "0.0" and schema.as_written(1e-30) == 1e-30


@pytest.mark.parametrize("key", ["paths.outputs", "paths.data"])
def test_an_empty_name_of_a_folder_is_refused_by_the_key_that_was_set(key):
    config = Config()
    setattr(config.paths, key.partition(".")[2], " ")
    config.dataset.root = config.paths.data
    with pytest.raises(UserError, match=f"^{key}= *  names no folder: the one you are in is {key}=\\.$"):
        check_ranges(config)
