"""The MLP-Mixer (Tolstikhin et al., NeurIPS 2021), small enough for small images by default.

With patch_size=16 dim=512 depth=8 and images of 224 pixels it is Mixer-S/16.
"""

from __future__ import annotations

from torch import Tensor, nn

from sparse_lab.models.spec import Spec
from sparse_lab.models.tokens import Mlp, Patches, check_sizes, initialise_tokens


class Block(nn.Module):
    """An MLP over tokens and one over channels, behind a LayerNorm and beside a shortcut each: (N, T, dim)."""

    def __init__(self, tokens: int, dim: int, token_hidden: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.token_mlp = Mlp(tokens, token_hidden, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.channel_mlp = Mlp(dim, hidden, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mlp(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mlp(self.norm2(x))


class Mixer(nn.Module):
    """Patches, blocks, LayerNorm, the mean over tokens and a linear classifier. Hidden sizes are shares of dim."""

    def __init__(
        self, spec: Spec, patch_size: int, dim: int, depth: int, token_ratio: float, mlp_ratio: float, dropout: float
    ) -> None:
        super().__init__()
        check_sizes(dropout, dim=dim, depth=depth)
        self.patches = Patches(spec, patch_size, dim)
        token_hidden, hidden = max(1, round(token_ratio * dim)), max(1, round(mlp_ratio * dim))
        blocks = (Block(self.patches.number, dim, token_hidden, hidden, dropout) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, spec.num_classes)
        initialise_tokens(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, num_classes)."""
        return self.head(self.norm(self.blocks(self.patches(images))).mean(1))


def mixer(spec: Spec) -> Mixer:
    """An MLP-Mixer; width is a factor on dim."""
    options = dict(spec.options)
    return Mixer(spec, **{**options, "dim": max(1, round(options["dim"] * spec.width))})
