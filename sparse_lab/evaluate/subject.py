"""The network that is evaluated: a run's, one of its checkpoints', or that of a file that `sparse-lab export` wrote."""

from __future__ import annotations

import ast
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_lab.config import Config
from sparse_lab.errors import UserError
from sparse_lab.evaluate.own_run import Own, built, own_of
from sparse_lab.export import load_run, onnx, packed, state_dict
from sparse_lab.host.regular_file import GIB, MIB, check
from sparse_lab.records.record import BadRecord, is_number, read_result
from sparse_lab.records.run_dir import RunDir
from sparse_lab.trace.trace import TracedNetwork
from sparse_lab.training.device import device_of

MOST_BYTES = 64 * GIB  # of a network's file
LONGEST = MIB  # characters of what an ONNX file says of its network
KINDS = ".sparse, .onnx, .pt or .ckpt"
FACTS = ("normalise", "image_size", "channels", "num_classes", "classes", "kept", "total", "sparsity", "test_accuracy")


@dataclass(frozen=True)
class Subject:
    """path: its file. folder: what lies beside it. answer: computes logits [N, classes] of normalised images on
    `device`, by `arithmetic`. shape: (channels, height, width) of an image. names: of the classes by label, where they
    are known. about: plain facts. own: the data of its run, where that is at hand.
    """

    path: Path
    folder: Path
    name: str
    answer: Callable[[Tensor], Tensor]
    device: torch.device
    arithmetic: str
    shape: tuple[int, int, int]
    classes: int
    names: tuple[str, ...]
    mean: list[float]
    std: list[float]
    scale: int | None
    about: dict[str, Any]
    own: Own | None = None

    def digest(self) -> str:
        """SHA-256 of its file."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def opened(path: Path) -> Subject:
    """Return the network of a run's folder or of a file. Raise UserError for what is neither, or cannot be read."""
    if path.is_dir():
        return _of_run(path)
    try:
        check(path, MOST_BYTES)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if path.suffix not in READERS:
        raise UserError(f"{path} is no run's folder and no network: a file ends in {KINDS}")
    return READERS[path.suffix](path)


def _of_run(run: Path) -> Subject:
    folder = RunDir(run, {})
    if not (run / "result.json").exists() and folder.last.is_file():
        raise UserError(f"{run} is not finished: its last checkpoint can be evaluated, {folder.last}")
    found = load_run.finished(run)
    about = {**found.about(), "normalise": found.normalise, "num_classes": found.build["num_classes"]}
    facts = _facts({**about, "image_size": found.shape[1:], "channels": found.shape[0]}, run / "result.json")
    path = folder.small if folder.small.is_file() else folder.best
    return _torch(path, run, found.model, facts, own_of(run, found.result))


def _of_checkpoint(path: Path) -> Subject:
    """best.ckpt and small.ckpt are the run's network; the others hold it as it was when they were saved."""
    run = path.resolve().parent.parent
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"{path} lies in no run's folder, which alone says what network it is of: give it there, or a file that "
            "sparse-lab export wrote"
        )
    if path.name in ("best.ckpt", "small.ckpt"):
        return _of_run(run)
    try:
        result = read_result(run / "result.json")
    except (FileNotFoundError, BadRecord):
        result = {}
    own = own_of(run, result)
    if own is None:
        raise UserError(f"{run / 'config.yaml'} cannot be read: it alone says what network {path} is of")
    model, normalise = built(path, run, own, result)
    config = own.config
    facts = _facts({"normalise": normalise, **_sizes(config), "classes": own.class_names()}, run / "config.yaml")
    return _torch(path, run, model, facts | {"name": run.name}, own)


def _sizes(config: Config) -> dict[str, Any]:
    dataset = config.dataset
    return {"image_size": dataset.size, "channels": dataset.shape[0], "num_classes": dataset.classes}


def _of_packed(path: Path) -> Subject:
    network = packed.load(path)
    return _of_file(path, network, network.about, "sparse kernels")


def _of_onnx(path: Path) -> Subject:
    run, said = onnx.opened(path)
    return _of_file(path, run, {key: _plain(value) for key, value in said.items()}, "onnxruntime")


def _plain(text: str) -> Any:
    """What Python has written so; the text itself where it is none of that."""
    try:
        return ast.literal_eval(text) if len(text) <= LONGEST else text
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _of_torch(path: Path) -> Subject:
    model, about = state_dict.opened(path)
    return _torch(path, path.parent, model, _facts(about, path), _neighbour(path, about))


READERS: dict[str, Callable[[Path], Subject]] = {
    ".ckpt": _of_checkpoint,
    ".sparse": _of_packed,
    ".onnx": _of_onnx,
    ".pt": _of_torch,
}


def _of_file(path: Path, answer: Callable[[Tensor], Tensor], about: dict[str, Any], arithmetic: str) -> Subject:
    facts, own = _facts(about, path), _neighbour(path, about)
    return _subject(path, path.parent, answer, torch.device("cpu"), arithmetic, facts, own)


def _torch(path: Path, folder: Path, model: nn.Module, facts: dict[str, Any], own: Own | None) -> Subject:
    device = torch.device("cpu") if isinstance(model, TracedNetwork) else device_of("auto")
    model = model.to(device).float().eval()
    return _subject(path, folder, torch.no_grad()(model), device, "torch", facts, own)


def _subject(
    path: Path,
    folder: Path,
    answer: Callable[[Tensor], Tensor],
    device: torch.device,
    arithmetic: str,
    facts: dict[str, Any],
    own: Own | None,
) -> Subject:
    height, width = facts["image_size"]
    names = facts["classes"] or (own.class_names() if own is not None else ())
    return Subject(
        path, folder, str(facts.get("name") or path.name), answer, device, arithmetic,
        (facts["channels"], height, width), facts["num_classes"],
        tuple(names) if len(names) == facts["num_classes"] else (),
        facts["normalise"]["mean"], facts["normalise"]["std"], facts["normalise"].get("scale"),
        {key: facts.get(key) for key in ("name", "sparsity", "kept", "total", "test_accuracy")}, own,
    )  # fmt: skip


def _neighbour(path: Path, about: dict[str, Any]) -> Own | None:
    """The run in whose folder an exported file lies, where it is that run's."""
    try:
        result = read_result(path.parent / "result.json")
    except (FileNotFoundError, BadRecord):
        return None
    return own_of(path.parent, result) if result["name"] == about.get("name") else None


def _facts(about: dict[str, Any], path: Path) -> dict[str, Any]:
    """What is said of a network and its images, sizes as [height, width]. Raise UserError where it cannot be so."""
    found = {key: about.get(key) for key in FACTS} | {"name": about.get("name")}
    size, channels, classes = found["image_size"], found["channels"] or 3, found["num_classes"]
    size = [size, size] if _whole(size) else list(size) if isinstance(size, (list, tuple)) else []
    names, normalise = found["classes"] or (), found["normalise"]
    found |= {"image_size": size, "channels": channels, "classes": names}
    sound = (
        len(size) == 2
        and all(_whole(one) for one in (*size, channels, classes))
        and isinstance(names, (list, tuple))
        and all(isinstance(one, str) for one in names)
        and isinstance(normalise, dict)
        and all(_numbers(normalise.get(key), channels) for key in ("mean", "std"))
        and min(normalise["std"]) > 0
        and normalise.get("scale") in (None, 1, 255)
    )
    if not sound:
        raise UserError(f"{path} does not say what images its network takes: export it again, or give its run")
    return found


def _whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 < number < 2**20


def _numbers(values: object, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(is_number(one) and math.isfinite(one) for one in values)
    )
