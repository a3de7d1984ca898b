from __future__ import annotations

import pytest
import torch

from sparse_lab.config import AugmentConfig
from sparse_lab.data import augment
from sparse_lab.errors import UserError


def sliced(
    images: torch.Tensor, padding: int, mode: str, offsets: torch.Tensor, mirrored: torch.Tensor
) -> torch.Tensor:
    """The reference: torch's own padding in float64, one slice an image."""
    names = {"zero": "constant", "reflect": "reflect"}
    height, width = images.shape[2:]
    windows = []
    for index, image in enumerate(images.double()):
        padded = torch.nn.functional.pad(image[None], (padding,) * 4, mode=names[mode])[0]
        row, column = offsets[:, index].tolist()
        window = padded[:, row : row + height, column : column + width]
        windows.append(window.flip(2) if mirrored[index] else window)
    return torch.stack(windows)


@pytest.mark.parametrize("mode", ["zero", "reflect"])
@pytest.mark.parametrize("padding", [0, 1, 4, 7])
@pytest.mark.parametrize("size", [(32, 32), (8, 11)])
def test_crop_equals_slicing_each_image(mode: str, padding: int, size: tuple[int, int]) -> None:
    source = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, 3, *size), dtype=torch.uint8, generator=source)
    offsets, mirrored = augment.draw(60, padding, True, source)
    assert 0 < mirrored.sum() < 60
    cropped = augment.crop(images, padding, mode, offsets, mirrored)
    assert cropped.dtype == torch.uint8
    assert torch.equal(cropped.double(), sliced(images, padding, mode, offsets, mirrored))


def test_zero_padding_is_pixel_zero_before_normalisation() -> None:
    images = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    cropped = augment.crop(images, 4, "zero", torch.tensor([[0], [0]]), torch.tensor([False]))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.5, 0.4, 0.3], [0.2, 0.25, 0.5]))
    corner = augment.normalise(cropped, mean, std)[0, :, 0, 0]
    assert torch.allclose(corner, torch.tensor([-2.5, -1.6, -0.6]))


def test_every_offset_is_reached_equally_often_and_independently() -> None:
    offsets, mirrored = augment.draw(81_000, 4, True, torch.Generator().manual_seed(1))
    cells = torch.bincount(offsets[0] * 9 + offsets[1], minlength=81).double()
    assert len(cells) == 81
    chi_squared = ((cells - 1000) ** 2 / 1000).sum()
    assert chi_squared < 80 + 5 * (2 * 80) ** 0.5  # mean and five deviations of chi² with 80 degrees of freedom
    assert abs(mirrored.double().mean() - 0.5) < 5 * 0.5 / 81_000**0.5


def test_no_mirroring_where_it_is_off() -> None:
    assert not augment.draw(1000, 4, False, torch.Generator().manual_seed(1))[1].any()


def test_normalisation_is_the_closed_form() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    mean, std = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
    seen = augment.normalise(images, torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1))
    wanted = torch.stack(
        [(torch.arange(256, dtype=torch.float64) / 255 - m) / s for m, s in zip(mean, std, strict=True)]
    ).view(1, 3, 16, 16)
    assert seen.dtype == torch.float32
    assert (seen.double() - wanted).abs().max() < 1e-6


def test_reflection_beyond_the_image_is_refused() -> None:
    augment.check_padding(AugmentConfig(crop_padding=7, padding_mode="reflect"), 8, 8)
    augment.check_padding(AugmentConfig(crop_padding=8, padding_mode="zero"), 8, 8)
    with pytest.raises(UserError, match="at most 7"):
        augment.check_padding(AugmentConfig(crop_padding=8, padding_mode="reflect"), 8, 8)
