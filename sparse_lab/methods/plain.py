"""The plain network: inside what others have put around it, and as it is loaded where nobody knows of masks."""

from __future__ import annotations

from torch import Tensor, nn

from sparse_lab.errors import SparseLabError
from sparse_lab.models import compactors, dyrelu, offsets
from sparse_lab.models.weight_sharing import unshared


def plain(model: nn.Module) -> nn.Module:
    """Return the network inside: of a compiled module, and of one that is wrapped for DDP or averaging. Raise
    SparseLabError for FSDP's.
    """
    if not isinstance(model, nn.Module):
        raise SparseLabError(f"a network (an instance of nn.Module) is needed here, not {type(model).__name__}")
    while True:
        kind = type(model).__name__
        if kind in ("FullyShardedDataParallel", "XlaFullyShardedDataParallel") or kind.startswith("FSDP"):
            raise SparseLabError(
                "FSDP shares each weight out over processes, and a mask would see a part of it: use DDP"
            )
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif kind in ("DistributedDataParallel", "DataParallel", "AveragedModel"):
            model = model.module  # type: ignore[assignment]
        else:
            return model


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict that loads into the plain network with strict=True: without masks, with what is pruned zero,
    what is shared written out, and cosine transforms and means added to the weights.

    Raises SparseLabError while DyReLUs, or compactors, are still in the network: they have no plain form.
    """
    network = plain(model)
    for kind, there in (("DyReLU", dyrelu.activations(network)), ("compactor", compactors.compactors(network))):
        if there:
            raise SparseLabError(f"{len(there)} {kind}s are still in the network: train on until they are gone")
    done = unshared(offsets.folded(network))
    masks = {f"{name}.mask".lstrip(".") for name, module in done.named_modules() if "mask" in module._buffers}
    return {name: value.detach().clone() for name, value in done.state_dict().items() if name not in masks}
