"""Maps stored in bfloat16: rounded as torch rounds, once for each map, and added up in float32."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_lab import models
from sparse_lab.models.dyrelu import DyReLU
from sparse_lab.sparse_cpu.engine import SparseArithmetic
from sparse_lab.sparse_cpu.layout import BFLOAT16, Pool, Shape, fill, pack, unpack
from sparse_lab.sparsity.masks import Masks

ROUNDING = 2.0**-8  # of a number that is rounded once, relative
SUMMING = 1e-5  # of a sum in float32, relative to the sum of what is added up without its sign


@given(
    numbers=st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=40),
    tie=st.integers(0, 2**15),
)
def test_a_number_is_rounded_as_torch_rounds_it(numbers, tie):
    half_way = np.array([tie << 16 | 0x8000], np.uint32).view(np.float32)
    images = torch.cat([torch.tensor(numbers, dtype=torch.float32), torch.from_numpy(half_way)]).view(-1, 1, 1, 1)
    shape = Shape(len(images), 1, 1, 1, len(images))
    buffer = Pool().take(shape, BFLOAT16)
    pack(images, shape, buffer.array)
    assert torch.equal(unpack(buffer.array, shape).isnan(), images.isnan())
    assert torch.equal(unpack(buffer.array, shape).nan_to_num(), images.bfloat16().float().nan_to_num())
    if not np.isnan(half_way).any():
        fill(buffer.array, shape, np.zeros(1, np.int64), half_way)
        assert unpack(buffer.array, shape).view(-1)[0] == torch.from_numpy(half_way).bfloat16().float()[0]


def sparse(model: nn.Module, density: float) -> SparseArithmetic:
    masks = Masks(model)
    masks.set({name: torch.rand(mask.shape) < density for name, mask in masks.masks().items()})
    return SparseArithmetic(model, storage="bf16")


# images that are no multiple of a vector, kernels of both families, entries by the thousand and a few
LAYERS = [
    (nn.Conv2d(64, 8, 3, padding=1), (32, 64, 8, 8), 0.2),
    (nn.Conv2d(64, 8, 3, padding=1), (5, 64, 8, 8), 0.2),
    (nn.Conv2d(64, 48, 3, padding=1, bias=False), (32, 64, 32, 32), 0.2),
    (nn.Conv2d(16, 8, 3, padding=1), (7, 16, 3, 3), 0.02),
    (nn.Conv2d(64, 8, 3, stride=2, padding=1), (32, 64, 8, 8), 0.2),
    (nn.Conv2d(64, 8, 1, stride=2), (6, 64, 7, 7), 0.2),
    (nn.Conv2d(32, 8, 5, padding=2, dilation=1, groups=4), (6, 32, 7, 9), 0.2),
    (nn.Conv2d(32, 8, (3, 1), dilation=2), (6, 32, 9, 7), 0.2),
]


@pytest.mark.parametrize(("layer", "shape", "density"), LAYERS, ids=[str(number) for number in range(len(LAYERS))])
def test_a_convolution_adds_up_in_float32_and_rounds_once(layer, shape, density):
    torch.manual_seed(0)
    layer = copy.deepcopy(layer)
    arithmetic = sparse(layer, density)
    wide = copy.deepcopy(layer).double()
    images = torch.randn(shape).bfloat16().float().requires_grad_()
    got = arithmetic(images)
    exact = images.detach().double().requires_grad_()
    wanted = wide(exact)
    with torch.no_grad():
        weight, bias = wide.weight.abs(), None if wide.bias is None else wide.bias.abs()
        most = layer._conv_forward(exact.abs(), weight, bias)
    assert bool(((got - wanted).abs() <= ROUNDING * wanted.abs() + SUMMING * most).all())
    assert not torch.equal(got, wanted.float())  # stored in less than float32

    gradient = torch.randn(got.shape).bfloat16()
    got.backward(gradient.float())
    wanted.backward(gradient.double())
    assert images.grad is not None and exact.grad is not None
    torch.testing.assert_close(
        images.grad, exact.grad.float(), rtol=ROUNDING, atol=SUMMING * float(exact.grad.abs().max())
    )
    live = arithmetic.live[layer.weight]
    dense = wide.weight.grad.view(-1)[torch.from_numpy(live.positions)]
    torch.testing.assert_close(
        torch.from_numpy(live.gradient).double(), dense, rtol=1e-4, atol=SUMMING * float(dense.abs().max())
    )
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad.double(), wide.bias.grad, rtol=1e-4, atol=1e-4)


class Stored(torch.autograd.Function):
    """What is stored in bfloat16, and its gradient too."""

    @staticmethod
    def forward(ctx, x):
        return x.bfloat16().double()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.bfloat16().double()


class Block(nn.Module):
    """Every kind of kernel: strides, residual, pooling of both kinds, dynamic ReLU, a gate, a smooth activation."""

    def __init__(self, stores: bool = False) -> None:
        super().__init__()
        self.stores = stores
        self.one, self.two = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.down = nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.BatchNorm2d(24)])
        self.dyrelu = DyReLU(16)
        for one in (self.dyrelu.reduce, self.dyrelu.expand):  # coefficients that differ from image to image
            nn.init.normal_(one.weight, std=0.5)
        self.gate = nn.Linear(24, 24)
        self.fc = nn.Linear(24, 10)

    def kept(self, x: Tensor) -> Tensor:
        return Stored.apply(x) if self.stores else x

    def forward(self, images: Tensor) -> Tensor:
        kept, functional = self.kept, nn.functional
        x = kept(functional.relu(self.norms[0](kept(self.one(kept(images))))))
        y = self.norms[1](kept(self.two(x)))
        x = kept(self.dyrelu(y + x))
        x = kept(functional.max_pool2d(x, 3, 2, 1))
        x = kept(functional.max_pool2d(functional.relu(self.norms[2](kept(self.down(x)))), 2))
        x = kept(functional.silu(x))
        g = kept(torch.sigmoid(self.gate(kept(functional.adaptive_avg_pool2d(x, 1)).flatten(1)))[..., None, None])
        return kept(self.fc(kept(functional.adaptive_avg_pool2d(kept(x * g), 1)).flatten(1)))


def test_a_network_is_as_near_to_float64_as_one_that_rounds_where_maps_lie():
    """The reference: torch in float64, with the maps rounded where they are stored."""
    torch.manual_seed(3)
    model = Block()
    arithmetic = sparse(model, 0.2)
    wide, rounded = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    rounded.stores = True
    images, labels = torch.randn(24, 3, 16, 16), torch.randint(0, 10, (24,))
    for one, given_ in ((arithmetic, images), (wide, images.double()), (rounded, images.double())):
        nn.functional.cross_entropy(one(given_), labels).backward()
    for (name, mine), exact, other in zip(
        model.named_parameters(), wide.parameters(), rounded.parameters(), strict=True
    ):
        live = arithmetic.live.get(mine)
        positions = slice(None) if live is None else torch.from_numpy(live.positions)
        found = mine.grad.view(-1) if live is None else torch.from_numpy(live.gradient)
        exact_, other_ = exact.grad.view(-1)[positions], other.grad.view(-1)[positions]
        error, reference = (float((one.double() - exact_).norm()) for one in (found, other_))
        assert error <= 3 * reference + 1e-6, name
        assert error > 1e-6 * float(exact_.norm()), name  # float32 would be nearer


def test_no_map_takes_four_bytes():
    torch.manual_seed(0)
    model = models.build("resnet34", width=0.0625)
    arithmetic = sparse(model, 0.1)
    arithmetic(torch.randn(8, 3, 32, 32)).sum().backward()
    kinds = {dtype for _, dtype in arithmetic._pool._free}
    assert kinds == {BFLOAT16}


def test_a_network_in_float64_keeps_it():
    torch.manual_seed(0)
    model = models.build("vgg16", width=0.0625).double()
    arithmetic = sparse(model, 0.1)
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(arithmetic(images), copy.deepcopy(model)(images), rtol=1e-10, atol=1e-10)


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="storage='float16' is not known: float32 or bf16"):
        SparseArithmetic(nn.Linear(2, 2), storage="float16")
