"""A network without the channels that nobody reads: really smaller, with the same outputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparse_lab.sparsity.images import Shape
from sparse_lab.sparsity.masks import layers
from sparse_lab.sparsity.scores import evaluating
from sparse_lab.sparsity.state import load_state
from sparse_lab.sparsity.structured.channels import Group, groups, trace


def thin(model: nn.Module, shape: Shape) -> nn.Module:
    """A smaller copy of a plain network, without masks, whose outputs in evaluation mode are those of `model`.

    A channel goes (filters, biases, its BatchNorm, the inputs of whatever reads it) when all weights that read it are
    zero or go themselves. A group's last channel stays. So does a channel whose own filters are zero but that others
    still read: it carries a constant, which BatchNorm's shift or a bias puts there.

    Raises ValueError for a network without a convolution whose filters could go.
    """
    smaller = copy.deepcopy(model)
    found = layers(smaller)
    for module in found.values():
        if hasattr(module, "mask"):
            del module.mask
    parts = groups(smaller, shape, coupled=True)
    unread = _unread(parts, {name: module.weight.detach() != 0 for name, module in found.items()})
    with evaluating(smaller):
        graph = trace(smaller, shape)
        for part in parts:
            gone = torch.nonzero(unread[part.name]).flatten().tolist()
            if gone:
                root = found[part.name]
                prune = graph.get_pruner_of_module(root).prune_out_channels
                graph.get_pruning_group(root, prune, gone).prune()
    return smaller


def rebuild(plain: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """`plain`, freshly built, shrunk in place to the shapes in `state` (a thin network's state dict) and loaded.

    Raises RuntimeError, as torch's strict loading does, when `state` is not that of a thinner `plain`.
    """
    for prefix, module in plain.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            shape = state.get(f"{prefix}.{name}".lstrip("."), tensor).shape
            fits = len(shape) == tensor.dim() and all(new <= old for new, old in zip(shape, tensor.shape, strict=True))
            if fits and shape != tensor.shape:  # a buffer that no state dict holds keeps its numbers
                new = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
                setattr(module, name, nn.Parameter(new) if isinstance(tensor, nn.Parameter) else new)
        _set_sizes(module)
    load_state(plain, state)
    return plain


def _set_sizes(module: nn.Module) -> None:
    """Make a layer's own numbers those of its tensors."""
    if isinstance(module, nn.Conv2d):
        module.out_channels = module.weight.shape[0]
        if module.groups > 1:
            module.groups = module.out_channels
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.BatchNorm2d):
        module.num_features = module.weight.shape[0]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape


def _unread(parts: list[Group], nonzero: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bool [channels] a group: True where nothing that stays reads the channel, but for one. Uses `nonzero` up.

    What an unread channel's own filters read is read by them no longer: so it goes on until nothing changes.
    """
    unread: dict[str, Tensor] = {}
    before = None
    while before != (before := sum(int(gone.sum()) for gone in unread.values())):
        # from the logits backward, most networks are done after one pass
        for part in reversed(parts):
            readers = [nonzero[name].transpose(0, 1).flatten(1).any(1) for name, _ in part.columns]
            unread[part.name] = ~torch.stack([reader.view(part.channels, -1).any(1) for reader in readers]).any(0)
            for name in part.producers:
                nonzero[name][unread[part.name]] = False
    for gone in unread.values():
        gone[0] &= not bool(gone.all())
    return unread
