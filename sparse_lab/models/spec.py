"""What makes one network another than the next: all that is asked for when it is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

IMAGENET_FROM = 64  # pixels; smaller images get the CIFAR variant
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}  # what an option takes, in words


@dataclass(frozen=True)
class Spec:
    """name: one of `names()`. width: factor on every channel count. image_size: (height, width) in pixels. channels: of
    an image. arch: which of a library's networks. adapt_stem: a 3x3 convolution of stride 1 in place of ImageNet's
    stem. options: of the network itself, sorted by name.
    """

    name: str
    num_classes: int = 10
    width: float = 1.0
    image_size: tuple[int, int] = (32, 32)
    channels: int = 3
    arch: str | None = None
    adapt_stem: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        return self.channels, *self.image_size

    @property
    def imagenet(self) -> bool:
        """Does a network that has both get its ImageNet variant?"""
        return min(self.image_size) >= IMAGENET_FROM and not self.adapt_stem

    @property
    def title(self) -> str:
        """The network in words, as `ModelConfig.title`."""
        return self.name if self.arch is None else f"{self.name} {self.arch}"


def frozen(options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return options as a Spec holds them: sorted, and lists as tuples, so that it can be a key."""
    return tuple(sorted((name, _hashable(value)) for name, value in options.items()))


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(one) for one in value)
    return frozen(value) if isinstance(value, Mapping) else value
