"""Crop, mirror and normalise a whole batch at once, on the device where it lies."""

from __future__ import annotations

import torch

from sparse_lab.config import AugmentConfig
from sparse_lab.errors import UserError


def draw(count: int, padding: int, mirror: bool, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw each image's crop and mirroring.

    Returns:
        offsets, int64 [2, count]: row and column where the crop starts, uniform in 0..2*padding and independent;
        mirrored, bool [count]: half of them, none if not `mirror`.
    """
    offsets = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5
    return offsets, mirrored & mirror


def check_padding(augment: AugmentConfig, height: int, width: int) -> None:
    """Raise a UserError where the reflection would reach beyond the image."""
    if augment.padding_mode == "reflect" and augment.crop_padding >= min(height, width):
        raise UserError(
            f"training.augment.crop_padding={augment.crop_padding} reflects more than a {height}x{width} image holds: "
            f"at most {min(height, width) - 1}"
        )


def crop(images: torch.Tensor, padding: int, mode: str, offsets: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
    """Cut one window of the images' own size out of each image after padding, and mirror it left to right where asked.

    Args:
        images: [B, C, H, W].
        padding: pixels added on all four sides.
        mode: what they hold: "zero", the raw value 0 as in torchvision's RandomCrop before Normalize; or "reflect".
        offsets: int64 [2, B], row and column of the window's corner in the padded image.
        mirrored: bool [B].
    """
    batch, channels, height, width = images.shape
    rows = offsets[0][:, None] + torch.arange(height, device=images.device)
    columns = offsets[1][:, None] + torch.arange(width, device=images.device)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    if mode == "reflect":
        # Folding the indices back into the image costs less than padding it, and torch pads no uint8 by reflection.
        rows, columns = _folded(rows - padding, height), _folded(columns - padding, width)
    else:
        images = torch.nn.functional.pad(images, (padding,) * 4)
    flat = (rows[:, :, None] * images.shape[3] + columns[:, None, :]).view(batch, 1, -1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, flat).view(batch, channels, height, width)


def _folded(position: torch.Tensor, size: int) -> torch.Tensor:
    return (size - 1) - ((size - 1) - position.abs()).abs()


def normalise(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(pixel / 255 - mean) / std of uint8, (value - mean) / std of float32 [B, C, H, W]: float32. mean and std are
    [C, 1, 1] on the same device.
    """
    shifted = images.float().div_(255).sub_(mean) if images.dtype == torch.uint8 else images.sub(mean)
    return shifted.div_(std)
