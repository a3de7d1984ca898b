"""Random numbers that depend only on what they are named after: never on the global generator, never disturbing it."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*words: int | str) -> int:
    """A seed of 63 bits from a purpose and numbers, for instance ("order", seed, epoch); the same on every machine."""
    text = "/".join(str(word) for word in words)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*words: int | str) -> torch.Generator:
    """A fresh CPU generator seeded with `seed_of(*words)`; draws are made on the CPU, so every device sees the same."""
    return torch.Generator().manual_seed(seed_of(*words))
