"""Forward passes of a finished network: torch, onnxruntime, and the sparse executor that an exported file runs on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_lab.bench.cells import DENSE, IMAGE_SIZE, INFERENCE, SPARSE, Cell, Entry, Facts, Settings, Unavailable
from sparse_lab.bench.patterns import SEED, Pattern, Patterns, build
from sparse_lab.bench.roofline import inference_work
from sparse_lab.bench.training import batch_of, compiled, try_out
from sparse_lab.errors import SparseLabError
from sparse_lab.export import onnx
from sparse_lab.export.dead_channels import reduced
from sparse_lab.export.lowering import traced
from sparse_lab.export.runtime import SparseNetwork
from sparse_lab.sparse_cpu.engine import SparseArithmetic
from sparse_lab.sparsity.connectivity import connectivity
from sparse_lab.sparsity.masks import Masks

SETTLING = 32  # images
SHIFT = 0.2  # largest shift of a BatchNorm


def batches(settings: Settings) -> tuple[int, ...]:
    return tuple(dict.fromkeys((settings.batch, 1)))


def entries(model: str, settings: Settings, patterns: Patterns) -> Iterator[Entry]:
    """Dense and sparse inference of one network, many images and one; what says most comes first."""
    dense = settled(build(model, settings.width), None).eval()
    finished = Finished(model, settings.width, patterns)
    sizes = batches(settings)
    yield from (dense_entry(model, dense, images) for images in sizes)
    for number, mask in enumerate(settings.masks):
        for sparsity in reversed(settings.sparsities):
            for images in sizes:
                yield _sparse_entry(Cell(model, INFERENCE, images, SPARSE, mask, sparsity), finished)
        if number == 0 and "onnxruntime" in settings.against:
            runner = cache(lambda: dense_onnx(dense))
            yield from (_onnx_entry(model, runner, images) for images in sizes)
        if number == 0 and "bf16" in settings.against:
            yield from (bfloat16_entry(model, dense, images) for images in sizes)
    if "compile" in settings.against:
        yield from (_compiled_entry(model, dense, images) for images in sizes)


class Finished:
    """Networks as they would be loaded from a file, each made when it is first asked for."""

    def __init__(self, model: str, width: float, patterns: Patterns) -> None:
        self._network = model, width
        self._patterns = patterns
        self._made: dict[tuple[str, float], tuple[SparseNetwork, Facts]] = {}

    def __call__(self, mask: str, sparsity: float) -> tuple[SparseNetwork, Facts]:
        key = mask, sparsity
        if key not in self._made:
            network = settled(build(*self._network), self._patterns(mask, sparsity))
            masks = Masks(network)
            known = Facts(masks.kept(), masks.total(), connectivity(network, IMAGE_SIZE).connected)
            self._made[key] = SparseNetwork(reduced(traced(network, IMAGE_SIZE)), {}), known
        return self._made[key]


@torch.no_grad()
def settled(network: nn.Module, pattern: Pattern | None) -> nn.Module:
    """BatchNorm with shifts of its own and the statistics of a batch, as after training: a channel that nothing feeds
    is then a constant that others read, and magnitudes are alike in all layers.
    """
    masks = Masks(network)
    if pattern is not None:
        masks.set(pattern)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    generator = torch.Generator().manual_seed(SEED)
    for norm in norms:
        norm.bias.uniform_(-SHIFT, SHIFT, generator=generator)
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    SparseArithmetic(network.train())(batch_of(SETTLING)[0])
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
    return network


def dense_entry(model: str, network: nn.Module, images: int) -> Entry:
    return Entry(Cell(model, INFERENCE, images, DENSE), cache(lambda: _forward(network, images)))


def bfloat16_entry(model: str, network: nn.Module, images: int) -> Entry:
    return Entry(Cell(model, INFERENCE, images, "bf16"), cache(lambda: _forward(network, images, bfloat16=True)))


def _forward(network: Callable[..., Any], images: int, bfloat16: bool = False) -> Callable[[], object]:
    batch = batch_of(images)[0]

    def forward() -> object:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return network(batch)

    return forward


def _compiled_entry(model: str, network: nn.Module, images: int) -> Entry:
    def make() -> Callable[[], object]:
        forward = _forward(compiled(network), images)
        try_out(forward)
        return forward

    return Entry(Cell(model, INFERENCE, images, "compile"), cache(make))


def _sparse_entry(cell: Cell, finished: Finished) -> Entry:
    def facts(known: Facts) -> None:
        network, about = finished(cell.mask, cell.sparsity)
        known.kept, known.weights, known.connected = about.kept, about.weights, about.connected
        work = inference_work(network.graph, cell.batch)
        known.macs, known.bytes = work.macs, work.bytes

    return Entry(cell, cache(lambda: _forward(finished(cell.mask, cell.sparsity)[0], cell.batch)), facts=facts)


def _onnx_entry(model: str, runner: Callable[[], Callable[[Tensor], object]], images: int) -> Entry:
    def make() -> Callable[[], object]:
        run, batch = runner(), batch_of(images)[0]
        return lambda: run(batch)

    return Entry(Cell(model, INFERENCE, images, "onnxruntime"), cache(make))


def dense_onnx(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The dense network in onnxruntime: images (N, 3, H, W) to logits. Raises Unavailable where it is not installed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dense.onnx"
        try:
            onnx.save(traced(network, IMAGE_SIZE), {}, path)
            return onnx.runner(path)
        except SparseLabError as error:
            raise Unavailable(f"onnxruntime: {error}") from None
