"""What an optimizer remembers of weights, and how it forgets."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def reset_state(optimizer: torch.optim.Optimizer) -> None:
    """Fresh optimizer state: momentum, moments and step counts start again."""
    optimizer.state.clear()


def remove_params(optimizer: torch.optim.Optimizer, gone: Iterable[nn.Parameter]) -> None:
    """The optimizer forgets parameters that the network no longer has, and groups that are empty then."""
    dead = {id(parameter) for parameter in gone}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in dead:
                optimizer.state.pop(parameter, None)
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in dead]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
