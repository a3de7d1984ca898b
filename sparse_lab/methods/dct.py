"""DCT plus sparse (DCTpS): a fixed cosine transform beside the sparse weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparse_lab.config import Config
from sparse_lab.errors import UserError
from sparse_lab.methods.base import Component, fitting

if TYPE_CHECKING:
    from torch import nn

    from sparse_lab.methods.networks import Structure


class DCT(Component):
    part = "dct"
    needs = ("prune",)
    not_with = ("filters", "hypersphere")
    schedules = ("constant", "cubic", "one_shot")
    from_scratch = True

    def check(self, config: Config, structure: Structure) -> None:
        from sparse_lab.sparsity.scores import OF_WEIGHTS

        assert config.method.prune is not None
        if config.sparsity.connected_init:
            raise UserError("method.dct does not go with sparsity.connected_init=true")
        if config.method.prune.score in OF_WEIGHTS:
            raise UserError(
                f"method.dct (weights start at 0) does not go with method.prune.score={config.method.prune.score}"
            )

    def hindrance(self, config: Config) -> str | None:
        return f"method {config.method.name} adds a dense matrix to its sparse weights (method.dct): use another method"

    def alter(self, model: nn.Module, config: Config, structure: Structure) -> None:
        from sparse_lab.models import offsets

        with fitting("method.dct", structure, "use another model or method, or method.dct=null"):
            offsets.install_dct(model)
