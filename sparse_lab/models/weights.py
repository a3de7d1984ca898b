"""Start weights from torchvision or from a local file: read without running anything in it, checked, then copied in."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_lab.coding.packed_state import unpacked
from sparse_lab.errors import UserError
from sparse_lab.host.regular_file import TENSORS, check_tensors
from sparse_lab.models.pruned_state import MasksLeft, has_offsets, is_plain, masks_of, plain_of
from sparse_lab.sparsity.state import load_state

LONGEST = 80  # characters of a name in a message
SHOWN = 3  # tensors that do not fit which are told


def load(network: nn.Module, name: str, weights: str, torchvision_name: str) -> None:
    """Copies weights into `network` in place.

    weights: "torchvision" (the ImageNet weights that torchvision calls the default for `torchvision_name`) or a file.
    name: the network's name, for messages. Of a pruned network's file the weights alone are taken, zero where it was
    pruned, and a MasksLeft says so. Where the source has another number of classes and all else fits, the classifier
    stays as it is and a UserWarning says so. Raises UserError, in one line, on anything else that does not fit.
    """
    if weights == "torchvision":
        source, state = f"torchvision's weights of {torchvision_name}", _download(torchvision_name)
    else:
        source, state = weights, _read(Path(weights).expanduser())
    wanted = network.state_dict()
    state, masks = plain_of(state, wanted)
    classifier = _classifier(network)
    classes = None if classifier is None else _other_number_of_classes(state, wanted, f"{classifier}.weight")
    if classes is not None:
        own = {key for key in wanted if key.startswith(f"{classifier}.")}
        state = {key: tensor for key, tensor in state.items() if key not in own}
        wanted = {key: tensor for key, tensor in wanted.items() if key not in own}
    if (fault := _differences(wanted, state)) is not None:
        raise UserError(f"{source} does not fit {name} as it was asked for: {fault}")
    load_state(network, state, strict=False)
    if masks:
        warnings.warn(
            f"{source} is of a pruned network: its weights are taken, and what was pruned starts at zero and is free "
            "to move (model.keep_masks=true trains under its masks)",
            MasksLeft,
            stacklevel=4,
        )
    if classes is not None:
        warnings.warn(
            f"{source} is for {classes} classes: all of {name} is loaded but the classifier {classifier!r}, "
            f"which starts from random weights",
            stacklevel=4,
        )


def kept_masks(weights: str) -> dict[str, torch.Tensor]:
    """Return the masks of the pruned network in a file, by layer. Raise UserError where it holds none."""
    state = _read(Path(weights).expanduser())
    masks = masks_of(state)
    if not masks:
        raise UserError(f"model.keep_masks=true: {weights} holds no masks: leave model.keep_masks out")
    if has_offsets(state):
        raise UserError(
            f"model.keep_masks=true: the network in {weights} has a dense part beside its weights, which its masks do "
            "not describe: leave model.keep_masks out"
        )
    return masks


def _download(torchvision_name: str) -> dict[str, Any]:
    try:
        from torchvision.models import get_model_weights
    except ImportError:
        raise UserError(
            "weights='torchvision' needs the package torchvision: install it, or give a local file"
        ) from None
    weights: Any = get_model_weights(torchvision_name)
    try:
        return weights.DEFAULT.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
    except Exception as error:  # urllib, ssl, http, zip and torch each have their own kinds; to the user they are one
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"torchvision's weights of {torchvision_name} could not be downloaded ({reason}): "
            f"give a local file as weights, or connect to the network and try again"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        check_tensors(path, TENSORS)
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, and no run's: name a file, or the folder of a finished run") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give 'torchvision', or a file of tensors") from None
    content = _read_safetensors(path) if path.suffix == ".safetensors" else unpacked(_read_torch(path), path)
    for inner in ("state_dict", "network"):
        if isinstance(content, dict) and isinstance(content.get(inner), dict):
            content = _own(content[inner]) if "pytorch-lightning_version" in content else content[inner]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} holds no state dict, at its top or under the key 'state_dict' or 'network'")
    return content


def _own(state: dict[Any, Any]) -> dict[Any, Any]:
    """A Lightning checkpoint's state dict by the names in the network that its module calls `model`, as ours does."""
    if not all(isinstance(key, str) and key.startswith("model.") for key in state):
        return state
    return {key.removeprefix("model."): value for key, value in state.items()}


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises anything from EOFError to KeyError
        raise UserError(
            f"{path} cannot be read as a state dict ({type(error).__name__}): it is damaged, closed to you, or holds "
            f"objects other than tensors, which are never unpickled; save network.state_dict() alone with torch.save"
        ) from error


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(
            f"{path} needs the package safetensors: install it, or save the state dict with torch.save as a .pt file"
        ) from None
    try:
        return load_file(path, device="cpu")
    except Exception as error:  # safetensors raises a class of its own, which older versions do not export
        raise UserError(f"{path} cannot be read as safetensors ({type(error).__name__})") from error


def _classifier(network: nn.Module) -> str | None:
    """The name of the layer that makes the logits: the last linear one; None where there is none."""
    return ([None] + [name for name, module in network.named_modules() if isinstance(module, nn.Linear)])[-1]


def _other_number_of_classes(state: Mapping[str, Any], wanted: Mapping[str, torch.Tensor], key: str) -> int | None:
    """The number of classes in `state` if its classifier differs from the wanted one in that alone, else None."""
    found = state.get(key)
    if not isinstance(found, torch.Tensor) or found.ndim != 2 or found.shape[1:] != wanted[key].shape[1:]:
        return None
    return None if found.shape[0] == wanted[key].shape[0] else found.shape[0]


def _differences(wanted: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> str | None:
    """The first keys in which `state` differs from what is wanted, in words, and what to do; None if it fits."""
    extra = [key for key in state if key not in wanted]
    found = [line for key, tensor in wanted.items() if (line := _difference(key, tensor, state, extra)) is not None]
    found += [f"{_short(key)} is not in the network" for key in extra]
    if not found:
        return None
    more = f"; and {len(found) - SHOWN:,} more" if len(found) > SHOWN else ""
    return f"{'; '.join(found[:SHOWN])}{more}: ask for the network that it is of, its width and its image size"


def _difference(key: str, tensor: torch.Tensor, state: Mapping[str, Any], extra: list[str]) -> str | None:
    if key not in state:
        # Files from before torch 0.4.1 have no such count, and with a set momentum BatchNorm does not read it.
        if key.endswith(".num_batches_tracked"):
            return None
        return f"{key!r} is missing" + (f" (it has {_short(extra[0])})" if extra else "")
    found = state[key]
    if not is_plain(found):
        return f"{key!r} is not a tensor" + (" of plain numbers" if isinstance(found, torch.Tensor) else "")
    if found.shape != tensor.shape:
        return f"{key!r} has shape {tuple(found.shape)}, not {tuple(tensor.shape)}"
    if found.is_floating_point() != tensor.is_floating_point():
        return f"{key!r} is of type {found.dtype}, not {tensor.dtype}"
    return None


def _short(key: str) -> str:
    """A name in somebody else's file, for a line."""
    return repr(key if len(key) <= LONGEST else f"{key[:LONGEST]}...")
