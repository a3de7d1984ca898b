"""The blocked layout: a round trip, zeros where zeros have to be, and buffers that come back."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparse_lab import models
from sparse_lab.models import dyrelu
from sparse_lab.sparse_cpu.engine import SparseArithmetic
from sparse_lab.sparse_cpu.layout import ALIGNED, Pool, Shape, block_size, pack, unpack
from sparse_lab.sparsity.masks import Masks

SIZES = st.tuples(st.integers(1, 70), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))


def blocked(array: np.ndarray, shape: Shape) -> np.ndarray:
    """(blocks, C, H, W + 1, B) without the guards, spare pixels included."""
    return array[shape.guard : -shape.guard].reshape(
        shape.blocks, shape.channels, shape.height, shape.width + 1, shape.block
    )


@given(SIZES, st.sampled_from([torch.float32, torch.float64]))
def test_a_round_trip_changes_no_bit(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    images = torch.randn(sizes, dtype=dtype)
    shape = Shape(*sizes, block_size(sizes[0]))
    buffer = Pool().take(shape, images.numpy().dtype)
    pack(images, shape, buffer.array)
    assert torch.equal(unpack(buffer.array, shape), images)
    # the definition of the layout, by numpy alone
    _, channels, height, width = sizes
    split = images.numpy().reshape(shape.blocks, shape.block, channels, height, width)
    assert np.array_equal(blocked(buffer.array, shape)[..., :width, :], split.transpose(0, 2, 3, 4, 1))
    assert not blocked(buffer.array, shape)[..., width, :].any()
    assert not guards(buffer.array, shape).any()


def guards(array: np.ndarray, shape: Shape) -> np.ndarray:
    return np.concatenate([array[: shape.guard], array[-shape.guard :]])


def test_images_in_another_memory_format_are_packed_alike() -> None:
    images = torch.randn(6, 5, 4, 3)
    shape = Shape(*images.shape, 6)  # type: ignore[arg-type]
    plain, last = (np.zeros(shape.numbers, np.float32) for _ in range(2))
    pack(images, shape, plain)
    pack(images.to(memory_format=torch.channels_last), shape, last)
    assert np.array_equal(plain, last)


@given(st.integers(1, 3000))
def test_the_block_divides_the_batch_and_no_divisor_is_nearer_to_32(images: int) -> None:
    block = block_size(images)
    assert images % block == 0

    def distance(size: int) -> float:
        return max(size / 32, 32 / size)

    assert all(distance(block) <= distance(size) * (1 + 1e-12) for size in range(1, images + 1) if images % size == 0)


@given(SIZES, st.sampled_from([np.float32, np.float64]))
def test_buffers_start_at_a_cache_line_and_at_zero(sizes: tuple[int, ...], dtype: type) -> None:
    shape = Shape(*sizes, block_size(sizes[0]))
    array = Pool().take(shape, np.dtype(dtype)).array
    assert array.ctypes.data % ALIGNED == 0
    assert shape.guard >= shape.block
    assert array.shape == (shape.numbers,)
    assert not array.any()


def test_a_buffer_that_nobody_holds_is_used_again_for_its_own_shape_alone() -> None:
    pool, kind = Pool(), np.dtype(np.float32)
    wide, tall = Shape(4, 2, 3, 5, 4), Shape(4, 2, 5, 3, 4)
    first = pool.take(wide, kind)
    address = first.array.ctypes.data
    assert pool.take(wide, kind).array.ctypes.data != address
    del first
    assert pool.take(tall, kind).array.ctypes.data != address
    assert pool.take(wide, np.dtype(np.float64)).array.ctypes.data != address
    addresses = {pool.take(wide, kind).array.ctypes.data for _ in range(2)}
    held = [pool.take(wide, kind) for _ in range(2)]
    assert address in addresses | {one.array.ctypes.data for one in held}


class Watched(Pool):
    """A pool that remembers what it handed out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[Shape, np.ndarray]] = {}

    def take(self, shape: Shape, dtype: np.dtype):  # type: ignore[no-untyped-def]
        buffer = super().take(shape, dtype)
        self.seen[buffer.array.ctypes.data] = shape, buffer.array
        return buffer


def network(name: str) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    size = {"vgg16": 37, "resnet34 for ImageNet": 64}.get(name, 15)
    model = models.build(name.split()[0], 10, 0.125, size)
    if name == "resnet34 with DyReLU":
        dyrelu.install(model, size)
    masks = Masks(model)
    masks.set({layer: torch.rand(mask.shape) < 0.2 for layer, mask in masks.masks().items()})
    return model, size


NETWORKS = ("vgg16", "resnet34", "resnet34 for ImageNet", "resnet34 with DyReLU", "mobilenet_v2")


@pytest.mark.parametrize("name", NETWORKS)
def test_after_steps_every_guard_and_spare_pixel_is_zero_and_no_buffer_is_lost(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[Watched] = []
    monkeypatch.setattr("sparse_lab.sparse_cpu.engine.Pool", lambda: pools.append(Watched()) or pools[0])
    model, size = network(name)
    arithmetic = SparseArithmetic(model)
    images = torch.randn(6, 3, size, size)
    known: list[set[int]] = []
    for _ in range(3):
        arithmetic(images).square().sum().backward()
        gc.collect()
        known.append(set(pools[0].seen))
    assert known[1] == known[2], "a third step needs memory that the second did not have"
    assert len(known[0]) > 10
    for shape, array in pools[0].seen.values():
        assert not guards(array, shape).any(), shape
        assert not blocked(array, shape)[..., shape.width, :].any(), shape
    assert any(array.any() for _, array in pools[0].seen.values())


def test_a_step_whose_gradients_nobody_asks_for_gives_its_buffers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pools: list[Watched] = []
    monkeypatch.setattr("sparse_lab.sparse_cpu.engine.Pool", lambda: pools.append(Watched()) or pools[0])
    model, size = network("resnet34")
    arithmetic = SparseArithmetic(model)
    images = torch.randn(6, 3, size, size)
    arithmetic(images)
    gc.collect()
    before = len(pools[0].seen)
    arithmetic(images)
    assert len(pools[0].seen) == before
