"""Channels that are no maps, a number an image or a constant: against torch in float64, and that none is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_lab.models.dyrelu import DyReLU
from sparse_lab.models.weight_sharing import SharedConv2d
from sparse_lab.sparse_cpu import border_kernels, image_kernels, layout_kernels
from sparse_lab.sparse_cpu.autograd import Gradient, Tape, Value

BOUND = 1e-10


@dataclass(frozen=True)
class Case:
    """live: of each convolution, how many weights each output has (0: a channel that nothing feeds)."""

    live: tuple[tuple[int, ...], ...]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    bias: bool = False
    residual: bool = True
    ends: tuple[str, str, str] = ("dyrelu", "dyrelu", "dyrelu")
    betas: tuple[float, ...] = (1.0, 1.0, 1.0)
    pool: str = "none"
    images: int = 6
    size: tuple[int, int] = (6, 5)
    seed: int = 0

    @property
    def channels(self) -> int:
        return len(self.live[0])


def end(kind: str, channels: int, beta: float) -> nn.Module:
    if kind != "dyrelu":
        return {"relu": nn.ReLU, "silu": nn.SiLU, "none": nn.Identity}[kind]()
    layer = DyReLU(channels)
    layer.beta.fill_(beta)
    for one in (layer.reduce, layer.expand):  # coefficients that differ from image to image
        nn.init.normal_(one.weight, std=0.7)
    return layer


def norm(channels: int) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels)
    for tensor in (layer.weight, layer.bias, layer.running_mean):
        assert tensor is not None
        nn.init.normal_(tensor)
    return layer


class Net(nn.Module):
    """Three convolutions, a residual around the last; the second one of any kind."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        number = case.channels
        self.first = nn.Conv2d(3, number, 3, padding=1, bias=case.bias)
        options = case.stride, case.padding, case.dilation, case.groups, case.bias
        self.second = nn.Conv2d(number, number, case.kernel, *options)
        self.third = nn.Conv2d(number, number, 3, padding=1, bias=case.bias)
        self.shared = SharedConv2d(self.third)
        self.norms = nn.ModuleList(norm(number) for _ in range(4))
        self.acts = nn.ModuleList(end(kind, number, beta) for kind, beta in zip(case.ends, case.betas, strict=True))
        self.last = nn.ReLU()
        with torch.no_grad():
            self.norms[3].bias.abs_()  # or nothing might reach the classifier
        pools = {"none": nn.Identity(), "max": nn.MaxPool2d(2, 1), "max3": nn.MaxPool2d(3, 2, 1)}
        self.pool = pools[case.pool]
        self.residual = case.residual
        self.fc = nn.Linear(number, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.acts[0](self.norms[0](self.first(images)))
        x = self.pool(self.acts[1](self.norms[1](self.second(x))))
        y = self.norms[2](self.third(x))
        x = self.acts[2](y + x if self.residual else y)
        x = self.last(self.norms[3](self.shared(x)))
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


def sow(net: Net, case: Case) -> None:
    """`live` weights of every output, at random; all others are zero, but for the classifier's."""
    chance = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for name, counts in zip(("first", "second", "third"), case.live, strict=True):
            weight = net.get_submodule(name).weight
            weight.zero_()
            for output, count in enumerate(counts):
                flat = weight[output].view(-1)
                places = torch.randperm(flat.numel(), generator=chance)[:count]
                flat[places] = torch.randn(len(places), generator=chance, dtype=weight.dtype)


@st.composite
def cases(draw: Callable) -> Case:
    groups = draw(st.sampled_from([1, 1, 2]))
    number = 2 * draw(st.integers(2, 4))
    counts = st.tuples(*[st.sampled_from([0, 0, 1, 2, 3])] * number)
    pairs = {
        name: (draw(st.integers(low, high)), draw(st.integers(low, high)))
        for name, low, high in (
            ("kernel", 1, 4),
            ("stride", 1, 2),
            ("padding", 0, 2),
            ("dilation", 1, 2),
            ("size", 3, 7),
        )
    }
    return Case(
        live=(draw(counts), draw(counts), draw(counts)),
        groups=groups,
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        ends=tuple(draw(st.sampled_from(["dyrelu", "dyrelu", "relu", "silu", "none"])) for _ in range(3)),
        betas=tuple(draw(st.sampled_from([1.0, 0.5, 0.0])) for _ in range(3)),
        pool=draw(st.sampled_from(["none", "none", "max", "max3"])),
        images=draw(st.sampled_from([2, 5, 12, 33, 64])),
        seed=draw(st.integers(0, 99)),
        **pairs,
    )


def build(case: Case) -> Net:
    torch.manual_seed(case.seed)
    net = Net(case)
    sow(net, case)
    return net


def check(twins: type, case: Case, training: bool, wants_dense: bool = False) -> Any:
    pair = twins(build(case), density=None)
    assume(pair.arithmetic.density() <= 0.25 and all(mask.any() for mask in pair.masks[0].masks().values()))
    pair.train(training)
    pair.arithmetic.dense_gradients = wants_dense
    images = torch.randn(case.images, 3, *case.size, generator=torch.Generator().manual_seed(case.seed))
    for seed in (1, 2):  # the second step finds buffers that have been used
        errors = pair.step(images, seed)
        assert max(errors.values()) < BOUND, {name: error for name, error in errors.items() if not error < BOUND}
    return pair


def fits(case: Case) -> bool:
    reach = [d * (k - 1) + 1 for d, k in zip(case.dilation, case.kernel, strict=True)]
    sizes = [
        (s + 2 * p - r) // step + 1 for s, p, r, step in zip(case.size, case.padding, reach, case.stride, strict=True)
    ]
    return min(sizes) >= 2


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@given(case=cases())
def test_any_kinds_of_channels_and_their_gradients(twins: type, case: Case, training: bool) -> None:
    assume(fits(case))
    check(twins, case, training)


DEAD = Case(live=((2, 0, 0, 3, 0, 1), (0, 2, 0, 2, 1, 0), (1, 0, 2, 0, 0, 2)), kernel=(3, 3), padding=(1, 1))
CASES = {
    "3x3": DEAD,
    "3x3, stride 2": Case(DEAD.live, (3, 3), (2, 2), (1, 1), size=(8, 7)),
    "1x1": Case(DEAD.live, (1, 1)),
    "1x1, stride 2": Case(DEAD.live, (1, 1), (2, 2)),
    "a large prime batch": Case(DEAD.live, (3, 3), padding=(1, 1), images=263),
    "ReLU between": Case(DEAD.live, (3, 3), padding=(1, 1), ends=("dyrelu", "relu", "dyrelu"), bias=True),
    "pooled": Case(DEAD.live, (3, 3), padding=(1, 1), pool="max", betas=(1.0, 0.5, 0.5)),
    "nothing of the images": Case(((1, 0, 0, 0, 0, 0), *DEAD.live[1:]), (3, 3), padding=(1, 1)),
}


@pytest.mark.every(2)
@pytest.mark.parametrize("wants_dense", [False, True], ids=["live", "dense gradients"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", CASES)
def test_kinds_of_channels(twins: type, name: str, training: bool, wants_dense: bool) -> None:
    check(twins, CASES[name], training, wants_dense)


def test_masks_change_the_kinds_between_steps(twins: type) -> None:
    pair = check(twins, DEAD, training=True)
    other = Case((DEAD.live[1], DEAD.live[2], DEAD.live[0]), (3, 3), seed=5)
    for case in (other, DEAD):
        for net in (pair.dense, pair.sparse):
            sow(net, case)
        pair.set({name: weight != 0 for name, weight in pair.masks[0].weights().items()})
        errors = pair.step(torch.randn(6, 3, 6, 5))
        assert max(errors.values()) < BOUND, errors


class Written:
    """The maps of a step, and how many maps were given back to channels that are none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values: list[Value] = []
        self.in_vain = 0
        new, collect = Tape.new, Gradient.collect

        def seen(tape: Tape, shape: Any) -> Value:
            self.values.append(new(tape, shape))
            return self.values[-1]

        def collected(gradient: Gradient, among: Any) -> None:
            self.in_vain += int((gradient.written & among).sum())
            collect(gradient, among)

        monkeypatch.setattr(Tape, "new", seen)
        monkeypatch.setattr(Gradient, "collect", collected)


def test_no_map_is_written_of_a_channel_that_nothing_feeds(twins: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """The maps of DEAD by hand: fed by the images are 3 of 6 channels of the first convolution, and what reads any of
    them or, by a kernel that leaves the image, any number at all.
    """
    pair = twins(build(DEAD), density=None)
    written = Written(monkeypatch)
    pair.step(torch.randn(6, 3, 6, 5))
    found = [int(one._written.sum()) for one in written.values if one.shape.height > 1]
    fed = [np.array(counts) > 0 for counts in DEAD.live]
    after = fed[2] | fed[1]  # with the residual
    wanted = [
        *(fed[0].sum(), 0, fed[0].sum()),  # convolution, what its norm makes of it, dynamic ReLU
        *(fed[1].sum(), 0, fed[1].sum()),
        *(fed[2].sum(), 0, after.sum()),
        *(fed[2].sum(), fed[2].sum()),  # norm and ReLU are one
    ]
    assert found == [int(one) for one in wanted]
    assert written.in_vain == 0


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 1.0])
def test_what_reads_zeros_behind_a_relu_does_nothing(
    twins: type, monkeypatch: pytest.MonkeyPatch, shift: float, training: bool
) -> None:
    """Where nothing feeds a channel its BatchNorm leaves the shift alone, of which ReLU makes zero or a number."""
    case = Case(DEAD.live, (3, 3), padding=(1, 1), ends=("relu", "relu", "relu"), residual=False)
    net = build(case)
    with torch.no_grad():
        for one in net.norms[:3]:
            one.bias.fill_(shift)
            one.running_mean.zero_()
    sums_in_vain, gradients = 0, 0
    border, border_weight = border_kernels.border, border_kernels.border_weight

    def add(z: Any, sizes: Any, channels: Any, adds: Any, *rest: Any) -> None:
        nonlocal sums_in_vain
        sums_in_vain += int(adds[channels].sum())
        border(z, sizes, channels, adds, *rest)

    def look(*work: Any) -> None:
        nonlocal gradients
        gradients += 1
        border_weight(*work)

    monkeypatch.setattr(border_kernels, "border", add)
    monkeypatch.setattr(border_kernels, "border_weight", look)
    pair = twins(net, density=None)
    pair.train(training)
    for seed in (1, 2):
        errors = pair.step(torch.randn(6, 3, 6, 5), seed)
        assert max(errors.values()) < BOUND, errors
    assert (sums_in_vain > 0) == (gradients > 0) == (shift > 0)


def test_numbers_are_written_for_whoever_knows_no_kinds(twins: type) -> None:
    case = Case(DEAD.live, (3, 3), padding=(1, 1))
    net = build(case)
    net.pool = nn.AvgPool2d(2, 1)
    pair = twins(net, density=None)
    errors = pair.step(torch.randn(6, 3, 6, 5))
    assert max(errors.values()) < BOUND, errors
    assert any("avg_pool2d" in line for line in pair.said)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_memory_that_held_nan_before_adds_nothing(dtype: type) -> None:
    for _ in range(30):
        junk = [np.full(image_kernels.TOGETHER, np.nan, dtype) for _ in range(60)]
        x, out = np.ones(2 * 4 * (3 + layout_kernels.SPARE) * 5, dtype), np.zeros((1, 2, 5))
        del junk
        image_kernels.totals(x, (0, 1, 2, 4, 3, 5), np.arange(2), out)
        assert (out == 12.0).all()


def test_kernels_of_numbers_add_up_what_they_are_given() -> None:
    """Blocks of more images than are taken together, rows of a few pixels."""
    chance = np.random.default_rng(0)
    for block, width in ((300, 3), (32, 5), (1, 40)):
        blocks, channels, height = 2, 3, 4
        x = np.zeros((blocks, channels, height, width + layout_kernels.SPARE, block))
        x[:, :, :, :width] = chance.standard_normal((blocks, channels, height, width, block))
        sizes = (0, blocks, channels, height, width, block)
        out, mean = np.zeros((blocks, channels, block)), np.arange(3.0)
        image_kernels.totals(x.reshape(-1), sizes, np.array([0, 2]), out)
        wanted = x.sum((2, 3)) * np.array([1, 0, 1])[:, None]
        np.testing.assert_allclose(out, wanted, rtol=1e-12, atol=1e-12)
        image_kernels.away(x.reshape(-1), sizes, np.arange(3), mean, out)
        wanted = (x[:, :, :, :width] - mean[:, None, None, None]).mean((2, 3))
        np.testing.assert_allclose(out, wanted, rtol=1e-12, atol=1e-12)
