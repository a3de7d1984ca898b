"""An image as a row of tokens: what the Vision Transformer and the MLP-Mixer begin with and are made of."""

from __future__ import annotations

from torch import Tensor, nn

from sparse_lab.errors import UserError
from sparse_lab.models.spec import Spec


class Patches(nn.Module):
    """One token a patch, by a convolution whose stride is its kernel: (N, C, H, W) -> (N, H W / patch^2, dim)."""

    def __init__(self, spec: Spec, patch: int, dim: int) -> None:
        super().__init__()
        height, width = spec.image_size
        if patch < 1 or height % patch or width % patch:
            raise UserError(f"model.options.patch_size={patch} does not divide images of {height}x{width} pixels")
        self.number = (height // patch) * (width // patch)
        self.proj = nn.Conv2d(spec.channels, dim, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    """Two linear layers over the last dimension, GELU between them."""

    def __init__(self, size: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.act(self.fc1(x))))


def check_sizes(dropout: float, **sizes: int) -> None:
    """Raise UserError for an option that is no size, or no share."""
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"model.options.dropout={dropout} must be 0 or more, and below 1")
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"model.options.{name}={size} must be 1 or more")


def initialise_tokens(network: nn.Module) -> None:
    """Draw the start weights in place, as DeiT does (Touvron et al., ICML 2021): normal with standard deviation 0.02,
    cut off at two of them; biases 0, LayerNorm 1 and 0. A network on the meta device has no values to start from.
    """
    if next(network.parameters()).is_meta:
        return
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for parameter in network.parameters(recurse=False):
        nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
