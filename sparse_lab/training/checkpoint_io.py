"""Checkpoints on disk: written whole, read without ever unpickling anything but tensors and plain values."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_lab.coding.packed_state import packed, unpacked
from sparse_lab.errors import UserError
from sparse_lab.host.full_disk import naming
from sparse_lab.host.regular_file import TENSORS, check_tensors
from sparse_lab.records.atomic_io import append_checksum, atomic_write, temporary_of, verify_checksum
from sparse_lab.sparsity.masks import Masks
from sparse_lab.sparsity.state import load_state

FORMAT = "sparse_lab network 1"
FIT = ": ask for the network that it is of, its width, classes and image size"


def save_checkpoint(payload: dict[str, Any], path: Path) -> None:
    """torch.save with a seal: a reader sees the old file or the new one, and can tell whether it is damaged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as file:  # to a path torch writes itself, and a full disk has no errno then
            torch.save(payload, file)
        append_checksum(temporary)


@contextmanager
def replacing(last: Path, previous: Path, *, writes: bool) -> Iterator[Path]:
    """A file for Lightning to save to, which then takes the place of `last`, and `last` that of `previous`.

    writes: is this the process that writes? The others pass through.
    """
    temporary = temporary_of(last)
    try:
        with naming(last):
            yield temporary
            if writes:
                append_checksum(temporary)
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                if last.exists():
                    os.replace(last, previous)
                os.replace(temporary, last)
    finally:
        if writes:
            temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint as a dict, with weights_only, its sparse tensors as they were. Raises UserError when it is missing,
    corrupt or foreign.
    """
    path = Path(path)
    try:
        check_tensors(path, TENSORS)
        if verify_checksum(path) is False:
            raise UserError(f"{path} is damaged (its content is not what was saved): remove it or name another")
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, and no run's: name a file, or the folder of a finished run") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is corrupt or holds more than tensors and plain values; it was not unpickled: remove it "
            "or name another"
        ) from None
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} is not a readable checkpoint ({error.strerror}): name another") from None
    except Exception as error:  # a file that is none makes torch raise anything, from IndexError to MemoryError
        raise UserError(
            f"{path} is not a readable checkpoint ({type(error).__name__}): remove it or name another"
        ) from None
    if not isinstance(payload, dict):
        raise UserError(f"{path} is not a sparse_lab checkpoint (it holds a {type(payload).__name__})")
    return unpacked(payload, path)


def save_network(model: torch.nn.Module, path: Path, about: dict[str, Any]) -> None:
    """The network alone: weights, buffers and masks, with plain facts about it. What is masked takes no room."""
    state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    save_checkpoint(packed({"format": FORMAT, "about": about, "network": state}), path)


def load_network(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict that `save_network` wrote. Raises UserError for anything else."""
    payload = load_checkpoint(path)
    if payload.get("format") != FORMAT or not isinstance(payload.get("network"), dict):
        raise UserError(f"{path} is not a network that sparse_lab saved (no {FORMAT!r} mark)")
    return payload["network"]


def load_into(model: torch.nn.Module, state: dict[str, torch.Tensor], path: str | Path) -> None:
    """Load `state` into `model`; masks that the state lacks stay as they are. Raises UserError when it does not fit."""
    try:
        missing, unexpected = load_state(model, state, strict=False)
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit this network: {str(error).splitlines()[1].strip().rstrip('.')}{FIT}"
        ) from None
    wrong = [name for name in missing if not name.endswith("mask")] + list(unexpected)
    if wrong:
        raise UserError(f"{path} does not fit this network: {len(wrong)} tensors differ, {wrong[0]} first{FIT}")


def load_start(model: torch.nn.Module, state: dict[str, torch.Tensor], path: str | Path) -> None:
    """As `load_into` a new network, which gets masks where the state has them."""
    if any(key.endswith("mask") for key in state):
        Masks(model)
    load_into(model, state, path)


def random_state() -> dict[str, Any]:
    """The state of python's, numpy's and torch's generators, as plain values and tensors.

    Hundreds of numbers one by one would take most of the time that a small checkpoint takes.
    """
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
        "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """What `random_state` gave; numbers may also stand in lists, as in older checkpoints."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(torch.as_tensor(internal).tolist()), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
