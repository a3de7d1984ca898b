"""compute=auto on a network that nobody has measured: a few training steps of it in both arithmetics, in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_lab.config import Config
from sparse_lab.experiment.measured import Measured
from sparse_lab.methods import phases, table
from sparse_lab.methods.networks import build_model, structure_of
from sparse_lab.methods.recipes import recipe_of
from sparse_lab.sparse_cpu.engine import SparseArithmetic
from sparse_lab.sparse_cpu.optimizer import LiveOptimizer
from sparse_lab.sparsity.distributions import distribute
from sparse_lab.sparsity.masks import Masks, num_kept
from sparse_lab.sparsity.topk import top_k_each
from sparse_lab.training.optimizers import make_optimizer, parameter_groups

SECONDS = 3.0
MOST = 7  # steps of each
LONGEST = 0.5  # seconds of a step that is timed: beyond it a part of the batch is


def measure(config: Config, bfloat16: bool) -> Measured:
    """Return the seconds of a training step of the network of `config` under random ERK masks at its final sparsity.

    bfloat16: what dense arithmetic computes in here. What goes wrong is in the outcome.
    """
    state = torch.get_rng_state()
    try:
        return _measured(config, bfloat16)
    except Exception as error:
        line = str(error).strip().splitlines()
        return Measured(why=line[0] if line else type(error).__name__)
    finally:
        torch.set_rng_state(state)


def _measured(config: Config, bfloat16: bool) -> Measured:
    dense, sparse = _dense(config, bfloat16), _sparse(config)
    images = config.training.batch_size
    batch = _batch(config, max(1, images // 8))
    dense(*batch)
    start = time.perf_counter()
    dense(*batch)
    whole = 8 * (time.perf_counter() - start)
    while images > 32 and whole > LONGEST:
        images, whole = images // 2, whole / 2
    batch = _batch(config, images)
    for step in (sparse, dense, sparse):  # what is new costs more
        step(*batch)
    seconds: dict[Callable[[Tensor, Tensor], None], list[float]] = {dense: [], sparse: []}
    begin = time.perf_counter()
    while not seconds[sparse] or (len(seconds[sparse]) < MOST and time.perf_counter() - begin < SECONDS):
        for step, times in seconds.items():
            start = time.perf_counter()
            step(*batch)
            times.append(time.perf_counter() - start)
    # of a part of the batch, as of the whole one
    scale = config.training.batch_size / images
    return Measured(scale * statistics.median(seconds[dense]), scale * statistics.median(seconds[sparse]))


def _batch(config: Config, images: int) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if config.trainer.precision == "64-true" else torch.float32
    return torch.randn(images, *config.dataset.shape, dtype=dtype), torch.randint(0, config.dataset.classes, (images,))


def _network(config: Config) -> nn.Module:
    """As the method trains it, with masks at its final sparsity."""
    model = table.alter(build_model(config), config, structure_of(config)).train()
    if config.trainer.precision == "64-true":
        model = model.double()
    masks = Masks(model)
    weights = masks.weights()
    everywhere = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    scores = {name: torch.rand(weight.shape) for name, weight in weights.items()}
    kept = num_kept(phases.final_sparsity(config), sum(weight.numel() for weight in weights.values()))
    masks.set(top_k_each(scores, distribute("erk", kept, weights, scores, everywhere)))
    return model


def _dense(config: Config, bfloat16: bool) -> Callable[[Tensor, Tensor], None]:
    model = _network(config)
    masks, optimizer = Masks(model), make_optimizer(parameter_groups(model), recipe_of(config))

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        masks.enforce(optimizer)

    return step


def _sparse(config: Config) -> Callable[[Tensor, Tensor], None]:
    model = _network(config)
    arithmetic, masks = SparseArithmetic(model, storage=config.storage), Masks(model)
    optimizer = LiveOptimizer(make_optimizer(parameter_groups(model), recipe_of(config)), arithmetic.live)

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        functional.cross_entropy(arithmetic(images), labels).backward()
        optimizer.step()
        masks.enforce(optimizer, but=optimizer.stepped)

    return step
