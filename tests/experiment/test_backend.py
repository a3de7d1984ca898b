"""compute=auto: what it picks, and that it says why."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch

from sparse_lab.experiment import backend
from sparse_lab.host import machine
from sparse_lab.sweep.plan import Request


def config(*overrides: str):
    return copy.deepcopy(composed("method=static", "sparsity=s99", "trainer=cpu", *overrides))


@cache
def composed(*overrides: str):
    """Composing takes longer than all that is asked about it here."""
    return Request.read([]).compose(list(overrides)).config()


@pytest.fixture(params=[False, True], ids=["no bf16", "bf16"])
def bfloat16(request, monkeypatch) -> bool:
    monkeypatch.setattr(backend, "_fast_bfloat16", lambda: request.param)
    return request.param


@pytest.mark.every(2)
@pytest.mark.parametrize("model", ["vgg16", "resnet34", "resnet50", "mobilenet_v2"])
@pytest.mark.parametrize(("asked", "used"), [("32-true", "32-true"), ("64-true", "64-true"), ("bf16-mixed", "32-true")])
def test_sparse_networks_on_a_cpu(model, asked, used, bfloat16):
    chosen = backend.choose(config(f"model={model}", f"trainer.precision={asked}", "compute=auto"))
    assert (chosen.compute, chosen.precision) == ("sparse", used)
    assert chosen.line == "compute=auto picks sparse: 99% of the weights are to go"


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (("sparsity.target=0.85",), "% of zeros on, and this run ends at 85%"),
        (("method=dense",), "nothing is pruned here"),
        (("training.clip_norm=1.0",), "all_estimated and live do not"),
        (("method=dctps",), "method dctps adds a dense matrix"),
    ],
)
def test_dense_where_sparse_does_not_pay_or_fit(asked, why, bfloat16):
    chosen = backend.choose(config(*asked, "compute=auto"))
    assert (chosen.compute, chosen.precision) == ("dense", "bf16-mixed" if bfloat16 else "32-true")
    assert why in chosen.line and chosen.line.startswith("compute=auto picks dense")


def test_a_precision_of_ones_own_is_left_alone(bfloat16):
    chosen = backend.choose(config("sparsity.target=0.85", "trainer.precision=64-true", "compute=auto"))
    assert (chosen.compute, chosen.precision) == ("dense", "64-true")


def test_a_gpu_keeps_its_precision(bfloat16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "GPU_FILES", ("null",))  # every machine has this device
    chosen = backend.choose(config("trainer.accelerator=auto", "compute=auto"))
    assert (chosen.compute, chosen.precision) == ("dense", "32-true") and "GPU" in chosen.line


def test_live_clipping_and_break_even_are_within(bfloat16):
    for asked in (
        ("training.clip_norm=1.0", "training.clip_over=live"),
        ("training.clip_norm=1.0", "training.clip_over=all_estimated"),
        ("sparsity=s95",),
    ):
        assert backend.choose(config(*asked, "compute=auto")).compute == "sparse"


def test_sparse_has_more_to_beat_where_dense_has_bf16(bfloat16):
    assert backend.choose(config("sparsity=s90", "compute=auto")).compute == ("dense" if bfloat16 else "sparse")


def test_bf16_is_known_without_torch_as_torch_knows_it():
    machine.instructions.cache_clear()
    assert backend._fast_bfloat16() == (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def test_sparse_takes_float32_where_a_recipe_asks_for_bf16_and_says_so():
    asked = config("trainer.precision=bf16-mixed", "compute=sparse")
    assert "float32" in backend.choose(asked).line
    settled = backend.resolve_backend(asked)
    assert (settled.compute, settled.trainer.precision) == ("sparse", "32-true")
    assert backend.resolve_backend(settled) == settled and backend.choose(settled).line is None


def test_dense_is_what_it_was():
    asked = config("trainer.precision=bf16-mixed")
    assert backend.resolve_backend(asked) == asked and backend.choose(asked).line is None


@pytest.mark.every(2)
@pytest.mark.parametrize("compute", ["sparse", "auto"])
@pytest.mark.parametrize("method", ["set_itop", "rigl_itop", "east"])
def test_the_quick_experiment_computes_sparsely_as_it_stands(method, compute, bfloat16):
    """Its file asks for bf16 and clips gradients."""
    asked = copy.deepcopy(composed("experiment=east_quick", f"method={method}", f"compute={compute}", "trainer=cpu"))
    backend.check(asked, here=True)
    assert asked.training.clip_norm is not None and backend.resolve_backend(asked).compute == "sparse"
