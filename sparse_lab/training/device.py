"""Where a run computes, and how tensors lie there."""

from __future__ import annotations

import torch


def device_of(accelerator: str, rank: int = 0) -> torch.device:
    """The device of the process `rank` of a run: a GPU where `trainer.accelerator` asks for one, or is auto and finds
    one; else the CPU.
    """
    if accelerator != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", rank)
    return torch.device("cpu")


def layout_of(device: torch.device) -> torch.memory_format:
    """How images and convolution weights lie: channels last on a GPU, whose matrix units read them so.

    Never on a CPU: torch's channels-last BatchNorm there is 7 to 95 times less accurate in float32.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format
