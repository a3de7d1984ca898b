"""Files that are no photos, or hostile ones: each is refused by its name, in one line, and nobody waits for it; and
photos that a camera has turned.
"""

from __future__ import annotations

import dataclasses
import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from sparse_lab.config import AugmentConfig, DatasetConfig, TrainingConfig
from sparse_lab.data import build, photo
from sparse_lab.data.photo import Unreadable, decode
from sparse_lab.errors import UserError

TRAINING = TrainingConfig(batch_size=4, augment=AugmentConfig(crop_padding=0))
NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, body: bytes, more: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", head), more, chunk(b"IDAT", body), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def noise(path: Path, **more: object) -> bytes:
    Image.fromarray(NOISE).save(path, **more)  # type: ignore[arg-type]
    return path.read_bytes()


def broken_chunk(path: Path) -> None:
    rows = zlib.compress(NOISE.tobytes())
    broken = struct.pack(">I", len(rows) - 9) + b"I\0\xffT" + rows[9:]
    path.write_bytes(png(30, 20, rows[:9]).replace(chunk(b"IEND", b""), broken))


def wrong_sum(path: Path) -> None:
    whole = bytearray(noise(path))
    whole[whole.index(b"IHDR") + 14] ^= 1
    path.write_bytes(whole)


BOMB = "larger than 178,956,970 pixels"
# what makes the file -> words of its line
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda path: path.touch(), "no kind of image"),
    "text": (lambda path: path.write_text("<html>"), "no kind of image"),
    "cut": (lambda path: path.write_bytes(noise(path)[:600]), "truncated"),
    "cut in its head": (lambda path: path.write_bytes(noise(path)[:20]), "cannot be read"),
    "a bomb": (lambda path: path.write_bytes(png(50_000, 50_000, zlib.compress(b""))), BOMB),
    "a size of nothing": (lambda path: path.write_bytes(png(0, 0, zlib.compress(b""))), "cannot be read"),
    "a size beyond": (lambda path: path.write_bytes(png(2**31 - 1, 2**31 - 1, b"")), BOMB),
    "a broken chunk": (broken_chunk, "broken PNG"),
    "a wrong checksum": (wrong_sum, "cannot be read"),
    "a comment that unpacks to 100 MB": (
        lambda path: path.write_bytes(png(4, 4, b"", chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8))))),
        "cannot be read",
    ),
    "a link that leads nowhere": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "symbolic links"),
    "a folder": (lambda path: path.mkdir(), "directory"),
    "a pipe": (lambda path: os.mkfifo(path), "a pipe, a device or a socket"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "a pipe, a device or a socket"),
    "a GIF's head": (lambda path: path.write_bytes(b"GIF89a" + b"\xff" * 7), "cannot be read"),
    "a BMP of -2^31 pixels": (
        lambda path: path.write_bytes(
            b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, -(2**31), -(2**31), 1, 24, 0,
                                                                     0, 0, 0, 0, 0)
        ),
        "cannot be read",
    ),
    "a TIFF that points at itself": (
        lambda path: path.write_bytes(b"II*\0" + struct.pack("<IHHHIII", 8, 1, 256, 4, 1, 5, 8)),
        "cannot be read",
    ),
    "a PPM of 10^20 pixels": (lambda path: path.write_bytes(b"P6 10000000000 10000000000 255\n"), "cannot be read"),
    "a PPM of half a number": (lambda path: path.write_bytes(b"P6 12x 7 255\n"), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_photo_is_named_in_one_line(what, tmp_path):
    make, said = BAD[what]
    make(tmp_path / "bad.png")
    begun = time.monotonic()
    with pytest.raises(Unreadable) as caught:
        decode(str(tmp_path / "bad.png"))
    line = str(caught.value)
    assert line.startswith(f"{tmp_path}/bad.png ") and said in line and line.isprintable() and len(line) < 400
    assert time.monotonic() - begun < 5


def test_a_photo_that_may_not_be_read(tmp_path, monkeypatch):
    """Root may read all, so the refusal is made here."""
    noise(tmp_path / "a.png")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(Unreadable, match=r"a\.png cannot be read as an image \(Permission denied\)"):
        decode(str(tmp_path / "a.png"))


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("deep"), SystemError("x\ny"), SyntaxError("bad")])
def test_whatever_a_reader_raises_names_the_file(error, tmp_path, monkeypatch):
    noise(tmp_path / "a.png")
    monkeypatch.setattr(photo, "_rgb", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(Unreadable, match=r"a\.png cannot be read as an image") as caught:
        decode(str(tmp_path / "a.png"))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
@pytest.mark.parametrize("mode", ["P", "RGBA", "L", "RGB"])
def test_of_several_frames_the_first_is_read(kind, mode, tmp_path):
    frames = [Image.fromarray(np.full((8, 9, 3), shade, dtype=np.uint8)).convert(mode) for shade in (20, 200)]
    frames[0].save(tmp_path / "a.tif", kind, save_all=True, append_images=frames[1:])
    assert abs(int(np.asarray(decode(str(tmp_path / "a.tif"))).mean()) - 20) < 3


def tree(base: Path, name: str) -> DatasetConfig:
    for part, count in (("train", 6), ("val", 2)):
        for label in ("cat", "dog"):
            (base / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng([number, len(label)]).integers(0, 256, (20, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(base / part / label / f"{number}.png")
    size, mean = 16, ([0.5] * 3 if name == "imagenet" else None)
    return DatasetConfig(name=name, root=str(base), num_classes=2, image_size=size, mean=mean, std=mean, workers=0)


@pytest.mark.parametrize("name", ["folder", "imagenet"])
@pytest.mark.parametrize("what", ["a bomb", "a broken chunk", "cut", "a link that leads nowhere", "a pipe", "a device"])
def test_a_bad_photo_in_a_data_set(name, what, tmp_path):
    dataset = tree(tmp_path, name)
    bad = tmp_path / "train" / "cat" / "x.png"
    BAD[what][0](bad)
    begun = time.monotonic()
    with pytest.raises(UserError) as caught:
        list(build(dataset, TRAINING, seed=1).train)
    line = str(caught.value)
    assert line.startswith(f"{bad} ") and line.isprintable() and time.monotonic() - begun < 20


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_a_folder_that_is_called_like_a_photo_is_a_folder(name, tmp_path):
    dataset = tree(tmp_path, name)
    (tmp_path / "train" / "cat" / "0.png").rename(tmp_path / "train" / "cat" / "moved")
    (tmp_path / "train" / "cat" / "x.png").mkdir()
    (tmp_path / "train" / "cat" / "moved").rename(tmp_path / "train" / "cat" / "x.png" / "0.png")
    data = build(dataset, TRAINING, seed=1)
    assert data.train.count + data.validation.count == 12


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_a_part_without_class_folders_says_so(name, tmp_path):
    dataset = tree(tmp_path, name)
    for label in ("cat", "dog"):
        for file in (tmp_path / "val" / label).iterdir():
            file.rename(tmp_path / "val" / f"{label}{file.name}")
        (tmp_path / "val" / label).rmdir()
    with pytest.raises(UserError) as caught:
        build(dataset, TRAINING, seed=1)
    assert str(caught.value) == (
        f"{tmp_path}/val holds 4 photos and no class folders: put its photos into a folder a class, as in train/ "
        "(val/cat/... for those of train/cat/)"
    )
    (tmp_path / "train" / "dog").rename(tmp_path / "dog")
    for file in (tmp_path / "train" / "cat").iterdir():
        file.rename(tmp_path / "train" / file.name)
    (tmp_path / "train" / "cat").rmdir()
    with pytest.raises(UserError, match="train holds 6 photos and no class folders"):
        build(dataset, TRAINING, seed=1)


# photos that a camera has turned


def turned(path: Path, orientation: object, kind: str = "PNG") -> None:
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(NOISE).save(path, kind, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_is_upright_where_that_is_asked_for(kind, orientation, tmp_path):
    path = tmp_path / "a.jpg"
    turned(path, orientation, kind)
    with Image.open(path) as theirs:
        upright = np.asarray(ImageOps.exif_transpose(theirs).convert("RGB"))
    assert np.array_equal(np.asarray(decode(str(path), upright=True)), upright)
    assert upright.shape == ((20, 30, 3) if orientation < 5 else (30, 20, 3))
    with Image.open(path) as theirs:
        stored = np.asarray(theirs.convert("RGB"))
    assert np.array_equal(np.asarray(decode(str(path))), stored)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_each_orientation_means(orientation, tmp_path):
    """By the standard: where row 0 and column 0 of what is stored lie in the scene."""
    scene = {
        1: NOISE, 2: NOISE[:, ::-1], 3: NOISE[::-1, ::-1], 4: NOISE[::-1], 5: NOISE.swapaxes(0, 1),
        6: np.rot90(NOISE, -1), 7: NOISE[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(NOISE),
    }  # fmt: skip
    turned(tmp_path / "a.png", orientation)
    assert np.array_equal(np.asarray(decode(str(tmp_path / "a.png"), upright=True)), scene[orientation])


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_is_none_turns_nothing(orientation, tmp_path):
    turned(tmp_path / "a.png", orientation)
    assert np.array_equal(np.asarray(decode(str(tmp_path / "a.png"), upright=True)), NOISE)


RUBBISH = [b"", b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 200,
           b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x07\0\0\0\x04abcd\0\0\0\0"]  # fmt: skip


@pytest.mark.parametrize("exif", RUBBISH)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_that_is_none_turns_nothing(kind, exif, tmp_path):
    noise(tmp_path / "a.png")
    Image.fromarray(NOISE).save(tmp_path / "a.jpg", kind, exif=exif)
    assert decode(str(tmp_path / "a.jpg"), upright=True).size == (30, 20)


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_a_data_set_of_turned_photos(name, tmp_path):
    """A test photo whose dark half is the left one as it is stored, and the upper one in the scene."""
    dataset = tree(tmp_path, name)
    pixels = np.full((32, 32, 3), 255, dtype=np.uint8)
    pixels[:, :16] = 0
    exif = Image.Exif()
    exif[274] = 6  # the scene's top is the stored left
    Image.fromarray(pixels).save(tmp_path / "val" / "cat" / "0.png", exif=exif)
    halves = {}
    for upright in (False, True):
        data = build(dataclasses.replace(dataset, exif_orientation=upright), TRAINING, seed=1)
        image = next(iter(data.test))[0][0]
        halves[upright] = [bool(half.mean() < image.mean() - 0.1) for half in (image[:, :8], image[:, :, :8])]
    assert halves == {False: [False, True], True: [True, False]}
