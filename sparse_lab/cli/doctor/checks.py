"""`sparse-lab doctor`: what machine, versions, devices, data and extras are here; and, given a command, what of that is
missing for it. Nothing is trained, fetched or left behind.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from sparse_lab.config import CHOICES, DatasetConfig, conf_dir
from sparse_lab.errors import SparseLabError
from sparse_lab.host.machine import available_memory, processor, size, usable_cores, version

GIB = 2**30
EXTRAS = {  # distribution -> what it is for, and how to get it
    "wandb": ("logger=wandb", "pip install wandb"),
    "tensorboard": ("logger=tensorboard", "pip install 'sparse_lab[tensorboard]'"),
    "mlflow": ("logger=mlflow", "pip install 'sparse_lab[mlflow]'"),
    "trackio": ("logger=trackio", "pip install 'sparse_lab[trackio]'"),
    "joblib": ("hydra/launcher=joblib", "pip install 'sparse_lab[joblib]'"),
    "ray": ("hydra/launcher=ray", "pip install 'sparse_lab[ray]'"),
    "submitit": ("hydra/launcher=submitit_slurm", "pip install 'sparse_lab[slurm]'"),
    "hydra-optuna-sweeper": ("hydra/sweeper=optuna", "pip install 'sparse_lab[optuna]'"),
    "onnx": ("export to ONNX", "pip install 'sparse_lab[onnx]'"),
}
LOOKING = 10.0  # seconds that nvidia-smi gets


@dataclass(frozen=True)
class Finding:
    """One line. `needed`: nothing (or, under a command, not that command) can start without it."""

    good: bool
    line: str
    needed: bool = False


def machine() -> Iterator[Finding]:
    """Processor and memory."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    free = available_memory() / GIB
    said = f"{processor()}, {total:.0f} GiB memory, {free:.0f} GiB of it free here"
    yield Finding(True, f"machine: {said}; {platform.platform()}")


def threads() -> Iterator[Finding]:
    import torch

    usable = usable_cores()
    asked = f", OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}" if "OMP_NUM_THREADS" in os.environ else ""
    computing = torch.get_num_threads()
    line = f"processors: {os.cpu_count()}, usable here {usable}; torch computes with {computing} threads{asked}"
    yield Finding(computing <= usable, line if computing <= usable else f"{line}: more than there are processors")


def gpus() -> Iterator[Finding]:
    """Every GPU with its memory and driver; without one, why."""
    import torch

    driver = _nvidia("driver_version")
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        used = _nvidia("memory.used")
        taken = (
            f", {int(used[index]) / 1024:.0f} GiB of it in use" if index < len(used) and used[index].isdigit() else ""
        )
        driven = f", driver {driver[0]}" if driver else ""
        kind = f"compute capability {about.major}.{about.minor}"
        yield Finding(True, f"GPU {index}: {about.name}, {about.total_memory / GIB:.0f} GiB{taken}, {kind}{driven}")
    if torch.cuda.is_available():
        return
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    if driver:
        yield Finding(
            False, f"a GPU is here (driver {driver[0]}), but torch {torch.__version__}, {built}, cannot use it"
        )
    else:
        yield Finding(False, f"no GPU: trainer=auto takes the CPU (torch is {built})")


def _nvidia(field: str) -> list[str]:
    """One value a GPU from nvidia-smi; none where it is not there or does not answer."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=LOOKING, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in said.splitlines() if line.strip()]


def versions() -> Iterator[Finding]:
    """What every run needs."""
    from sparse_lab.records.system import PACKAGES

    found = {name: version(name) for name in PACKAGES}
    there = [f"{name} {number}" for name, number in found.items() if number is not None]
    yield Finding(True, f"versions: python {platform.python_version()}, {', '.join(there)}")
    for name in (name for name, number in found.items() if number is None):
        yield Finding(False, f"{name} is missing: install sparse_lab again", needed=True)


def sparse_arithmetic(needed: bool = False) -> Iterator[Finding]:
    """Can kernels be compiled here, and with how many threads do they run?"""
    try:
        import numba
    except Exception as error:  # one that does not fit the numpy that is here fails in ways of its own
        reason = " ".join(str(error).split())[:200]
        yield Finding(False, f"compute=sparse: numba does not start ({reason}): install sparse_lab again", needed)
        return
    yield Finding(True, f"compute=sparse: numba {numba.__version__} with {numba.get_num_threads()} threads")


def extras() -> Iterator[Finding]:
    for name, (use, way) in EXTRAS.items():
        number = version(name)
        yield Finding(number is not None, f"{use}: {f'{name} {number}' if number is not None else way}")


def plugins() -> Iterator[Finding]:
    """What is loaded of --plugin and of installed packages."""
    from sparse_lab.experiment.plugins import LOADED

    for plugin in LOADED.values():
        brought = f", of the installed package {plugin.distribution}" if plugin.distribution else ""
        registered = "; ".join(f"{one.kind} {one.name}" for one in plugin.registered)
        yield Finding(True, f"plugin {plugin.name} ({plugin.hash[:10]}, {plugin.place}{brought}): {registered}")


def data_sets(root: Path) -> Iterator[Finding]:
    """Each data set of conf/dataset: there, or why not."""
    from sparse_lab import data

    for path in sorted(path for folder in (conf_dir(), *CHOICES) for path in (folder / "dataset").glob("*.yaml")):
        values = OmegaConf.load(path)
        values.root = str(root)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DatasetConfig), values))
        assert isinstance(config, DatasetConfig)
        try:
            data.check(config)
            yield Finding(True, f"dataset={path.stem}")
        except (SparseLabError, OSError) as error:
            yield Finding(False, f"dataset={path.stem}: {error}")


def room(outputs: Path, wanted: int = 0) -> Iterator[Finding]:
    """Can runs be written below `outputs`, and do `wanted` bytes fit?"""
    from sparse_lab.experiment.validate import check_outputs

    try:
        there = check_outputs(outputs)
    except SparseLabError as error:
        yield Finding(False, str(error), needed=True)
        return
    free = shutil.disk_usage(there).free
    line = f"{outputs} can be written, {size(free)} free"
    if wanted:
        line += f", about {size(wanted)} wanted for checkpoints"
    good = wanted <= free
    yield Finding(good, line if good else f"{line}: make room there or set paths.outputs=DIR", needed=not good)
