"""Weight sharing in residual stages (EAST)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparse_lab.config import Config
from sparse_lab.methods.base import Component, fitting

if TYPE_CHECKING:
    from torch import nn

    from sparse_lab.methods.networks import Structure


class Sharing(Component):
    part = "sharing"
    needs = ("prune",)
    not_with = ("filters", "hypersphere")
    schedules = ("constant",)
    from_scratch = True

    def alter(self, model: nn.Module, config: Config, structure: Structure) -> None:
        from sparse_lab.models import weight_sharing

        with fitting("method.sharing", structure, "use model=resnet34, or method.sharing=null"):
            weight_sharing.share(model)
