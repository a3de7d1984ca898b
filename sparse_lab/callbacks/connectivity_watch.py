"""Says aloud when a mask cuts the network from its input, or makes that an error."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from sparse_lab.config import UserError
from sparse_lab.sparsity.connectivity import Connectivity, connectivity


class ConnectivityWatch:
    """Called after each mask change by the callback that made it. Keeps the last finding for the record."""

    def __init__(self, model: nn.Module, image_size: int, require: bool, say: Callable[[str], None]) -> None:
        self.model = model
        self.image_size = image_size
        self.require = require
        self.say = say
        self.last: Connectivity | None = None

    def __call__(self) -> Connectivity:
        """Look now. Raises UserError when the network is cut and sparsity.require_connected is set."""
        found = connectivity(self.model, self.image_size)
        self.last = found
        if not found.connected:
            line = f"no path leads from the input to a logit: {found.kept} weights are kept, none has an effect"
            if self.require:
                raise UserError(f"{line} (sparsity.require_connected=true)")
            self.say(
                f"WARNING: THE MASK CUTS THE NETWORK: {line}, so its answer is constant and nothing can be learned"
            )
        elif found.live_logits < found.logits:
            self.say(f"WARNING: only {found.live_logits} of {found.logits} logits can be reached from the input")
        return found
