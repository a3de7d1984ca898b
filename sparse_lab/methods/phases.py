"""The phases of a run: which runs the ones before it are, and where its last phase starts and ends.

A method is parts put together. Taking the last part away gives the run that it starts from, so the one-way run that a
regrowth starts from is the very run that `method=oneshot` asks for, and its record stands in the table.
"""

from __future__ import annotations

from dataclasses import replace

from sparse_lab.config import Config, MethodConfig


def dense(config: Config) -> Config:
    """Return the dense training that every part of `config` goes back to."""
    return replace(config, method=MethodConfig(name="dense"))


def one_way(config: Config, sparsity: float) -> Config:
    """Return the pruning run without regrowth, at `sparsity`."""
    method = replace(config.method, name=config.method.init_from or "", regrow=None, init_from="dense")
    # layers with a sparsity of their own are sparser there by as much as the whole network
    denser = (1.0 - sparsity) / (1.0 - config.sparsity.target)
    layers = {name: round(1.0 - (1.0 - own) * denser, 10) for name, own in config.sparsity.layers.items()}
    return replace(config, method=method, sparsity=replace(config.sparsity, target=sparsity, layers=layers))


def regrowth_start(config: Config) -> float:
    """Return the sparsity that the phase after pruning starts from: the target plus what is to regrow."""
    target, regrow = config.sparsity.target, config.method.regrow
    if regrow is None or regrow.start == "target":
        return target
    if regrow.budget is None:
        return round(target + (1.0 - target) / 2, 10)
    return round(target + regrow.steps * regrow.budget, 10)


def final_sparsity(config: Config) -> float:
    """Return the sparsity that the run ends with: a regrowth with score=none stays where it starts."""
    if config.method.prune is None:
        return 0.0
    if config.method.regrow is not None and config.method.regrow.score == "none":
        return regrowth_start(config)
    return config.sparsity.target
