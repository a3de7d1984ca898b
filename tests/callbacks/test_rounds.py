"""When a level ends, and with which epoch's weights: by scripted accuracies, no training."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from sparse_lab.callbacks.rounds import Rounds
from sparse_lab.sparsity.clock import Clock

EPOCHS = 8
# accuracy in percent after each epoch: validation is at its best in epoch 3, the test set never stops getting better
VALIDATION = [20.0, 50.0, 60.0, 60.0, 55.0, 59.0, 58.0, 40.0]
TEST = [11.0, 12.0, 13.0, 14.0, 15.0, 16.0, 17.0, 18.0]


class Scripted:
    """A level's epochs one by one. saves: after each one it goes on in a new object from the state of the old one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, select: str, patience: int | None, target_from: int) -> None:
        self.select, self.patience, self.target_from = select, patience, target_from
        self.epoch, self.said = 0, []
        tested = [torch.tensor([[int(hits)], [100]]) for hits in TEST]
        monkeypatch.setattr(Rounds, "_tested", lambda rounds, *rest: tested[self.epoch - 1])
        self.rounds = self.new()

    def new(self) -> Rounds:
        figures = Mock()
        figures.take = lambda stage: (0.5, VALIDATION[self.epoch - 1] if stage == "validation" else 1.0)
        return Rounds(
            nn.Linear(1, 1), figures, Clock(1, EPOCHS, 1), self.select, self.patience, [],
            lambda: self.epoch >= self.target_from, lambda: {"sparsity": 0.5, "kept": 9, "nonzero": 7},
            self.said.append,
        )  # fmt: skip

    def level(self, saves: bool = False) -> dict[str, Any]:
        trainer = Mock(current_epoch=0, global_step=0, optimizers=[Mock(param_groups=[{"lr": 0.1}])])
        while not self.rounds.levels:
            self.epoch += 1
            self.rounds.clock.tick()
            self.rounds.network.weight.data.fill_(self.epoch)
            self.rounds.on_train_epoch_end(trainer, Mock())
            if saves:
                state, self.rounds = self.rounds.state_dict(), self.new()
                self.rounds.load_state_dict(state)
        return self.rounds.levels[0]


def ends_after(patience: int, target_from: int) -> int:
    """The epoch after which `patience` epochs at the target have brought no better validation accuracy."""
    best, waited = -1.0, 0
    for epoch in range(target_from, EPOCHS + 1):
        best, waited = (VALIDATION[epoch - 1], 0) if VALIDATION[epoch - 1] > best else (best, waited + 1)
        if waited == patience:
            return epoch
    return EPOCHS


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda *rest: Scripted(monkeypatch, *rest)


@pytest.mark.parametrize("saves", [False, True])
@pytest.mark.parametrize("target_from", [1, 4])
@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize("select", ["validation_best", "last", "test_best"])
def test_patience_counts_validation_whatever_is_selected(select, patience, target_from, saves, scripted):
    level = scripted(select, patience, target_from).level(saves)
    wanted = ends_after(patience, target_from)
    assert level["epochs"] == wanted, f"select={select} patience={patience}: {level['epochs']} epochs, not {wanted}"
    seen = VALIDATION[target_from - 1 : wanted]
    chosen = {"validation_best": target_from + seen.index(max(seen)), "last": wanted, "test_best": wanted}[select]
    assert (level["best_epoch"], level["validation_accuracy"]) == (chosen, VALIDATION[chosen - 1])


@pytest.mark.parametrize("select", ["validation_best", "last", "test_best"])
def test_without_patience_all_epochs_are_trained(select, scripted):
    rounds = scripted(select, None, 1)
    assert rounds.level()["epochs"] == EPOCHS
    assert rounds.rounds.network.weight.item() == {"validation_best": 3, "last": EPOCHS, "test_best": EPOCHS}[select]


def test_a_level_says_how_many_of_its_weights_are_zero(scripted):
    one = scripted("last", 1, 1)
    one.level()
    assert one.said == ["level 1/1: sparsity 50% (9 weights, 7 not zero), validation 60.00%, test 14.00%"]


def test_each_round_waits_anew(scripted):
    one = scripted("last", 2, 1)
    one.level()
    assert one.rounds.state_dict()["waited"] == 0 and one.rounds.state_dict()["best_validation"] is None
