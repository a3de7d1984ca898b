"""`sparse-lab doctor`: what machine, versions, devices and data are here, and what is missing."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
from pathlib import Path

from omegaconf import OmegaConf

from sparse_lab.config import DatasetConfig, UserError, conf_dir


def main(argv: list[str]) -> int:
    """Print one line a finding. Exit status 1 when something that every run needs is missing."""
    parser = argparse.ArgumentParser(
        prog="sparse-lab doctor", description="What is here: machine, versions, devices, data, room to write."
    )
    parser.add_argument("--data", default="data", metavar="DIR", help="data root to look in (as paths.data)")
    parser.add_argument(
        "--outputs", default="outputs", metavar="DIR", help="folder that runs would land in (as paths.outputs)"
    )
    args = parser.parse_args(argv)
    findings = [*machine(), *versions(), *data_sets(Path(args.data)), *room(Path(args.outputs))]
    for good, line in findings:
        print(f"{'ok ' if good else ' - '} {line}")
    return 0 if all(good for good, line in findings if line.startswith("needed")) else 1


def machine() -> list[tuple[bool, str]]:
    """Processor, memory, GPUs."""
    import torch

    from sparse_lab.outcome import device_name

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = [
        (
            True,
            f"machine: {device_name(torch.device('cpu'))}, {os.cpu_count()} processors, {memory:.0f} GiB",
        )
    ]
    for index in range(torch.cuda.device_count()):
        found.append((True, f"GPU {index}: {torch.cuda.get_device_name(index)}"))
    if not torch.cuda.is_available():
        found.append((False, "no GPU: trainer=cpu is what trainer=auto will take"))
    return found


def versions() -> list[tuple[bool, str]]:
    """What is installed; a missing extra is said, with the way to it."""
    from sparse_lab.outcome import PACKAGES, version

    found = [(True, f"python {platform.python_version()}")]
    for name in PACKAGES:
        found.append(
            (version(name) is not None, f"needed: {name} {version(name) or 'is missing: install sparse_lab again'}")
        )
    for name, way in (
        ("wandb", "logger=wandb"),
        ("tensorboard", "logger=tensorboard: pip install 'sparse_lab[tensorboard]'"),
    ):
        found.append((version(name) is not None, f"for {way}: {name} {version(name) or 'is missing'}"))
    return found


def data_sets(root: Path) -> list[tuple[bool, str]]:
    """Each data set of conf/dataset: there, or why not."""
    from sparse_lab import data

    found = []
    for path in sorted((conf_dir() / "dataset").glob("*.yaml")):
        values = OmegaConf.load(path)
        values.root = str(root)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DatasetConfig), values))
        assert isinstance(config, DatasetConfig)
        try:
            data.check(config)
            found.append((True, f"dataset={path.stem}"))
        except UserError as error:
            found.append((False, f"dataset={path.stem}: {error}"))
    return found


def room(outputs: Path) -> list[tuple[bool, str]]:
    """Can runs be written, and how much fits?"""
    from sparse_lab.check import check_outputs

    try:
        check_outputs(outputs)
    except UserError as error:
        return [(False, f"needed: {error}")]
    return [(True, f"needed: {outputs} can be written, {shutil.disk_usage(outputs).free / 2**30:.0f} GiB free")]
