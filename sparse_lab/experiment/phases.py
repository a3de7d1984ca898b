"""What a run starts from: other runs, each made once and found by its hash.

A method is a list of parts (train dense, prune, regrow). Taking the last part away gives the run that it starts
from, so the one-way run that a regrowth starts from is the very run that `method=oneshot` asks for, and its record
stands in the table.
"""

from __future__ import annotations

from dataclasses import replace

from sparse_lab.config import Config, MethodConfig


def dense(config: Config) -> Config:
    """The dense training that every part of `config` goes back to."""
    return replace(config, method=MethodConfig(name="dense"))


def one_way(config: Config, sparsity: float) -> Config:
    """The pruning run without regrowth, at `sparsity`."""
    method = replace(config.method, name=config.method.init_from or "", parts=["prune"], init_from="dense")
    return replace(config, method=method, sparsity=replace(config.sparsity, target=sparsity))


def regrowth_start(config: Config) -> float:
    """The sparsity that the phase after pruning starts from: the target plus what is to regrow."""
    target, regrow = config.sparsity.target, config.method.regrow
    if not config.method.regrows:
        return target
    if regrow.budget is None:
        return round(target + (1.0 - target) / 2, 10)
    return round(target + regrow.steps * regrow.budget, 10)


def final_sparsity(config: Config) -> float:
    """The sparsity that the run ends with: a regrowth with score=none stays where it starts."""
    if not config.method.prunes:
        return 0.0
    if config.method.regrows and config.method.regrow.score == "none":
        return regrowth_start(config)
    return config.sparsity.target


def parent(config: Config) -> Config | None:
    """The run that `config` starts from, or None when it starts from scratch."""
    if config.method.goes_on:
        return one_way(config, regrowth_start(config))
    if config.method.prunes and config.method.init_from is not None:
        return dense(config)
    return None


def rewound(config: Config) -> Config | None:
    """The run that ends with the weights which each round goes back to; None where those are the initial ones."""
    epoch = config.method.prune.rewind_weights
    if not config.method.prunes or not epoch:
        return None
    start = dense(config)
    return replace(start, training=replace(start.training, stop_after=epoch, select="last", patience=None))


def reference(config: Config) -> Config | None:
    """The less sparse run whose living positions regrow first, when that is the score and no file is given."""
    regrow = config.method.regrow
    if not config.method.regrows or regrow.score != "reference" or regrow.reference is not None:
        return None
    return one_way(config, config.sparsity.target)
