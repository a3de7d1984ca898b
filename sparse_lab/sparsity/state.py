"""A network's state dict, as it comes back from a file or from a copy."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def load_state(model: nn.Module, state: Mapping[str, Tensor], strict: bool = True) -> Any:
    """Load a state dict that has lost on its way what torch hangs on it (the versions that some modules ask for), and
    return what torch returns.
    """
    whole: Any = OrderedDict(state)
    whole._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    return model.load_state_dict(whole, strict=strict)
