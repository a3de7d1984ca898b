"""What a sparse network is made of: a table, a line a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from sparse_lab.sparsity.flops import layer_costs
from sparse_lab.sparsity.images import Shape
from sparse_lab.sparsity.masks import Masks, uncounted

HEADS = ("layer", "shape", "kept", "of", "density", "dead channels", "FLOPs")


@dataclass(frozen=True)
class LayerRow:
    """shape: of the weight. dead: outputs of the layer (channels of a convolution) whose weights are all pruned. flops:
    of one input by kept weights, two a multiply-add; None where nobody has said what shape an input has.
    """

    layer: str
    shape: tuple[int, ...]
    kept: int
    total: int
    dead: int
    flops: int | None

    @property
    def density(self) -> float:
        return self.kept / self.total


@dataclass(frozen=True)
class Summary:
    """layers: in the network's order. kept, total: of the whole network, before sharing. uncounted: what has no masks
    though it is large. str() of it is a table.
    """

    layers: tuple[LayerRow, ...]
    kept: int
    total: int
    nonzero: int
    uncounted: tuple[dict[str, Any], ...]

    @property
    def sparsity(self) -> float:
        return 1.0 - self.kept / self.total

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for a record."""
        return {**asdict(self), "sparsity": self.sparsity}

    def __str__(self) -> str:
        rows = [_cells(row) for row in self.layers]
        flops = [row.flops for row in self.layers]
        whole = "-" if None in flops else f"{sum(one for one in flops if one is not None):,}"
        dead = sum(row.dead for row in self.layers)
        density = f"{100 * self.kept / self.total:.4g}%"
        rows.append(("all", "", f"{self.kept:,}", f"{self.total:,}", density, f"{dead:,}", whole))
        widths = [max(len(line[column]) for line in (HEADS, *rows)) for column in range(len(HEADS))]
        lines = [
            _line(HEADS, widths),
            "  ".join("-" * width for width in widths),
            *(_line(row, widths) for row in rows),
        ]
        lines.append(f"sparsity {100 * self.sparsity:.6g}%, {self.kept - self.nonzero:,} kept weights are zero")
        if self.uncounted:
            named = ", ".join(f"{one['name']} ({one['kind']}, {one['weights']:,})" for one in self.uncounted)
            lines.append(f"not counted, and dense: {named}")
        return "\n".join(lines)


def summary(network: nn.Module, masks: Masks, shape: Shape | None) -> Summary:
    """Return what `network` keeps. shape: of one input, for FLOPs; without it there are none.

    Raises SparseLabError where such an input does not go through.
    """
    flops: dict[str, int | None] = dict.fromkeys(masks.layers)
    if shape is not None:
        flops |= {cost.name: 2 * cost.sparse_macs for cost in layer_costs(network, shape)}
    rows = []
    for name, kept in masks.kept_by_layer().items():
        mask = masks[name]
        dead = int((~mask.flatten(1).any(1)).sum())
        rows.append(LayerRow(name, tuple(mask.shape), kept, mask.numel(), dead, flops[name]))
    nonzero = sum(int((layer.weight != 0).logical_and_(masks[name]).sum()) for name, layer in masks.layers.items())
    # where weights are shared each use counts; what is kept is kept once
    return Summary(tuple(rows), masks.kept(), masks.total(), nonzero, tuple(uncounted(network)))


def _cells(row: LayerRow) -> tuple[str, ...]:
    return (
        row.layer,
        "x".join(str(size) for size in row.shape),
        f"{row.kept:,}",
        f"{row.total:,}",
        f"{100 * row.density:.4g}%",
        f"{row.dead:,}",
        "-" if row.flops is None else f"{row.flops:,}",
    )


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """The first two to the left, numbers to the right."""
    shown = [
        cell.ljust(width) if column < 2 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(shown).rstrip()
