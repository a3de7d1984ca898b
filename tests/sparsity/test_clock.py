"""The clock: steps of rounds, early ends, and going on from a saved state."""

from __future__ import annotations

from sparse_lab.sparsity.clock import Clock


def test_a_round_that_ends_early_counts_in_full():
    clock = Clock(rounds=3, epochs_a_round=2, steps_an_epoch=5)
    assert (clock.steps_a_round, clock.total_epochs, clock.step) == (10, 6, 0)
    for _ in range(5):
        clock.tick()
    clock.end_epoch()
    assert (clock.step, clock.schedule_place) == (5, (5, 10))
    clock.end_round()
    assert (clock.round, clock.step, clock.epoch_in_round, clock.finished) == (1, 10, 0, False)
    clock.end_round()
    clock.end_round()
    assert clock.finished


def test_the_last_tick_of_a_round_stays_inside_it():
    clock = Clock(rounds=2, epochs_a_round=1, steps_an_epoch=4)
    for _ in range(4):
        clock.tick()
    assert clock.step == 3 and clock.schedule_place == (3, 4)


def test_state_round_trip():
    clock = Clock(2, 3, 4, round=1, epoch_in_round=2, step_in_round=9)
    other = Clock(2, 3, 4)
    other.load_state_dict(clock.state_dict())
    assert other == clock
