"""Whatever a network calls: every method and attribute of a tensor, in place and not, with torch's own outcome."""

from __future__ import annotations

import copy
import gc
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_lab.sparse_cpu.engine import SparseArithmetic
from sparse_lab.sparse_cpu.maps import BatchInnermost
from sparse_lab.sparsity.masks import Masks

SIZE, CHANNELS = 4, 6
# not arithmetic of a tensor's numbers: memory, other devices, names, what asks for a machine or ends the process
LEFT_OUT = {
    "backward", "register_hook", "register_post_accumulate_grad_hook", "storage", "untyped_storage", "data_ptr",
    "share_memory_", "set_", "resize", "resize_", "resize_as", "resize_as_", "apply_", "map_", "map2_", "cuda", "xpu",
    "ipu", "hpu", "mtia", "pin_memory", "module_load", "to_mkldnn", "storage_type", "record_stream", "is_shared",
    "volatile", "reinforce", "unsafe_chunk", "retain_grad", "requires_grad_", "random_", "bernoulli_", "normal_",
    "uniform_", "cauchy_", "exponential_", "geometric_", "log_normal_", "new", "new_empty", "new_empty_strided",
    "bernoulli", "multinomial", "index_reduce_", "index_reduce", "dlpack_device", "const_data_ptr", "hash_tensor",
    "detach_", "_version", "dequantize", "grad_fn", "output_nr",
}  # fmt: skip
ARGUMENTS: list[tuple[Any, ...]] = [
    (), (1,), (0, 1), (1, 2), (2.0,), ("other",), ("mask",), (1, 0, 2, 3), (-1, CHANNELS), ((0, 2),), (1, "index"),
    (1, "index", "part"), (1, "index", 2.0), ("mask", 2.0), (1, 0, 2), (2, 1), ("other", "other"), (0.0, 1.0),
]  # fmt: skip


def operand(name: str, dtype: torch.dtype) -> Any:
    generator = torch.Generator().manual_seed(1)
    other = torch.rand(3, CHANNELS, SIZE, SIZE, generator=generator, dtype=dtype) + 0.5
    return {"other": other, "mask": other > 1.0, "index": torch.tensor([1, 0, 3]), "part": other[:, :3]}[name]


def thin(masks: Masks) -> dict[str, Tensor]:
    """A fifth of each layer, at random."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, mask in masks.masks().items():
        order = torch.randperm(mask.numel(), generator=generator)
        found[name] = (order < max(1, mask.numel() // 5)).view(mask.shape)
    return found


class Calls(nn.Module):
    """A convolution, then `function`; what is not a tensor of floats is left in `found`."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.function = function
        self.found: Any = None

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        self.found = plain(self.function(x))
        if not isinstance(self.found, Tensor) or not self.found.is_floating_point():
            return torch.flatten(x, 1)
        return self.found, x  # what became of the map itself, too


def plain(found: Any) -> Any:
    """Tensors in tuples put together; numbers and words as they are."""
    if isinstance(found, tuple | list) and found and all(isinstance(one, Tensor) for one in found):
        return torch.cat([one.reshape(-1) + 0.0 for one in found if one.is_floating_point()] or [found[0]])
    return found


def pair(function: Callable[[Tensor], Any]) -> tuple[Calls, Calls, SparseArithmetic]:
    torch.manual_seed(0)
    dense = Calls(function).double()
    nn.init.uniform_(dense.conv.bias, 0.5, 1.0)
    sparse = copy.deepcopy(dense)
    for masks in (Masks(dense), Masks(sparse)):
        masks.set(thin(masks))
    return dense, sparse, SparseArithmetic(sparse)


def compared(function: Callable[[Tensor], Any]) -> None:
    """Both have the same outcome and gradients, or both are refused."""
    dense, sparse, arithmetic = pair(function)
    images = torch.rand(3, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    try:
        wanted = dense(images)
    except AttributeError:
        raise
    except Exception as error:
        with pytest.raises(type(error)):
            arithmetic(images)
        return
    got = arithmetic(images)
    if not isinstance(wanted, tuple):
        same_plain(sparse.found, dense.found)
        return
    for mine, torchs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-10, atol=1e-12, equal_nan=True)
        assert mine.requires_grad == torchs.requires_grad
    finite = [one for one in wanted if one.requires_grad and one.isfinite().all()]
    if not finite:
        return
    try:
        sum(one.sin().sum() for one in finite).backward()
    except (RuntimeError, NotImplementedError):
        return  # torch has no derivative
    sum(
        one.sin().sum() for one, torchs in zip(got, wanted, strict=True) if any(torchs is two for two in finite)
    ).backward()
    torch.testing.assert_close(sparse.conv.bias.grad, dense.conv.bias.grad, rtol=1e-9, atol=1e-11, equal_nan=True)
    live = arithmetic.live[sparse.conv.weight]
    if dense.conv.weight.grad is not None:
        wanted_there = dense.conv.weight.grad.view(-1)[torch.from_numpy(live.positions)]
        torch.testing.assert_close(torch.from_numpy(live.gradient), wanted_there, rtol=1e-9, atol=1e-11, equal_nan=True)
    assert sparse.conv.weight.grad is None


def same_plain(got: Any, wanted: Any) -> None:
    if isinstance(wanted, Tensor):
        assert torch.equal(got + 0, wanted + 0) if not wanted.is_complex() else torch.allclose(got, wanted)
    elif (
        isinstance(wanted, int | float | str | torch.Size | torch.dtype | torch.device | torch.layout) or wanted is None
    ):
        assert got == wanted or str(got)[:20] == str(wanted)[:20]


def names() -> list[str]:
    kept = {
        "__add__", "__and__", "__bool__", "__contains__", "__eq__", "__float__", "__floordiv__", "__ge__",
        "__getitem__", "__hash__", "__iadd__", "__imul__", "__int__", "__invert__", "__isub__", "__itruediv__",
        "__iter__", "__len__", "__matmul__", "__mod__", "__mul__", "__neg__", "__pos__", "__pow__", "__radd__",
        "__rmul__", "__rsub__", "__rtruediv__", "__setitem__", "__sub__", "__truediv__", "__xor__", "__repr__",
        "__format__", "__deepcopy__", "__array__", "__index__", "__dlpack__",
    }  # fmt: skip
    public = [name for name in dir(Tensor) if not name.startswith("_") or name in kept]
    return [name for name in public if name not in LEFT_OUT and "sparse" not in name]


# a tenth of the names by default; all of them take a minute
@pytest.mark.every(8)
@pytest.mark.parametrize("name", names())
def test_every_method_and_attribute_of_a_tensor(name: str) -> None:
    if name == "__hash__":
        compared(lambda x: len({x: 1, x * 1: 2}))
        return
    if not callable(inspect.getattr_static(Tensor, name)):
        compared(lambda x: getattr(x, name))
        return
    tried = 0
    for arguments in ARGUMENTS:
        given = [operand(one, torch.float64) if isinstance(one, str) else one for one in arguments]
        try:
            getattr(torch.rand(3, CHANNELS, SIZE, SIZE, dtype=torch.float64) + 0.5, name)(*given)
        except Exception:
            continue  # nobody would call it so
        compared(lambda x, given=tuple(given): getattr(x, name)(*given))
        tried += 1
        if tried == 3:
            return


def windows(x: Tensor) -> Tensor:
    return x.view(3, CHANNELS, 2, 2, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, CHANNELS)


def first_then(x: Tensor, first: Callable[[Tensor], Any], then: Callable[[Tensor], Any]) -> tuple[Any, ...]:
    """What stands first is there before the map is changed."""
    found = first(x)
    return (then(x), *(found if isinstance(found, tuple | list) else [found]))


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "softmax over channels": lambda x: functional.softmax(x, 1),
    "einsum": lambda x: torch.einsum("nchw,nchv->nwv", x, x),
    "maxima and where they are": lambda x: x.max(1),
    "unbind": lambda x: x.unbind(2),
    "a slice, changed in place, and the whole": lambda x: (x[:, 1].mul_(3.0), x * 1),
    "a view, and the map changed in place": lambda x: first_then(
        x, lambda x: x.flatten(2), lambda x: functional.relu(x, inplace=True)
    ),
    "a view, changed in place by a kernel": lambda x: (x.permute(0, 2, 3, 1).relu_(), x),
    "a copy is a copy": lambda x: first_then(x, lambda x: x.permute(0, 2, 3, 1).contiguous(), Tensor.relu_),
    "reshape that has to copy": lambda x: first_then(
        x, lambda x: x.permute(0, 2, 3, 1).flatten(1), lambda x: x.mul_(2)
    ),
    "view that is refused": lambda x: x.permute(0, 2, 3, 1).view(3, -1),
    "transposed in place": lambda x: (x.transpose_(1, 2), x.shape, x.softmax(1))[2],
    "unsqueezed in place": lambda x: (x.unsqueeze_(0), x.squeeze(0).relu())[1],
    "assigned to": lambda x: (x.__setitem__((slice(None), 0), 2.0), x + x)[1],
    "in place of itself": lambda x: x.add_(x),
    "x + x": lambda x: x + x,
    "x and its activation": lambda x: x + functional.silu(x),
    "x and its gate": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)) + x,
    "one gate for two": lambda x: (lambda g: x * g + functional.gelu(x) * g)(x.mean((2, 3), True).sigmoid()),
    "a constant part": lambda x: x + x.detach(),
    "written to memory that was there": lambda x: torch.add(x.detach(), 1.0, out=torch.empty_like(x.detach())),
    "a map of another one's reading": lambda x: x.permute(0, 1, 3, 2) + x,
    "sizes of one": lambda x: x[:, :1].expand(-1, 5, -1, -1) + x.mean((2, 3), keepdim=True)[:, :5],
    "random numbers of its shape": lambda x: x * torch.zeros_like(x).fill_(2.0) + x.new_ones(()),
    "numbers": lambda x: 2.0 * x * 3 + 1 - x / 2 + (1 - x),
    "into another type and back": lambda x: x.float().double().half().double(),
    "a scalar": lambda x: x.sum(),
    "a nested outcome is a tensor's": lambda x: {"a": [x]}["a"][0] * 2,
    "functional max pool with where": lambda x: functional.max_pool2d(x, 2, return_indices=True),
    "padding": lambda x: functional.pad(x, (1, 0, 2, 1)),
    "roll and windows": lambda x: windows(torch.roll(x, 1, 2)),
    "fold and unfold": lambda x: functional.unfold(x, 2),
    "without gradients": lambda x: torch.no_grad()(lambda: x * 2)() + x,
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_as_networks_use_them(name: str) -> None:
    compared(FUNCTIONS[name])


PARTS: dict[str, Callable[[Tensor], Any]] = {
    "parts, changed in place, and the whole": lambda x: (x.chunk(2, 1)[0].mul_(2.0), x * 1),
    "the whole, changed in place, and its parts": lambda x: first_then(
        x, lambda x: x.split([1, 2, 3], 1), lambda x: x.add_(1.0)
    ),
    "parts of which one is unpacked": lambda x: (lambda a, b: (a.softmax(1), a.add_(b), x * 1))(*x.chunk(2, 1)),
    "a part of which the whole is unpacked": lambda x: (x.softmax(1), x.chunk(2, 1)[1].relu_() - x.mean(), x * 1),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_parts_are_their_wholes_memory(name: str) -> None:
    """With gradients torch refuses to change them."""
    dense, _, arithmetic = pair(PARTS[name])
    images = torch.rand(3, 3, SIZE, SIZE, dtype=torch.float64) - 0.5
    with torch.no_grad():
        for got, wanted in zip(arithmetic(images), dense(images), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


class Estimator(torch.autograd.Function):
    """A sign, whose gradient goes straight through: torch's modes do not see such functions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign() * 0.1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3.0


class Weights(nn.Module):
    """One masked weight, used in `how` and by a kernel."""

    def __init__(self, how: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(12, 12), how

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.how(self.linear, self.linear(x.flatten(1))))


WEIGHTS: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "einsum": lambda linear, x: torch.einsum("nc,oc->no", x, linear.weight),
    "matrix product": lambda linear, x: x @ linear.weight.t(),
    "its transpose": lambda linear, x: x @ linear.weight.T,
    "the weight alone": lambda linear, x: x * linear.weight.square().mean(1),
    "a scaled weight": lambda linear, x: functional.linear(x, linear.weight * 0.5, linear.bias),
    "normalised": lambda linear, x: functional.linear(x, functional.normalize(linear.weight, dim=1)),
    "one that is bound": lambda linear, x: functional.bilinear(x, x, linear.weight[None].expand(12, 12, 12)),
    "an autograd function of one's own": lambda linear, x: functional.linear(x, Estimator.apply(linear.weight)),
    "in an autograd function, and the map": lambda linear, x: Estimator.apply(x) * Estimator.apply(linear.weight).sum(),
    "in a list": lambda linear, x: x + torch.stack([linear.weight, linear.weight]).sum((0, 1)),
    "as the input of a kernel": lambda linear, x: x + functional.linear(linear.weight, linear.weight).sum(0),
    "asked of": lambda linear, x: (
        x * linear.weight.shape[0] / linear.weight.numel() * float(linear.weight.requires_grad)
    ),
}


@pytest.mark.parametrize("dense_gradients", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_masked_weight_in_any_function_has_its_live_gradient(name: str, dense_gradients: bool) -> None:
    torch.manual_seed(0)
    model = Weights(WEIGHTS[name]).double()
    masked(model)
    twin = copy.deepcopy(model)
    arithmetic = SparseArithmetic(model)
    arithmetic.dense_gradients = dense_gradients
    images = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    got, wanted = arithmetic(images), twin(images)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)
    got.square().sum().backward()
    wanted.square().sum().backward()
    live = arithmetic.live[model.linear.weight]
    there = twin.linear.weight.grad.view(-1)[torch.from_numpy(live.positions)]
    torch.testing.assert_close(torch.from_numpy(live.gradient), there, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.linear.bias.grad, twin.linear.bias.grad, rtol=1e-10, atol=1e-12)
    if dense_gradients:
        torch.testing.assert_close(model.linear.weight.grad, twin.linear.weight.grad, rtol=1e-10, atol=1e-12)
    else:
        assert model.linear.weight.grad is None


def masked(model: nn.Module) -> nn.Module:
    masks = Masks(model)
    masks.set(thin(masks))
    return model


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        maps = functional.relu(self.conv(x))
        return {"logits": self.linear(maps.mean((2, 3))), "maps": [maps, (maps * 2, "words")], "number": 3}


def test_outcomes_of_any_kind_are_tensors_with_gradients() -> None:
    torch.manual_seed(0)
    model = masked(Several().double())
    twin, images = copy.deepcopy(model), torch.randn(3, 3, 5, 5, dtype=torch.float64)
    got, wanted = SparseArithmetic(model)(images), twin(images)
    for outcome in (got, wanted):
        assert outcome["number"] == 3 and outcome["maps"][1][1] == "words"
        assert type(outcome["maps"][0]) is Tensor
        (outcome["logits"].square().sum() + outcome["maps"][0].sin().sum() + outcome["maps"][1][0].sum()).backward()
    torch.testing.assert_close(got["logits"], wanted["logits"])
    torch.testing.assert_close(model.conv.bias.grad, twin.conv.bias.grad)


def test_a_map_that_a_hook_keeps_is_a_tensor_behind_the_call_too() -> None:
    torch.manual_seed(0)
    model = masked(Several().double())
    kept: list[Tensor] = []
    model.conv.register_forward_hook(lambda module, given, outcome: kept.append(outcome))
    images = torch.randn(3, 3, 5, 5, dtype=torch.float64)
    SparseArithmetic(model)(images)
    model(images)
    assert isinstance(kept[0], BatchInnermost) and type(kept[1]) is Tensor
    torch.testing.assert_close(kept[0] * 1.0, kept[1])
    assert (kept[0] > 0).float().mean() == (kept[1] > 0).float().mean()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_without_gradients(context: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model = masked(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.GELU(), nn.Softmax2d(), nn.ReLU(True), nn.Conv2d(6, 4, 1), nn.Softplus())
    )
    images = torch.randn(3, 3, 5, 5)
    with context():
        got, wanted = SparseArithmetic(model)(images), model(images)
    assert not got.requires_grad
    torch.testing.assert_close(got, wanted)


def test_a_second_derivative_is_refused() -> None:
    model = masked(nn.Sequential(nn.Conv2d(3, 6, 3)))
    loss = SparseArithmetic(model)(torch.randn(2, 3, 5, 5)).square().sum()
    (gradient,) = torch.autograd.grad(loss, model[0].bias, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_frozen_weights_have_no_gradients() -> None:
    torch.manual_seed(0)
    model = masked(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)))
    model[0].requires_grad_(False)
    arithmetic = SparseArithmetic(model)
    arithmetic(torch.randn(2, 3, 5, 5)).square().sum().backward()
    assert arithmetic.live[model[0].weight].gradient is None and model[0].weight.grad is None
    assert arithmetic.live[model[3].weight].gradient is not None


def test_what_is_not_asked_to_go_back_is_let_go_of() -> None:
    model = masked(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.GELU(), nn.Softplus(), nn.Conv2d(6, 4, 1)))
    arithmetic = SparseArithmetic(model)
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            arithmetic(torch.randn(2, 3, 5, 5))
            held = sum(len(free) for free in arithmetic._pool._free.values())
            assert held == getattr(test_what_is_not_asked_to_go_back_is_let_go_of, "held", held)
            test_what_is_not_asked_to_go_back_is_let_go_of.held = held  # type: ignore[attr-defined]
    finally:
        gc.enable()
    assert held > 0


def test_autograd_functions_are_torchs_again_behind_a_call() -> None:
    before = torch.autograd.Function.__dict__["apply"]
    SparseArithmetic(masked(nn.Sequential(nn.Conv2d(3, 6, 3))))(torch.randn(2, 3, 5, 5))
    assert torch.autograd.Function.__dict__["apply"] is before
