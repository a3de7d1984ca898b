"""Photos from files: whatever their pixels are made of they come out as 8-bit RGB on its whole scale, or are refused by
name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sparse_lab.data.photo_files import shown
from sparse_lab.data.source import no_variance
from sparse_lab.errors import UserError
from sparse_lab.host.regular_file import GIB, opened

# Pillow's own way is right
WHOLE = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"})
DEEP = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
DEEP_IN_32 = frozenset({"PNG", "PPM"})  # some versions of Pillow give their 16 bits as mode I
BITS, INTERPRETATION, SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
SIGNED = 2  # of a TIFF's sample formats
ORIENTATION = 274  # EXIF's, and TIFF's
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PIXELS = 178_956_970  # of a photo, above which Pillow takes it for a decompression bomb
LARGEST = GIB  # bytes of a photo's file
HEADERS, DECODED = 2000, 200  # photos looked at before training, spread evenly over the classes; one of each at least
THUMB = 64  # pixels


class Unreadable(UserError):
    """A file that is cut, empty or no image at all."""


def decode(path: str, channels: int = 3, upright: bool = False) -> Image.Image:
    """The photo as RGB, or as grey for one channel: the first frame, without its transparency, turned as it is stored
    (as torchvision reads it) or, if `upright`, as its EXIF orientation says.

    Grey of 16 bits is divided by 257. Raises UserError, one line with the file's name, for what no range is known of
    (floats, integers of 32 bits), for colours that need a profile (LAB), for a picture that lies in its transparency
    alone, and Unreadable for what cannot be read.
    """

    def use(photo: Image.Image) -> Image.Image:
        image = _rgb(photo, path)  # Pillow has turned a TIFF itself when its pixels are read, and says so then
        turn = TURNS.get(_orientation(photo)) if upright else None
        image = image if turn is None else image.transpose(turn)
        return image if channels == 3 else image.convert("L")

    return _read(path, use)


def fitted(path: str, channels: int, size: tuple[int, int], upright: bool = False) -> np.ndarray:
    """The photo as uint8 [channels, *size]: scaled so that it just covers the size, and its middle cut out; nothing is
    distorted, and one of that size stays as it is. Raises UserError as `decode`.
    """
    image = ImageOps.fit(decode(path, channels, upright), (size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def check(train: Sequence[Sequence[str]], test: Sequence[Sequence[str]]) -> None:
    """Look at a sample of the photos of each class. Raises UserError for what `decode` would refuse by its kind, and
    where all training photos that are looked at are of one colour, or the same.
    """
    for path in _sample([*train, *test], HEADERS):
        _read(path, lambda photo, path=path: _check_mode(photo, path))  # type: ignore[misc]
    paths = _sample(train, DECODED)
    plain = same = True
    first: np.ndarray | None = None
    for path in paths:
        pixels = _read(path, lambda photo, path=path: np.asarray(_thumb(photo, path)))  # type: ignore[misc]
        first = pixels if first is None else first
        plain = plain and bool((pixels == pixels[0, 0]).all())
        same = same and np.array_equal(pixels, first)
        if not plain and not same:
            return
    if plain or len(paths) > 1:
        raise UserError(no_variance(f"{shown(paths[0])} and all others looked at", len(paths), plain))


def by_class(photos: Iterable[tuple[str, int]]) -> list[list[str]]:
    """Paths and labels as the paths of each class, for `check`."""
    found: dict[int, list[str]] = defaultdict(list)
    for path, label in photos:
        found[label].append(path)
    return list(found.values())


def _sample(classes: Iterable[Sequence[str]], most: int) -> list[str]:
    """Of each class equally many, spread over its list: `most` in all, but at least one of each."""
    found = [paths for paths in classes if paths]
    each = max(1, most // max(1, len(found)))
    return [path for paths in found for path in paths[:: -(-len(paths) // each)]]


def _read(path: str, use: Any) -> Any:
    try:
        with opened(path, LARGEST) as file, Image.open(file) as photo:
            width, height = photo.size
            if width * height > PIXELS:
                raise Image.DecompressionBombError(f"{width:,} x {height:,} pixels")
            return use(photo)
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise Unreadable(
            f"{shown(path)} cannot be read as an image (it says of itself that it is larger than {PIXELS:,} pixels, "
            "which would fill the memory): scale it down or delete it"
        ) from error
    except Exception as error:  # each of Pillow's readers has errors of its own
        raise Unreadable(
            f"{shown(path)} cannot be read as an image ({_reason(error)}): replace or delete it"
        ) from error


def _reason(error: Exception) -> str:
    """Why, in a few words, and without the file's name, which is said."""
    if isinstance(error, UnidentifiedImageError):
        return "no kind of image that is known"
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shown(" ".join(said.split())[:100]) or type(error).__name__


def _orientation(photo: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none, or none that can be read."""
    try:
        found = photo.getexif().get(ORIENTATION, 1)
    except Exception:  # a camera's or an editor's own idea of EXIF
        return 1
    return found if isinstance(found, int) else 1


def _thumb(photo: Image.Image, path: str) -> Image.Image:
    photo.draft("RGB", (THUMB, THUMB))  # a JPEG is decoded at a fraction of its size
    return _rgb(photo, path)


def _check_mode(photo: Image.Image, path: str) -> None:
    signed = SIGNED in getattr(photo, "tag_v2", {}).get(SAMPLE_FORMAT, ())  # of 8 bits Pillow takes -1 for 255
    if not signed and (photo.mode in WHOLE | DEEP or (photo.mode == "I" and photo.format in DEEP_IN_32)):
        return
    why = {
        "F": "its values are floats, and no range of them is known",
        "I": "its values are integers of up to 32 bits, and no range of them is known",
    }.get(
        photo.mode,
        "its values are signed, and no range of them is known" if signed else "Pillow cannot turn it into RGB",
    )
    raise UserError(
        f"{shown(path)} is a {photo.format} of mode {photo.mode}: {why}; save it with 8 bits a channel, or as grey of "
        "16 bits"
    )


def _rgb(photo: Image.Image, path: str) -> Image.Image:
    _check_mode(photo, path)
    if photo.mode in DEEP or photo.mode == "I":
        return Image.fromarray(_shallow(photo)).convert("RGB")
    if photo.mode not in ("RGBA", "LA", "PA") and "transparency" not in photo.info:
        return photo.convert("RGB")
    whole = photo.convert("RGBA")
    pixels = np.asarray(whole)
    if bool((pixels[..., :3] == pixels[0, 0, :3]).all()) and bool((pixels[..., 3] != pixels[0, 0, 3]).any()):
        raise UserError(
            f"{shown(path)} is of one colour, its picture lies in its transparency alone: save it without any"
        )
    return whole.convert("RGB")


def _shallow(photo: Image.Image) -> np.ndarray:
    """Grey of more than 8 bits as uint8, rounded."""
    tags = getattr(photo, "tag_v2", {})  # a TIFF's
    top = 2 ** tags.get(BITS, (16,))[0] - 1
    grey = (np.asarray(photo).astype(np.int64) * 255 + top // 2) // top
    # Pillow turns 8 bits where white is 0, and does not turn 16
    return (255 - grey if tags.get(INTERPRETATION) == 0 else grey).astype(np.uint8)
