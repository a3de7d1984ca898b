"""What the surgeries on a network have in common: a network follows a state dict that was written after one of them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from sparse_lab.models import compactors, dyrelu, offsets


def rebuild_structure(model: nn.Module, names: Iterable[str]) -> None:
    """Bring `model` to the stage of its surgeries at which a state dict with these names was written."""
    known = list(names)
    dyrelu.rebuild_structure(model, known)
    compactors.rebuild_structure(model, known)
    offsets.match_dct(model, known)
    offsets.match_recovery(model, known)
