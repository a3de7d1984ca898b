"""Where a run stands: in which round, at which epoch and step of it. Everything scheduled asks this clock.

A run is one or more rounds of equal length (a dense run has one; iterative pruning has one a mask change). The clock
ticks only when an optimizer step really happened, so a step that the gradient scaler skipped advances no schedule.

A round may be a part of a longer schedule of the learning rate: `epochs_before` and `epochs_after` say how much of that
lies outside of it (weight rewinding goes back to an epoch, and the training that gives those weights stops there).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Clock:
    rounds: int
    epochs_a_round: int
    steps_an_epoch: int
    epochs_before: int = 0
    epochs_after: int = 0
    round: int = 0
    epoch_in_round: int = 0
    step_in_round: int = 0

    @property
    def steps_a_round(self) -> int:
        return self.epochs_a_round * self.steps_an_epoch

    @property
    def step(self) -> int:
        """Step of the whole run, as the mask schedules count: a round that ended early counts in full."""
        return self.round * self.steps_a_round + min(self.step_in_round, self.steps_a_round - 1)

    @property
    def schedule_place(self) -> tuple[int, int]:
        """Which step of the learning rate's schedule this is, from 0, and how many it has: those of the round, if it
        runs the schedule whole.
        """
        before = self.epochs_before * self.steps_an_epoch
        whole = before + self.steps_a_round + self.epochs_after * self.steps_an_epoch
        return before + min(self.step_in_round, self.steps_a_round - 1), whole

    @property
    def total_epochs(self) -> int:
        return self.rounds * self.epochs_a_round

    def steps(self, length: float, unit: str) -> int:
        """Return a length in shares of the round ("share") or in epochs as optimizer steps; what ends, ends before the
        last one.
        """
        steps = length * (self.steps_a_round if unit == "share" else self.steps_an_epoch)
        return min(round(steps), self.steps_a_round - 1)

    @property
    def in_last_epoch(self) -> bool:
        """Is this the last epoch of the round, unless patience ends it before?"""
        return self.epoch_in_round == self.epochs_a_round - 1

    @property
    def finished(self) -> bool:
        return self.round >= self.rounds

    def tick(self) -> None:
        """An optimizer step happened."""
        self.step_in_round += 1

    def end_epoch(self) -> None:
        self.epoch_in_round += 1

    def end_round(self) -> None:
        self.round += 1
        self.epoch_in_round = 0
        self.step_in_round = 0

    def state_dict(self) -> dict[str, int]:
        return {"round": self.round, "epoch_in_round": self.epoch_in_round, "step_in_round": self.step_in_round}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.round, self.epoch_in_round = state["round"], state["epoch_in_round"]
        self.step_in_round = state["step_in_round"]
