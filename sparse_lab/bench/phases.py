"""The phases of one training in which a step costs differently: with DyReLU and without, at the target's density and at
the highest that cycles reach meanwhile. Each is measured by a run of its own that never leaves it.
"""

from __future__ import annotations

from sparse_lab.config import Config
from sparse_lab.methods.cycles import cycles_of
from sparse_lab.methods.dyrelu import phasing_steps
from sparse_lab.methods.recipes import clock_of
from sparse_lab.sparsity.clock import Clock

STEPS = 1000  # of an epoch, to tell when phases begin: in a bench's short one they would fall together
NEVER = ("method.dyrelu.unit=share", "method.dyrelu.begin=0.99", "method.dyrelu.end=0.9999")  # in the last step of all


def phases(config: Config) -> dict[str, tuple[str, ...]]:
    """Return by its name what a request needs beside for a run that is in the phase all the time but for its last
    epoch, in the order in which the training comes to them. Empty for a method whose steps are all of one kind.
    """
    method, target = config.method, config.sparsity.target
    if method.dyrelu is None and method.cycles is None:
        return {}
    clock = clock_of(config, STEPS)
    fades = 0 if method.dyrelu is None else phasing_steps(config, clock)[1]
    found: dict[str, tuple[str, ...]] = {}
    if fades:
        for sparsity in dict.fromkeys((target, _lowest(config, clock, range(fades)))):
            updates = _updates(config, in_cycle=method.cycles is not None)
            found[_name(config, "DyReLU", sparsity)] = (*NEVER, *_at(sparsity), *updates)
    relu = () if method.dyrelu is None else ("method.dyrelu=null",)
    for sparsity in dict.fromkeys((_lowest(config, clock, range(fades, clock.steps_a_round)), target)):
        updates = _updates(config, in_cycle=sparsity != target)
        found[_name(config, "ReLU", sparsity)] = (*relu, *_at(sparsity), *updates)
    return found


def _lowest(config: Config, clock: Clock, steps: range) -> float:
    """The lowest sparsity within these steps."""
    if config.method.cycles is None:
        return config.sparsity.target
    cycles = cycles_of(config, clock)
    return round(min(cycles.sparsity(step) for step in steps), 10)


def _at(sparsity: float) -> tuple[str, ...]:
    return (f"sparsity.target={sparsity:.10g}",)


def _updates(config: Config, in_cycle: bool) -> tuple[str, ...]:
    """No cycles; within one masks change by gradients as often as they make them."""
    cycles, updates = config.method.cycles, config.method.drop_and_grow
    if cycles is None:
        return ()
    often = (f"method.drop_and_grow.update_every={cycles.every}",) if in_cycle and updates is not None else ()
    return ("method.cycles=null", *often)


def _name(config: Config, activation: str, sparsity: float) -> str:
    kinds = [activation] if config.method.dyrelu is not None else []
    kinds += ["shared weights"] if config.method.sharing is not None else []
    return ", ".join([*kinds, f"{100.0 * sparsity:.6g}%"])
