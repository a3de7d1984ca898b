"""Names of runs: what differs from the defaults in the parts that are there, and nothing else.

`python tests/experiment/test_identity.py` writes defaults.json, the snapshot of all defaults that names count from.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest

from sparse_lab import config as schema
from sparse_lab.config import Config, conf_dir, key, parts_of
from sparse_lab.experiment import identity as names
from sparse_lab.experiment.compose import ConfigSource
from sparse_lab.experiment.identity import Surroundings, cell, identity, run_name, settings

SNAPSHOT = Path(__file__).with_name("defaults.json")
METHODS = sorted(path.stem for path in (conf_dir() / "method").glob("*.yaml"))
SOURCE = ConfigSource(conf_dir())


def asked(*lines: str) -> Config:
    return SOURCE.compose(list(lines)).config()


def defaults(group: type = Config, path: str = "") -> dict[str, object]:
    """Every key that counts -> the default that names count from, of all parts."""
    found: dict[str, object] = {}
    for entry in dataclasses.fields(group):
        name = f"{path}{entry.name}"
        if not entry.metadata.get("identity", True):
            continue
        if entry.metadata.get("part"):
            found |= defaults(parts_of(group)[entry.name], f"{name}.")
        elif dataclasses.is_dataclass(value := names._default(entry)):
            found |= defaults(type(value), f"{name}.")
        else:
            found[name] = value
    return found


def complaints(now: dict[str, object], then: dict[str, object]) -> list[str]:
    """What to do about keys and defaults that have changed since the snapshot was written."""
    lines = [
        f"{name} is new: write the snapshot again (python {Path(__file__).name}); no run's name changes"
        for name in now.keys() - then.keys()
    ]
    lines += [
        f"{name} is gone: raise identity.VERSION if results under the same name would no longer be the same, say what "
        "it is called now in config.RENAMED, and write the snapshot again"
        for name in then.keys() - now.keys()
    ]
    return lines + [
        f"the default of {name} was {then[name]!r} and is {now[name]!r}: runs that relied on the old one must not have "
        f"the names of those that rely on the new one. Say what it was in its key, key(..., first={then[name]!r}), and "
        "leave the snapshot as it is"
        for name in sorted(now.keys() & then.keys())
        if now[name] != then[name]
    ]


def test_the_defaults_that_names_count_from_are_those_of_the_snapshot():
    kept = json.loads(SNAPSHOT.read_text())
    assert complaints(json.loads(json.dumps(defaults())), kept["defaults"]) == []
    assert kept["version"] == names.VERSION, "the version was raised: write the snapshot again"


def test_the_snapshot_says_what_to_do():
    then = {"a": 1, "b": [1.0], "c": None}
    assert complaints(then, then) == []
    (line,) = complaints({**then, "a": 2}, then)
    assert "the default of a was 1 and is 2" in line and "first=1" in line
    (line,) = complaints({**then, "d": 2}, then)
    assert line.startswith("d is new")
    (line,) = complaints({"a": 1, "b": [1.0]}, then)
    assert line.startswith("c is gone")


def changed(value, **fields):
    """A config in which every dataclass has `fields` as well: name -> (type, field)."""
    kind = type(value)
    wider = dataclasses.make_dataclass(
        kind.__name__, [(name, of, spec) for name, (of, spec) in fields.items()], bases=(kind,)
    )
    inner = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
    for name, one in inner.items():
        if dataclasses.is_dataclass(one):
            inner[name] = changed(one, **fields)
    return wider(**inner)


@pytest.mark.parametrize("method", METHODS)
def test_a_new_key_in_every_part_changes_no_name(method):
    config = asked(f"method={method}", "compute=auto")
    wider = changed(config, brand_new=(int, key(7, "new")), another=(list, key(lambda: [0.5], "new")))
    assert run_name(wider) == run_name(config) and cell(wider) == cell(config)
    # and they are there: one that is set does change it
    wider.method.brand_new = 8
    assert run_name(wider) != run_name(config)


def with_default(config: Config, value: float, **first) -> Config:
    """A config of a version in which a sweep's share has this default."""
    iterative = dataclasses.make_dataclass(
        "IterativeConfig", [("share", float, key(value, "share", **first))], bases=(schema.IterativeConfig,)
    )
    schedule = replace(config.schedule, iterative=iterative(round_epochs=config.schedule.iterative.round_epochs))
    return replace(config, schedule=schedule)


def test_a_default_that_changes_renames_the_runs_that_relied_on_it():
    config = asked("method=iterative")  # its file says 0.2, which was the default
    relying = with_default(config, 0.3, first=0.2)
    assert run_name(relying) != run_name(config)
    # whoever says 0.2 is still who had it by default, and whoever says 0.3 relies on the new one
    said = replace(
        relying, schedule=replace(relying.schedule, iterative=replace(relying.schedule.iterative, share=0.2))
    )
    assert run_name(said) == run_name(config)
    assert run_name(asked("method=iterative", "schedule.iterative.share=0.3")) == run_name(relying)
    # without a word of what it was, the two would share a name: the snapshot's test says so
    assert run_name(with_default(config, 0.3)) == run_name(config)
    # runs that have no rounds do not care
    oneshot = asked("method=oneshot")
    assert identity(oneshot)["settings"]["schedule"] == {"one_shot": {}}


def test_what_is_surrounding_has_its_place_and_adds_nothing_where_it_is_empty():
    config = asked("method=rigl")
    plain = names.digest(identity(config))
    assert plain == names.digest(identity(config, Surroundings())) and run_name(config).endswith(plain)
    full = [Surroundings(data="ab"), Surroundings(plugins={"mine": "cd"}), Surroundings(ranks=2)]
    assert len({plain, *(names.digest(identity(config, one)) for one in full)}) == 4


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("sparsity.target=0.3", "sparsity.target=0.30000000000000004"),  # 3 * 0.1
        ("training.lr=1", "training.lr=1.0"),
        ("method.cycles.lengths=[0.1,0.2]", "method.cycles.lengths=[0.1,0.20000000000000001]"),
        ("method.cycles.multiplier=3", "method.cycles.multiplier=3.0000000000000004"),
    ],
)
def test_numbers_that_are_written_in_two_ways_have_one_name(one, other):
    assert run_name(asked("method=east", one)) == run_name(asked("method=east", other))


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ("oneshot", "method.regrow.budget=0.1"),
        ("oneshot", "schedule.iterative.share=0.7"),
        ("oneshot", "schedule.cubic.every=7"),
        ("rigl", "method.cycles.every=7"),
        ("static", "method.drop_and_grow.grow=random"),
        ("dense", "sparsity.target=0.5"),
        ("dense", "training.finetune.lr=0.5"),
        ("rigl", "training.finetune.epochs=3"),
        ("oneshot", "training.regrow.epochs=3"),
        ("oneshot", "training.stop_after=null"),
        ("oneshot", "paths.data=elsewhere"),
    ],
)
def test_what_a_run_does_not_read_is_not_in_its_name(method, line):
    assert run_name(asked(f"method={method}", line)) == run_name(asked(f"method={method}"))


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ("oneshot_regrow", "method.regrow.budget=0.001"),
        ("iterative", "schedule.iterative.share=0.7"),
        ("gmp", "schedule.cubic.every=7"),
        ("east", "method.cycles.every=7"),
        ("east", "method.cycles=null"),
        ("east", "method.sharing=null"),
        ("rigl", "method.sharing={}"),
        ("rigl", "method.cycles={}"),
        ("oneshot", "training.finetune.lr=0.5"),
        ("oneshot_regrow", "training.regrow.epochs=3"),
        ("oneshot", "method.filters={}"),
    ],
)
def test_what_it_reads_is(method, line):
    assert run_name(asked(f"method={method}", line)) != run_name(asked(f"method={method}"))


def test_an_ablation_sets_a_part_to_null_and_its_settings_go_with_it():
    """EAST without its three parts is the method that it stands on, but for the name."""
    bare = asked("method=east", "method.sharing=null", "method.dyrelu=null", "method.cycles=null")
    itop = asked("method=rigl_itop")
    assert replace(bare.method, name="", paper="", summary="") == replace(itop.method, name="", paper="", summary="")


def test_a_record_holds_every_setting_of_the_parts_that_are_there():
    kept = settings(asked("method=rigl"))
    assert kept["method"].keys() == {"name", "init_from", "prune", "drop_and_grow"}
    assert kept["method"]["drop_and_grow"]["drop_fraction"] == 0.3 and kept["schedule"] == {"constant": {}}
    assert "finetune" not in kept["training"] and "regrow" not in kept["training"]
    assert settings(asked("method=dense")).keys() == {
        "model",
        "dataset",
        "method",
        "training",
        "trainer",
        "compute",
        "seed",
    }


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps({"version": names.VERSION, "defaults": defaults()}, indent=1) + "\n")
