"""By which recipe a run's last phase trains, and in how many rounds of how many epochs."""

from __future__ import annotations

from dataclasses import replace

from sparse_lab.config import Config, RecipeConfig
from sparse_lab.methods.schedules import kind_of
from sparse_lab.sparsity.clock import Clock


def recipe_of(config: Config) -> RecipeConfig:
    """Return the recipe of the run's last phase."""
    method = config.method
    if method.regrow is not None:
        return config.training.regrow
    if method.prune is None or method.init_from is None:
        return config.training
    if method.prune.rewind_lr:
        return replace(config.training, epochs=config.training.finetune.epochs)
    return config.training.finetune


def recipes_of(config: Config) -> dict[str, bool]:
    """Return which recipes the phases of the run train by, those of the runs that it starts from too, and whether
    anything is pruned there.
    """
    method = config.method
    if method.prune is None or method.init_from is None:
        return {"training": method.prune is not None}
    found = {"training": True} if method.prune.rewind_lr else {"training": False, "training.finetune": True}
    return found if method.regrow is None else {**found, "training.regrow": True}


def clock_of(config: Config, steps_an_epoch: int) -> Clock:
    """Return how many rounds of how many epochs the run's last phase has."""
    epochs, method = recipe_of(config).epochs, config.method
    if method.regrow is not None:
        return Clock(method.regrow.steps, epochs, steps_an_epoch)
    if method.prune is None:
        stop = config.training.stop_after or epochs
        return Clock(1, stop, steps_an_epoch, epochs_after=epochs - stop)
    schedule = kind_of(config.schedule)
    rounds = schedule.rounds(config)
    if schedule.in_rounds:
        epochs = schedule.round_epochs(config) or max(1, epochs // rounds)
    before = method.prune.rewind_weights or 0
    return Clock(rounds, epochs - before, steps_an_epoch, epochs_before=before)
