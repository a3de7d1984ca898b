"""How many steps an epoch has, before any data is read."""

from __future__ import annotations

from sparse_lab.config import Config
from sparse_lab.data.facts import COUNTS
from sparse_lab.training.accumulation import steps_of

MADE = 1024  # of data=synthetic, after the split


def steps_an_epoch(config: Config) -> int | None:
    """Return how many steps an epoch has, before any data is read; where nobody knows how many images there are the
    most that its limits allow, or None.
    """
    from sparse_lab.data.plan import Plan
    from sparse_lab.data.split import validation_count

    data, training = config.dataset, config.training
    known = [] if data.train_limit is None else [data.train_limit]
    if data.name in COUNTS:
        train, _ = COUNTS[data.name]
        known.append(train - validation_count(train, data.validation))
    if data.name == "synthetic" and not known:
        known.append(MADE)
    if not known:
        return None if training.limit_batches is None else steps_of(training.limit_batches, training.accumulate)
    plan = Plan(training.batch_size, True, True, limit=training.limit_batches, world_size=config.trainer.devices)
    return steps_of(len(plan.blocks(min(known))), training.accumulate)
