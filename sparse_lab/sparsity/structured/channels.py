"""Whole channels: which of them go together, which stay, and the masks that say so.

A channel is the rows (output filters) of every layer that makes it and the columns (inputs) of every layer that reads
it. Masking both makes the masked network equal to a really smaller one: the constant that a BatchNorm's shift leaves in
a dead channel meets masked columns alone.
"""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_lab.errors import SparseLabError
from sparse_lab.sparsity.images import Shape, hollow, image_like, send
from sparse_lab.sparsity.masks import is_excluded, layers, tied_layers
from sparse_lab.sparsity.topk import top_k


@dataclass(frozen=True)
class Group:
    """Channels that only go together: channel c is row c of every producer, and in a consumer that gives each channel k
    positions (1; H * W where a map is flattened into a linear layer) the columns c * k to c * k + k - 1.

    name: the first producer's. producers: in network order; depthwise convolutions count among them, for they have as
    many filters as channels. columns: (consumer, k) in network order.
    """

    name: str
    channels: int
    producers: tuple[str, ...]
    columns: tuple[tuple[str, int], ...]


def groups(model: nn.Module, shape: Shape, coupled: bool) -> list[Group]:
    """All groups in network order, found by following one image through an empty copy on the device "meta".

    coupled=False leaves out those that more than one layer makes (depthwise ones aside): the trunks of residual
    networks. What no layer reads, the logits, is in no group, and neither is what a layer that was left out makes or
    reads: it stays whole. Raises ValueError when nothing is left, and where layers are tied by one Parameter.
    """
    tied = [name for name, several in tied_layers(model).items() if len(several) > 1]
    if tied:
        raise ValueError(f"other layers are tied to the weight of {tied[0]}, and its filters cannot go from them alone")
    empty = hollow(model)
    found = layers(empty)
    graph = trace(empty, shape)
    whole = graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear])
    result = [
        _group(found, members) for members in whole if not any(is_excluded(one.dep.target.module) for one in members)
    ]
    result = [group for group in result if group.columns and (coupled or _makers(found, group) == 1)]
    if not result:
        raise ValueError("it has no convolution whose filters could go")
    order = {name: index for index, name in enumerate(found)}
    return sorted(result, key=lambda group: order[group.name])


def trace(model: nn.Module, shape: Shape) -> Any:
    """torch-pruning's dependency graph of `model` (Fang et al., CVPR 2023), which is left in evaluation mode."""
    import torch_pruning

    # the graph is read from autograd's: also where the caller has gradients off, or every weight is frozen
    with torch.inference_mode(False), torch.enable_grad():
        image = image_like(model, shape).requires_grad_()
        send(model.eval(), image)  # what does not go through says so in words of our own
        with warnings.catch_warnings():
            # of Parameters of a module's own: what they mean for channels is seen below
            warnings.simplefilter("ignore")
            return torch_pruning.DependencyGraph().build_dependency(model, (image,))


def kept_weights(groups: Sequence[Group], left: Mapping[str, int], sizes: Mapping[str, torch.Size]) -> int:
    """Counted weights in the whole network when each group keeps `left[group.name]` channels.

    sizes: the shape of every counted weight, by layer.
    """
    rows = {name: left[group.name] for group in groups for name in group.producers}
    columns = {name: left[group.name] * k for group in groups for name, k in group.columns}
    return sum(rows.get(name, size[0]) * columns.get(name, size[1]) * size[2:].numel() for name, size in sizes.items())


def masks_of(
    groups: Sequence[Group], alive: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], columns: bool = True
) -> dict[str, Tensor]:
    """Bool masks, one for every layer of `shapes`, that keep the channels alive (a bool tensor [channels] a group).

    columns=False masks rows only, so that a channel may come back (soft filter pruning).
    """
    device = next(iter(alive.values())).device
    masks = {name: torch.ones(shape, dtype=torch.bool, device=device) for name, shape in shapes.items()}
    for group in groups:
        dead = ~alive[group.name]
        for name in group.producers:
            masks[name][dead] = False
        if columns:
            for name, k in group.columns:
                masks[name][:, dead.repeat_interleave(k)] = False
    return masks


def alive_of(groups: Sequence[Group], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bool [channels] a group: a channel is alive when any weight in its rows is kept."""
    return {
        group.name: torch.stack([masks[name].flatten(1).any(1) for name in group.producers]).any(0) for group in groups
    }


def choose_channels(
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    kept: int,
    distribution: str,
    shapes: Mapping[str, torch.Size],
) -> dict[str, Tensor]:
    """Which channels stay (bool [channels] a group), as many as `kept` counted weights of the whole network allow.

    Channels go one by one, never a group's last, until at most `kept` weights are left. scores: [channels] a group,
    higher is better. distribution "global": the lowest score goes first; "uniform": the lowest place within its group,
    (rank + 1) / channels, so that all groups lose the same share. Of equals, what comes first in the network stays.

    Raises SparseLabError when one channel a group is more than `kept`, and ValueError for NaN scores.
    """
    order = _order(groups, scores, distribution)

    def left(gone: int) -> dict[str, int]:
        lost = torch.bincount(order[:gone], minlength=len(groups)).tolist()
        return {group.name: group.channels - number for group, number in zip(groups, lost, strict=True)}

    least = kept_weights(groups, left(len(order)), shapes)
    if least > kept:
        total = sum(shape.numel() for shape in shapes.values())
        highest = (total - least) * 10**6 // total / 10**6
        raise SparseLabError(
            f"{kept} weights cannot keep one channel in each group, which takes {least}: by whole channels this "
            f"network gets no sparser than {highest}: choose a lower sparsity"
        )
    gone = bisect.bisect_left(range(len(order)), -kept, key=lambda gone: -kept_weights(groups, left(gone), shapes))
    return {name: top_k(scores[name], number) for name, number in left(gone).items()}


def by_rates(groups: Sequence[Group], scores: Mapping[str, Tensor], rates: Sequence[float]) -> dict[str, Tensor]:
    """Which channels stay (bool [channels] a group) when the i-th group keeps its int(channels * (1 - rates[i])) best.

    A group's last channel stays in any case, and groups beyond the rates lose nothing. Raises SparseLabError for more
    rates than groups and for a rate outside [0, 1].
    """
    if len(rates) > len(groups):
        raise SparseLabError(f"{len(rates)} rates for {len(groups)} groups of channels: give at most {len(groups)}")
    if not all(0.0 <= rate <= 1.0 for rate in rates):
        raise SparseLabError(
            f"a rate is the share of a group's channels that goes, from 0 to 1; these are {list(rates)}"
        )
    gone = [*rates, *[0.0] * (len(groups) - len(rates))]
    return {
        # 10 * (1 - 0.9) is a hair below 1
        group.name: top_k(scores[group.name], max(1, int(group.channels * (1.0 - rate) + 1e-9)))
        for group, rate in zip(groups, gone, strict=True)
    }


def _group(found: Mapping[str, nn.Module], members: Any) -> Group:
    """A group of torch-pruning's as ours; its BatchNorms, and whatever else has no counted weight, are left out."""
    names = {module: name for name, module in found.items()}
    channels = len(members[0].idxs)
    producers, columns = set(), {}
    for member in members:
        name = names.get(member.dep.target.module)
        if name is None:
            continue
        k = len(member.idxs) // channels
        if [index // k for index in member.idxs] != list(member.root_idxs):
            raise ValueError(f"the channels that {name!r} reads or makes are not in the order they are made in")
        if member.dep.handler.__name__ == "prune_in_channels":
            columns[name] = k
        else:
            producers.add(name)
    made = tuple(name for name in found if name in producers)
    return Group(made[0], channels, made, tuple((name, columns[name]) for name in found if name in columns))


def _makers(found: Mapping[str, nn.Module], group: Group) -> int:
    return sum(getattr(found[name], "groups", 1) == 1 for name in group.producers)


def _order(groups: Sequence[Group], scores: Mapping[str, Tensor], distribution: str) -> Tensor:
    """The group (its index) that loses a channel, turn by turn, until each has one left."""
    keys = []
    for group in groups:
        if distribution == "global":
            ranked = scores[group.name].detach().double().cpu().sort().values
        else:
            ranked = torch.arange(1, group.channels + 1).double() / group.channels
        keys.append(ranked[:-1])
    owner = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor([len(key) for key in keys]))
    return owner.flip(0)[torch.cat(keys).flip(0).argsort(stable=True)]
