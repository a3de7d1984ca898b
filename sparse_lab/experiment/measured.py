"""What was measured of the two arithmetics on this machine, so that compute=auto picks the same one again. No torch.

One small file among the outputs. What is damaged or gone is measured anew; a run that has begun goes on with what it
began with whatever this says (`identity.settled`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparse_lab.config import Config
from sparse_lab.experiment import plugins
from sparse_lab.host.full_disk import unwritable
from sparse_lab.host.machine import instructions, processor, version
from sparse_lab.methods import phases
from sparse_lab.records.atomic_io import write_record
from sparse_lab.records.lock import Lock, remove_left_behind
from sparse_lab.records.record import BadRecord, read_record

FILE = "measured.json"


@dataclass(frozen=True)
class Measured:
    """Seconds of a training step; why: what hindered the measurement, and then dense is taken."""

    dense: float = 0.0
    sparse: float = 0.0
    why: str | None = None

    @property
    def compute(self) -> str:
        return "sparse" if self.why is None and self.sparse < self.dense else "dense"

    def line(self, network: str) -> str:
        """Return what is said of the choice."""
        if self.why is not None:
            return f"{network} could not be measured ({self.why})"
        ours, other = (self.sparse, self.dense) if self.compute == "sparse" else (self.dense, self.sparse)
        against = "dense" if self.compute == "sparse" else "sparse"
        return f"measured {1e3 * ours:.3g} ms a step against {1e3 * other:.3g} ms {against} for {network}"


def known(config: Config) -> Measured | None:
    """Return what was measured of the network and batch size of `config`; None where nothing was."""
    found = _read(config).get(_key(config))
    try:
        return None if found is None else Measured(**found)
    except TypeError:
        return None


def once(config: Config, measure: Callable[[Config], Measured]) -> Measured:
    """Measure, unless that was done; one process at a time, for two would slow each other down."""
    with _alone(config):
        found = known(config)
        if found is None:
            found = measure(config)
            write_record(_path(config), {**_read(config), _key(config): asdict(found)})
    return found


def _path(config: Config) -> Path:
    return Path(config.paths.outputs).resolve() / FILE


@contextmanager
def _alone(config: Config) -> Iterator[None]:
    path = _path(config)
    try:
        lock = Lock(path.parent, wait=lambda holder: None, name=f".{FILE}.lock")
    except OSError as error:
        raise unwritable(path.parent, error) from None
    with lock:
        remove_left_behind(path.parent)
        yield


def _read(config: Config) -> dict[str, Any]:
    try:
        found = read_record(_path(config), sealed=False)
    except (FileNotFoundError, BadRecord):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, dict)}


def _key(config: Config) -> str:
    """Everything that a step's time depends on."""
    parts = sorted(name for name, part in vars(config.method).items() if part is not None)
    about = {
        "network": asdict(config.model),
        "classes": config.dataset.classes,
        "image": config.dataset.shape,
        "batch": config.training.batch_size,
        "sparsity": f"{phases.final_sparsity(config):.6g}",
        "layers": [config.sparsity.include, config.sparsity.exclude],
        "precision": config.trainer.precision,
        "parts": parts,
        "plugins": plugins.hashes(),
        "threads": os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)),
        "machine": [processor(), sorted(instructions())],
        "versions": [version(package) for package in ("sparse_lab", "torch", "numba")],
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]
