"""What a network of somebody else's leaves in its run's folder beside its weights: its trace, so that it can be
exported where its code is not at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from sparse_lab import models
from sparse_lab.config import Config
from sparse_lab.errors import UserError
from sparse_lab.models.offsets import folded
from sparse_lab.models.weight_sharing import unshared
from sparse_lab.records.run_dir import RunDir
from sparse_lab.trace.plain import as_plain, from_plain
from sparse_lab.trace.trace import Trace
from sparse_lab.training.checkpoint_io import load_checkpoint, save_checkpoint

FORMAT = "sparse_lab trace 1"


def save_trace_of(
    config: Config, model: nn.Module, small: nn.Module | None, folder: RunDir, say: Callable[[str], None]
) -> None:
    """Write the trace of a run's finished network, or of the small one where filters went. A network of this project
    needs none, and one with a dense part beside its weights is no longer the plain network that its checkpoint holds.

    A network that has no trace is no failure: what will not work is said.
    """
    folder.to_write(folder.trace).unlink(missing_ok=True)
    if models.is_ours(config.model.name) or any(hasattr(module, "offset") for module in model.modules()):
        return
    from sparse_lab.trace.capture import captured  # it brings all of torch.export

    plain = unshared(folded(model)) if small is None else small
    try:
        trace = captured(plain.cpu().float(), config.dataset.shape)
    except UserError as error:
        say(f"WARNING: sparse-lab export can write this network with --to torch alone: {error}")
        return
    write_trace(trace, folder.to_write(folder.trace))


def write_trace(trace: Trace, path: Path) -> None:
    """Steps and constants, no weights."""
    save_checkpoint({"format": FORMAT, "trace": as_plain(trace), "constants": dict(trace.constants)}, path)


def read_trace(path: Path) -> Trace:
    """Raise UserError for a file that `write_trace` did not write."""
    payload = load_checkpoint(path)
    constants = payload.get("constants")
    if payload.get("format") != FORMAT or not isinstance(constants, dict):
        raise UserError(f"{path} is not a trace that sparse_lab saved (no {FORMAT!r} mark)")
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in constants.items()):
        raise UserError(f"{path} is not a trace that sparse_lab saved: its constants are none")
    try:
        return from_plain(payload.get("trace"), constants)
    except Exception as error:  # somebody else may have written it
        raise UserError(f"{path} is not a trace that sparse_lab saved ({' '.join(str(error).split())[:200]})") from None
