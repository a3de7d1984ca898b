"""The Vision Transformer (Dosovitskiy et al., ICLR 2021), small enough for small images by default.

With patch_size=16 dim=192 depth=12 heads=3 and images of 224 pixels it is DeiT-Ti.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_lab.errors import UserError
from sparse_lab.models.spec import Spec
from sparse_lab.models.tokens import Mlp, Patches, check_sizes, initialise_tokens


class Attention(nn.Module):
    """Multi-head self-attention with linear layers of its own for queries, keys and values: (N, T, dim) -> the same."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.dropout(self.proj(mixed.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Attention and an MLP, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = Attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patches and a class token with learned positions, blocks, and a linear classifier on the class token."""

    def __init__(
        self, spec: Spec, patch_size: int, dim: int, depth: int, heads: int, mlp_ratio: float, dropout: float
    ) -> None:
        super().__init__()
        check_sizes(dropout, depth=depth)
        if dim % heads:
            raise UserError(f"model.options.dim={dim} does not divide into model.options.heads={heads}")
        self.patches = Patches(spec, patch_size, dim)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.zeros(1, self.patches.number + 1, dim))
        hidden = max(1, round(mlp_ratio * dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, hidden, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, spec.num_classes)
        initialise_tokens(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, num_classes)."""
        tokens = self.patches(images)
        tokens = torch.cat([self.class_token.expand(tokens.shape[0], -1, -1), tokens], 1) + self.positions
        return self.head(self.norm(self.blocks(tokens))[:, 0])


def vit(spec: Spec) -> VisionTransformer:
    """A Vision Transformer; width is a factor on dim."""
    options = dict(spec.options)
    dim, heads = options["dim"], options["heads"]
    check_sizes(options["dropout"], dim=dim, heads=heads)
    if spec.width != 1.0:
        dim = max(1, round(dim * spec.width / heads)) * heads
    return VisionTransformer(spec, **{**options, "dim": dim})
