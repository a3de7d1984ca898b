"""Candidates take turns; time that is over ends the bench with a list of what is missing."""

from __future__ import annotations

import pytest

from sparse_lab.bench.cells import TRAINING, Cell, Entry, Measured, Unavailable
from sparse_lab.bench.rounds import Budget, measure, too_slow, turn_of

WORK = ("vgg16", TRAINING, 128)


def _silent(work: str, detail: str = "") -> None: ...


def _entries(seconds: dict[str, float]) -> tuple[list[Entry], list[str], dict[int, float]]:
    """Candidates that are said to take so long, and the order in which they were called."""
    order: list[str] = []
    entries = [Entry(Cell(*WORK, name), lambda name=name: lambda: order.append(name)) for name in seconds]
    return entries, order, dict(zip([id(one) for one in entries], seconds.values(), strict=True))


def _turns(seconds, clock=None):
    def turn(entry: Entry, first: bool) -> float:
        entry.ready()()
        if clock is not None:
            clock[0] += seconds[id(entry)]
        return seconds[id(entry)]

    return turn


def test_candidates_take_turns_in_every_round():
    entries, order, seconds = _entries({"dense": 2.0, "compile": 1.0})
    measured = Measured()
    measure(entries, 3, lambda: False, measured, _silent, _turns(seconds))
    assert order == ["dense", "compile"] * 3
    assert measured.seconds[Cell(*WORK, "compile")] == {1: 1.0, 2: 1.0, 3: 1.0}
    assert not measured.missing


def test_when_time_is_over_what_is_missing_is_said_and_what_there_is_stays():
    entries, order, seconds = _entries({"dense": 4.0, "compile": 4.0, "onnxruntime": 4.0})
    clock, measured = [0.0], Measured()
    measure(entries, 5, lambda: clock[0] >= 8.0, measured, _silent, _turns(seconds, clock=clock))
    assert order == ["dense", "compile"]
    assert measured.missing == [Cell(*WORK, "onnxruntime")]
    # over in the second round: everything was measured once, nothing is missing
    clock[0], measured = 0.0, Measured()
    measure(entries, 5, lambda: clock[0] >= 16.0, measured, _silent, _turns(seconds, clock=clock))
    assert not measured.missing
    assert [len(rounds) for rounds in measured.seconds.values()] == [2, 1, 1]


def test_a_candidate_that_cannot_run_here_is_said_once_and_left_out():
    def ready():
        raise Unavailable("no compiler")

    entries, order, seconds = _entries({"dense": 1.0})
    entries.append(Entry(Cell(*WORK, "compile"), ready))
    measured = Measured()
    measure(entries, 2, lambda: False, measured, _silent, _turns({**seconds, id(entries[1]): 1.0}))
    assert order == ["dense"] * 2 and measured.notes == ["no compiler"] and not measured.missing


def test_a_rival_that_is_hopeless_is_measured_once():
    entries, order, seconds = _entries({"dense": 1.0, "bf16": 3.1, "compile": 2.9})
    measured = Measured()
    measure(entries, 3, lambda: False, measured, _silent, _turns(seconds))
    assert order.count("bf16") == 1 and order.count("compile") == 3
    assert ["3.1 times" in line for line in measured.notes] == [True]


def test_a_trial_keeps_its_one_measurement_where_it_is_hopeless():
    entries, _, seconds = _entries({"dense": 1.0, "bf16": 27.0})
    measured = Measured()
    assert too_slow(*entries, measured, _turns(seconds))
    assert measured.ratio(Cell(*WORK, "bf16")).median == pytest.approx(1 / 27)
    entries, _, seconds = _entries({"dense": 1.0, "bf16": 0.5})
    assert not too_slow(*entries, measured := Measured(), _turns(seconds)) and not measured.seconds


def test_a_budget_is_shared_out_by_weight_and_what_one_leaves_is_the_others():
    clock = [0.0]
    budget = Budget(60.0, [2.0, 1.0, 1.0], lambda: clock[0])
    over = budget.part()
    assert not over()
    clock[0] = 29.9
    assert not over()
    clock[0] = 30.0
    assert over()
    clock[0] = 10.0  # the first was done early: 50 seconds for two
    over = budget.part()
    clock[0] = 34.9
    assert not over()
    clock[0] = 35.0
    assert over()


@pytest.mark.parametrize(("first", "cold", "warm_ups"), [(True, False, 1), (False, False, 0), (False, True, 1)])
def test_a_cold_candidate_is_called_once_before_its_turn(first, cold, warm_ups, monkeypatch):
    monkeypatch.setattr("sparse_lab.bench.rounds.TURN", 0.0)
    calls = []
    assert turn_of(Entry(Cell(*WORK, "dense"), lambda: lambda: calls.append(1), cold=cold), first) > 0
    assert len(calls) == warm_ups + 1
