"""Every kind of pixel against arithmetic on the arrays that the files were made of; and data sets of nothing."""

from __future__ import annotations

import dataclasses
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin
from torchvision.datasets.folder import default_loader

from sparse_lab.config import DatasetConfig, TrainingConfig
from sparse_lab.data import build
from sparse_lab.data.photo import decode
from sparse_lab.data.source import ImageSet
from sparse_lab.errors import UserError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 65536, (6, 7), dtype=np.uint16)
GREY[0, :4] = 0, 128, 129, 65535
BYTES = RNG.integers(0, 256, (6, 7, 4), dtype=np.uint8)
KINDS = {0: 1, 2: 3, 4: 2, 6: 4}  # PNG's colour types and their channels


def png(values: np.ndarray, kind: int, bits: int = 16) -> bytes:
    """A PNG by hand: Pillow writes no colours of 16 bits."""
    rows = b"".join(b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in values)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, kind, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def rgb(path: Path) -> np.ndarray:
    image = decode(str(path))
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def big_endian(path: Path) -> None:
    Image.frombytes("I;16B", (7, 6), GREY.astype(">u2").tobytes()).save(path)


def white_is_zero(path: Path) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    Image.fromarray(GREY).save(path, tiffinfo=tags)
    with Image.open(path) as photo:
        assert photo.tag_v2[262] == 0


def signed(path: Path) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[339] = 2
    Image.fromarray(BYTES[..., 0]).save(path, tiffinfo=tags)


def netpbm(path: Path) -> None:
    path.write_bytes(b"P5 7 6 65535\n" + GREY.astype(">u2").tobytes())


GREYS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "PNG": ("a.png", lambda path: path.write_bytes(png(GREY, 0))),
    "PNG by Pillow": ("a.png", lambda path: Image.fromarray(GREY).save(path)),
    "TIFF": ("a.tif", lambda path: Image.fromarray(GREY).save(path)),
    "TIFF, big endian": ("a.tif", big_endian),
    "PGM": ("a.pgm", netpbm),
    "a PNG that is called a JPEG": ("a.jpg", lambda path: path.write_bytes(png(GREY, 0))),
}


@pytest.mark.parametrize("name", GREYS)
def test_grey_of_16_bits_is_divided_by_257(name, tmp_path):
    file, write = GREYS[name]
    write(tmp_path / file)
    found = rgb(tmp_path / file)
    wanted = np.rint(GREY / 257)
    assert (found == wanted[..., None]).all(), f"largest difference {np.abs(found - wanted[..., None]).max()}"


def test_where_white_is_zero_grey_is_turned(tmp_path):
    white_is_zero(tmp_path / "a.tif")
    assert (rgb(tmp_path / "a.tif") == 255 - np.rint(GREY / 257)[..., None]).all()


def test_12_bits_fill_the_scale(tmp_path):
    """Two values in three bytes, as TIFF packs them."""
    values = RNG.integers(0, 4096, (6, 8))
    bits = "".join(f"{value:012b}" for value in values.flatten())
    body = bytes(int(bits[place : place + 8], 2) for place in range(0, len(bits), 8))
    tags = [(256, 3, 8), (257, 3, 6), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 200), (277, 3, 1), (278, 3, 6)]
    tags.append((279, 4, len(body)))
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    (tmp_path / "a.tif").write_bytes(head.ljust(200, b"\0") + body)
    assert (rgb(tmp_path / "a.tif") == np.rint(values * 255 / 4095)[..., None]).all()


@pytest.mark.parametrize("kind", [2, 4, 6])
def test_colours_of_16_bits_are_right_to_the_level(kind, tmp_path):
    """Pillow takes the upper byte of them, which is below the rounded value by one level at most."""
    values = RNG.integers(0, 65536, (6, 7, KINDS[kind]), dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(png(values, kind))
    wanted = np.rint(values[..., :3] if kind != 4 else values[..., [0, 0, 0]]) / 257
    found = rgb(tmp_path / "a.png")
    assert np.abs(found - wanted).max() <= 1 and found.max() > 240 and found.min() < 15


def test_modes_of_8_bits_are_what_arithmetic_says(tmp_path):
    wanted = {
        "1": np.repeat((BYTES[..., :1] > 127) * 255, 3, 2),
        "L": np.repeat(BYTES[..., :1], 3, 2),
        "RGB": BYTES[..., :3],
        "RGBA": BYTES[..., :3],
        "LA": np.repeat(BYTES[..., :1], 3, 2),
        "CMYK": (255 - BYTES[..., :3].astype(int)) * (255 - BYTES[..., 3:].astype(int)) / 255,
    }
    made = {
        "1": Image.fromarray(BYTES[..., 0] > 127),
        "LA": Image.fromarray(np.ascontiguousarray(BYTES[..., [0, 3]]), mode="LA"),
        "CMYK": Image.fromarray(BYTES, mode="CMYK"),
        "RGBA": Image.fromarray(BYTES),
        "RGB": Image.fromarray(BYTES[..., :3]),
        "L": Image.fromarray(BYTES[..., 0]),
    }
    for mode, image in made.items():
        path = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        image.save(path)
        with Image.open(path) as photo:
            assert photo.mode == mode
        assert np.abs(rgb(path) - wanted[mode]).max() <= (1 if mode == "CMYK" else 0), mode


def test_palettes_and_orientation_and_frames_are_as_torchvision_reads_them(tmp_path):
    palette = Image.fromarray(BYTES[..., 0] % 16).convert("P")
    palette.putpalette(RNG.integers(0, 256, 48, dtype=np.uint8).tolist())
    palette.save(tmp_path / "plain.png")
    palette.save(tmp_path / "clear.png", transparency=bytes(range(0, 256, 16)))
    turned = Image.fromarray(BYTES[..., :3])
    exif = Image.Exif()
    exif[274] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    turned.save(tmp_path / "frames.tif", save_all=True, append_images=[Image.fromarray(255 - BYTES[..., :3])])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = {path.name: rgb(path) for path in tmp_path.iterdir()}
    assert not said, "a worker process would print it"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, image in found.items():
            assert (image == np.asarray(default_loader(tmp_path / name))).all(), name


def _claiming(side: int) -> bytes:
    """A small PNG whose head promises side x side pixels."""
    small = png(GREY, 0)
    head = b"IHDR" + struct.pack(">II", side, side) + small[24:29]
    return small[:12] + head + struct.pack(">I", zlib.crc32(head)) + small[33:]


REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "float": ("a.tif", lambda path: Image.fromarray(GREY.astype(np.float32) / 65535).save(path), "mode F.*floats"),
    "32 bits": ("a.tif", lambda path: Image.fromarray(GREY.astype(np.int32)).save(path), "mode I.*32 bits"),
    "signed bytes": ("a.tif", lambda path: signed(path), "mode L.*signed"),
    "float map": ("a.pgm", lambda path: path.write_bytes(b"Pf\n7 6\n-1.0\n" + GREY.astype("<f4").tobytes()), "mode F"),
    "Lab": ("a.tif", lambda path: Image.frombytes("LAB", (7, 6), BYTES[..., :3].tobytes()).save(path), "mode LAB"),
    "a shape in transparency": (
        "a.png", lambda path: Image.fromarray(np.dstack([0 * BYTES[..., :3], BYTES[..., 3]])).save(path),
        "transparency alone",
    ),
    "no image": ("a.png", lambda path: path.write_bytes(b"no image"), "cannot be read"),
    "a broken head": ("a.png", lambda path: path.write_bytes(png(GREY, 0)[:20] + b"\0" * 40), "cannot be read"),
    "colours of 7 bits": ("a.png", lambda path: path.write_bytes(png(GREY, 2, bits=7)), "cannot be read"),
    "a bomb": ("a.png", lambda path: path.write_bytes(_claiming(65536)), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_known_range_or_cannot_be_read_is_refused_by_name(name, tmp_path):
    file, write, said = REFUSED[name]
    write(tmp_path / file)
    with pytest.raises(UserError, match=said) as caught:
        decode(str(tmp_path / file))
    assert str(caught.value).startswith(str(tmp_path / file)) and "\n" not in str(caught.value)


# data sets


@pytest.fixture
def folder(tmp_path) -> Callable[..., DatasetConfig]:
    """folder(image): 2 classes of 4 + 2 images that `image(number)` gives; a data set in ImageNet's layout."""

    def make(image: Callable[[int], Image.Image], kind: str = "png", workers: int = 0) -> DatasetConfig:
        for number, place in enumerate(f"{part}/{name}/{i}" for part, count in (("train", 4), ("val", 2))
                                       for name in ("a", "b") for i in range(count)):  # fmt: skip
            path = tmp_path / "imagenet" / f"{place}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image(number).save(path)
        return DatasetConfig(
            name="imagenet", root=str(tmp_path), num_classes=2, image_size=28, validation=0.25, workers=workers
        )

    return make


def noise(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 65536, (40, 40), dtype=np.uint16)


def test_a_folder_of_16_bits_trains_on_what_it_shows(folder):
    """Before, it was all white: standard deviation 0."""
    data = build(folder(lambda number: Image.fromarray(noise(number))), TrainingConfig(batch_size=4), seed=1)
    images = torch.cat([images for images, _ in data.train])
    assert images.std() > 0.2 and abs(images.mean()) < 0.2, f"mean {images.mean():.2f}, std {images.std():.2f}"


@pytest.mark.parametrize("value", [np.float32, np.int32])
def test_a_folder_without_a_known_range_is_refused_before_training(value, folder):
    with pytest.raises(UserError, match=r"train/a/0\.tif is a TIFF of mode [FI]: "):
        build(folder(lambda number: Image.fromarray(noise(number).astype(value)), "tif"), TrainingConfig(), seed=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_one_that_no_sample_found_is_one_line_from_the_loader(workers, folder, monkeypatch):
    monkeypatch.setattr("sparse_lab.data.photo.HEADERS", 1)
    dataset = folder(lambda number: Image.fromarray(noise(number)), "tif", workers)
    odd = Path(dataset.root) / "imagenet" / "val" / "b" / "1.tif"
    Image.fromarray(noise(9).astype(np.float32)).save(odd)
    data = build(dataset, TrainingConfig(batch_size=4), seed=1)
    with pytest.raises(UserError) as caught:
        list(data.test)
    assert str(caught.value).startswith(f"{odd} is a TIFF of mode F: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (lambda number: Image.new("L", (40, 40), number * 9), "of a single colour each"),
        (lambda number: Image.new("RGB", (40, 40), (255, 255, 255)), "of a single colour each"),
        (lambda number: Image.fromarray(noise(3)), "the same image"),
    ],
)
def test_a_folder_without_variance_is_refused_before_training(image, said, folder):
    with pytest.raises(UserError, match=f"6 training images are {said}"):
        build(folder(image), TrainingConfig(), seed=1)


def test_some_that_vary_are_enough(folder):
    build(
        folder(lambda number: Image.new("L", (40, 40), 7) if number else Image.fromarray(noise(1))), TrainingConfig(), 1
    )


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.full((9, 3, 8, 8), 255, dtype=torch.uint8), "of a single colour each"),
        (torch.arange(27, dtype=torch.uint8).view(9, 3, 1, 1).expand(9, 3, 8, 8), "of a single colour each"),
        (torch.arange(192, dtype=torch.uint8).view(1, 3, 8, 8).expand(9, 3, 8, 8), "the same image"),
    ],
)
def test_images_in_memory_without_variance_are_refused(images, said, monkeypatch):
    labels = torch.arange(9) % 3
    source = ImageSet(images, labels, images, labels, {"digits": "0"}, official=True)
    monkeypatch.setattr("sparse_lab.data.digits.load", lambda dataset, seed: source)
    with pytest.raises(UserError, match=f"digits in data: 7 training images are {said}"):
        build(DatasetConfig(name="digits", num_classes=3, image_size=8, validation=0.2), TrainingConfig(), seed=1)
    odd = images.clone()
    odd[:, 0, 0, :2] = torch.tensor([[1, 2], [3, 4], [5, 6]] * 3, dtype=torch.uint8)[:, None].squeeze(1)
    monkeypatch.setattr("sparse_lab.data.digits.load", lambda *_: dataclasses.replace(source, images=odd))
    build(DatasetConfig(name="digits", num_classes=3, image_size=8, validation=0.2), TrainingConfig(), seed=1)
